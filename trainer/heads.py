"""Who tells a teacher's classes (teacher.head): its own head, a probe fitted on its features, or nobody."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from models.labels import Match, OtherClasses, match_classes, names_tell
from models.teacher.classes import feature_width, with_probe
from models.teacher.load import Teacher
from trainer import artifacts
from trainer.config.phases import TeacherConfig
from trainer.data.base import ImageSource


@dataclass(frozen=True)
class Head:
    """teacher.head with auto resolved."""

    kind: Literal["own", "probe", "none"]
    why: str  # in one line
    match: Match | None = None  # of an own head with the data's classes


def head_of(checkpoint: Teacher, t: TeacherConfig, images: ImageSource) -> Head:
    """Who tells the classes of a teacher, as teacher.head and the data say.

    Args:
        checkpoint: the teacher with whatever head it was saved with.
        images: with the data's classes; none = images without labels.

    Raises:
        ValueError: classes are asked for and the images have no labels; its own head does not fit; or its names leave
            open which row is which class.
    """
    what = f"teacher {checkpoint.source}"
    if t.head == "none":
        return Head("none", "teacher.head=none")
    if not images.labels:
        if t.head == "auto":
            return Head("none", f"the images of {images.name} have no labels")
        raise ValueError(
            f"teacher.head={t.head} needs labels, and the images of {images.name} have none: give images with labels, "
            "or set teacher.head=none"
        )
    if t.head == "probe":
        return Head("probe", "teacher.head=probe")
    may_be_probed = t.head == "auto" and t.classes == "names" and bool(t.source)
    if not checkpoint.num_classes:
        if may_be_probed:
            return Head("probe", f"{what} has no head")
        raise ValueError(
            f"{what} has no head of its own, and teacher.head={t.head} with teacher.classes={t.classes} asks for it: "
            "set teacher.head=probe and teacher.classes=names to fit one, or teacher.head=none to teach without classes"
        )
    try:
        found = match(checkpoint, t.classes, images, what, policy_key="teacher.classes")
    except OtherClasses as error:
        if not may_be_probed:
            raise ValueError(f"{error}, or teacher.head=probe to fit a new head on this data") from None
        return Head("probe", error.problem)
    return Head("own", found.note or f"{what} has the data's classes", found)


def match(dense: Teacher, policy: str, images: ImageSource, what: str, policy_key: str = "") -> Match:
    """Where the data's classes stand in the head of a teacher, or of another dense model.

    Args:
        policy, what, policy_key: as match_classes takes them. Where there is a knob, a head whose names say so may also
            have more classes than the data; policy "subset" takes numbers for rows as well.
    """
    if policy_key and policy == "names" and names_tell(images.labels, dense.labels):
        policy = "subset"
    return match_classes(
        images.labels,
        dense.labels,
        dense.num_classes,
        data_named=images.named,
        what=what,
        where=images.name,
        policy=policy,
        policy_key=policy_key,
    )


def blank_probe(dense: Teacher, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weight (C, F) and bias (C,) of zeros: the probe before it is fitted."""
    with torch.device("cpu"):  # also where the caller builds on the meta device
        return torch.zeros(num_classes, feature_width(dense)), torch.zeros(num_classes)


def with_fitted_probe(dense: Teacher, labels: list[str], folder: Path, *, whole: bool) -> Teacher:
    """A teacher with the head that phase probe left in `folder`.

    Args:
        dense: the teacher as its checkpoint has it; changed in place.
        whole: the teacher was fine-tuned with its head, and all its weights are there.

    Raises:
        ValueError: what is there is damaged, or does not fit this teacher.
    """
    dense = with_probe(dense, *blank_probe(dense, len(labels)), labels)
    wanted = dense.model.state_dict()
    if whole:
        dense.model.load_state_dict(artifacts.load_weights(folder, wanted))
        return dense
    head = {name: wanted[name] for name in ("head.weight", "head.bias")}
    fitted = artifacts.load_weights(folder, head)
    return with_probe(dense, fitted["head.weight"], fitted["head.bias"], labels)
