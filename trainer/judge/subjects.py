"""What is judged: a student of ours, a teacher, or any ViT of the hub or of a directory, behind the same methods."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from models.files.checks import read_object
from models.files.hub import CheckpointFiles
from models.files.places import expanded
from models.flops import forward_flops, num_tokens
from models.preprocessing import Preprocessing
from models.students import CLASSES, load
from models.teacher.load import load_teacher
from trainer.evaluation.pooled import pooled

STUDENTS = ("train", "train_upcycled", "train_scratch", "train_scratch_equal_cost")  # of a run folder, the first there


@dataclass(frozen=True)
class Subject:
    """One model to judge.

    Attributes:
        name: short, as the table has it.
        given: what it was loaded by.
        source: the directory, or the hub id with its commit.
        kind: V-MoE, NAC or the class of timm it is.
        model: in evaluation mode, on the CPU.
        labels: names of its classes; None when nobody gave any.
    """

    name: str
    given: str
    source: str
    kind: str
    model: nn.Module
    preprocessing: Preprocessing
    labels: Sequence[str] | None

    @property
    def num_classes(self) -> int:
        """0 = it gives features only."""
        return self.model.num_classes

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of its weights and of what its images must look like."""
        digest = hashlib.sha256(repr(self.preprocessing).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @functools.cached_property
    def size(self) -> dict[str, int]:
        """Parameters, and FLOPs of one image."""
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "flops": forward_flops(self.model, num_tokens(self.model)),
        }

    def features(self, images: Tensor) -> Tensor:
        """What a head would read of images (B, C, H, W): (B, F)."""
        return pooled(self.model, images)


def load_subjects(sources: Sequence[str], image_size: int | None = None) -> list[Subject]:
    """Every model that is named, under names that tell them apart.

    Raises:
        ValueError: one that cannot be read, or is given twice.
    """
    subjects = [load_subject(source, image_size) for source in sources]
    names = _short_names([subject.name for subject in subjects])
    return [replace(subject, name=name) for subject, name in zip(subjects, names)]


def load_subject(source: str, image_size: int | None = None) -> Subject:
    """A run folder, the folder of a phase or of a saved model, a hub id, or the name of a timm model.

    Args:
        image_size: side of the images in pixels; None = the model's own.

    Raises:
        ValueError: nothing there that can be judged, an image size that does not fit.
    """
    where = _folder_of_student(source) or _timm_on_hub(source) or source
    files = CheckpointFiles(where)
    path = files.find("config.json")
    if path is None:
        raise ValueError(
            f"{where} has no config.json: expected the folder of a run or of its student or teacher, a saved model, a "
            "hub id (owner/name), or the name of a timm model"
        )
    if read_object(path, files).get("model_type") not in CLASSES:
        teacher = load_teacher(where, image_size=image_size)
        kind = type(teacher.model).__name__
        return Subject(source, where, teacher.source, kind, teacher.model, teacher.preprocessing, teacher.labels)
    model = load(where).float()
    if model.preprocessing is None:
        raise ValueError(f"{files} does not say what its images must look like: save it with its preprocessing")
    if image_size is not None and image_size != model.preprocessing.image_size:
        if not hasattr(model, "set_input_size"):
            raise ValueError(f"{files} takes images of {model.preprocessing.image_size} pixels alone, as every NAC")
        _check_multiple(image_size, model.config.patch_size, str(files))
        model.set_input_size(image_size)
    return Subject(source, where, model.source, model.FORMAT.name, model, model.preprocessing, model.labels)


def at_size(subject: Subject, image_size: int | None) -> Subject:
    """The same model on images of another size."""
    if image_size in (None, subject.preprocessing.image_size):
        return subject
    return replace(load_subject(subject.given, image_size), name=subject.name)


def _folder_of_student(source: str) -> str | None:
    """The student of a run folder; None where `source` is no run folder.

    Raises:
        ValueError: a run folder without a trained student.
    """
    folder = Path(expanded(source))
    if not folder.is_dir() or (folder / "config.json").is_file():
        return None
    phases = sorted(path.parent.name for path in folder.glob("*/result.json"))
    if not phases:
        return None
    for name in STUDENTS:
        if name in phases:
            return str(folder / name)
    raise ValueError(f"run folder {source} holds no trained student, only {', '.join(phases)}: run --phase train first")


def _timm_on_hub(source: str) -> str | None:
    """Where the weights of a timm model lie that is given by its name; None where it is not.

    Raises:
        ValueError: timm knows it, and no weights of it.
    """
    if "/" in source or Path(source).exists() or not timm.is_model(source.partition(".")[0]):
        return None
    try:
        settings = timm.get_pretrained_cfg(source)
    except RuntimeError:  # a tag it does not know
        settings = None
    if settings is None or not settings.hf_hub_id:
        known = ", ".join(timm.list_pretrained(f"{source.partition('.')[0]}.*")[:5]) or "none"
        raise ValueError(f"timm has no weights of {source!r} on the hub; there are: {known}")
    return settings.hf_hub_id


def _check_multiple(image_size: int, patch_size: int, what: str) -> None:
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is no multiple of the patch size {patch_size} of {what}")


def _short_names(sources: Sequence[str]) -> list[str]:
    """With as much of each path as tells it from the others."""
    parts = [Path(source).parts for source in sources]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same model is given twice: {', '.join(sources)}")
