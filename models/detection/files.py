"""The folder a detector is saved as: config.json, which says what it and its backbone are, and model.safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files.checks import read_object
from ..files.hub import CheckpointFiles, Weights
from ..files.saved import fill, write
from ..version import SAVED, check_needs
from .backbone import Made
from .config import MODEL_TYPE, DetectorConfig
from .detector import Detector

SHARD = "5GB"


def save_detector(detector: Detector, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the folder anew.

    Args:
        state: weights in place of the detector's own, by plain names.
    """
    write(folder, content(detector), detector.state_dict() if state is None else state, SHARD)


def content(detector: Detector) -> dict[str, Any]:
    """What config.json holds."""
    made = detector.made
    backbone = {"kind": made.kind, "config": made.config}
    return {"model_type": MODEL_TYPE, "detector": detector.config.to_dict(), "backbone": backbone, **SAVED}


def load_detector(source: str | Path, revision: str | None = None) -> Detector:
    """A saved detector in evaluation mode, from a directory or the hub; strict, safetensors only.

    Raises:
        ValueError: nothing there, no detector, or weights that are damaged or do not fit.
    """
    files = CheckpointFiles(str(source), revision)
    path = files.find("config.json")
    values = {} if path is None else read_object(path, files)
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{files} is no saved detector: expected a config.json with model_type {MODEL_TYPE!r}.")
    check_needs(values, files)
    try:
        config = DetectorConfig.from_dict(values["detector"])
        made = Made(values["backbone"]["kind"], dict(values["backbone"]["config"]))
        detector = Detector(config, made.build(), made)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"config.json of {files}: {error}") from error
    fill(detector, Weights(files), lambda name: True)
    detector.source = str(files)
    return detector.eval()
