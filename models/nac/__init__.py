"""Neural Attentive Circuits, the paper's second student: configuration, model and student modules."""

from .config import PRESETS, NACConfig, decode_preset
from .model import NAC
from .students import student_modules

__all__ = ["NAC", "PRESETS", "NACConfig", "decode_preset", "student_modules"]
