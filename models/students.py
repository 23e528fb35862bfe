"""The kinds of student there are: any of them is loaded here, or looked at.

    model = load("owner/name")  # a VMoE or a NAC, in evaluation mode
    about("owner/name")["parameters"]

They are told apart by the model_type in their config.json.
"""

from __future__ import annotations

from typing import Any

import torch

from .files.hub import CheckpointFiles, Weights
from .files.saved import read, read_model_type, read_versions
from .nac import about as nac_about
from .nac.model import NAC
from .vmoe import about as vmoe_about
from .vmoe.model import VMoE

CLASSES = {student.FORMAT.model_type: student for student in (VMoE, NAC)}
DETAILS = {VMoE: vmoe_about.details, NAC: nac_about.details}


def load(source: str, revision: str | None = None, *, k: int | None = None) -> VMoE | NAC:
    """The student in a directory or on the hub ("owner/name" or "owner/name@revision"), of whichever kind it is.

    Args:
        k: experts per token, in place of those it was trained with; of a V-MoE.

    Raises:
        ValueError: no student of any kind, `k` for one without experts, and whatever its from_pretrained raises.
    """
    files = CheckpointFiles(source, revision)
    kind = _class_of(files)
    if kind is VMoE:
        return VMoE.from_pretrained(files, k=k)
    if k is not None:
        raise ValueError(f"k={k} was given, and {files} is a {kind.FORMAT.name}, which has no experts: leave k out.")
    return kind.from_pretrained(files)


def about(source: str, revision: str | None = None) -> dict[str, Any]:
    """What a saved student is, from its config.json and the names in its weights; no weight is read.

    Returns:
        Plain values for people and JSON: sizes, cost, classes, preprocessing, and what only its kind has.

    Raises:
        ValueError: as load.
    """
    files = CheckpointFiles(source, revision)
    kind = _class_of(files)
    config, preprocessing, labels = read(kind.FORMAT, files)
    weights = Weights(files)
    weights.unwrap()
    kind.FORMAT.check_counts(config, weights)
    with torch.device("meta"):
        model = kind(config)
    weights.check(model.state_dict())
    return {
        "source": str(files),
        "kind": kind.FORMAT.name,
        "saved_by": read_versions(kind.FORMAT, files).get("m2mkd_version"),
        "image_size": config.image_size,
        **DETAILS[kind](model),
        "classes": config.num_classes,
        "labels": labels,
        "preprocessing": preprocessing and preprocessing.to_dict(),
    }


def _class_of(files: CheckpointFiles) -> type[VMoE] | type[NAC]:
    model_type = read_model_type(files)
    if model_type not in CLASSES:
        known = " or ".join(f"{name!r}" for name in CLASSES)
        raise ValueError(f"{files} is a {model_type!r}, expected a student of this package: {known}.")
    return CLASSES[model_type]
