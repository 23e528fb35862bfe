"""Detection and instance segmentation on our vision transformers; the detector itself is transformers' RF-DETR."""

from .config import DetectorConfig
from .detector import Detections, Detector
from .files import load_detector, save_detector

__all__ = ["Detections", "Detector", "DetectorConfig", "load_detector", "save_detector"]
