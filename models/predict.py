"""What a saved student says of pictures: files and folders in, the likeliest classes out, batch by batch.

    model = load("owner/name")  # models.students; or VMoE.from_pretrained, NAC.from_pretrained
    for prediction in predict(model, find_pictures(["images"])).predictions:
        print(prediction.path, prediction.classes[0].label)

B images, C classes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files.places import expanded
from .pictures.decode import EXTENSIONS, decode
from .pictures.transform import eval_transform
from .preprocessing import Preprocessing
from .students import NAC, VMoE


@dataclass(frozen=True)
class ClassScore:
    """One class that a picture may be of."""

    index: int
    label: str  # its number where the model has no names
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What the model says of one picture, the likeliest class first."""

    path: Path
    classes: tuple[ClassScore, ...]


@dataclass(frozen=True)
class Predictions:
    """What it says of all, and how fast it was.

    Attributes:
        model_seconds: of the forwards alone; `seconds` is with reading and preparing the pictures.
    """

    predictions: tuple[Prediction, ...]
    model_seconds: float
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Of the forwards alone."""
        return len(self.predictions) / self.model_seconds


def find_pictures(places: Sequence[str | Path]) -> list[Path]:
    """Pictures in the order of `places`, those of a folder and the folders in it sorted by path.

    Raises:
        ValueError: nothing given, a place that does not exist, or a folder without pictures.
    """
    if not places:
        raise ValueError("no picture was given: name files, or folders of them.")
    found = []
    for place in places:
        path = Path(expanded(str(place)))
        if path.is_dir():
            pictures = sorted(_walk(path))
            if not pictures:
                raise ValueError(
                    f"folder {path} holds no picture, expected files ending in {', '.join(EXTENSIONS[:4])}, ... in it "
                    f"or in folders inside of it."
                )
            found += pictures
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"{path} does not exist: name a picture, or a folder of them.")
    return found


def to_batch(pictures: Sequence[str | Path], preprocessing: Preprocessing | None) -> Tensor:
    """Pictures as a model's evaluation prepares them, (B, channels, H, W), all in memory at once.

    Raises:
        ValueError: no preprocessing is known, or a picture cannot be read; it is named.
    """
    if preprocessing is None:
        raise ValueError(
            "this model was saved without preprocessing, so nobody knows what its images look like: give "
            "model.save_pretrained(..., preprocessing=Preprocessing(...)) the values it was trained with."
        )
    transform = eval_transform(preprocessing)
    return torch.stack([transform(decode(str(path), str(path))) for path in pictures])


def predict(model: VMoE | NAC, pictures: Sequence[str | Path], *, top: int = 5, batch: int = 32) -> Predictions:
    """The `top` likeliest classes of every picture, by a model in evaluation mode, on its device and in its precision.

    Args:
        batch: pictures per forward.

    Raises:
        ValueError: a model without classes, nothing to predict, numbers below 1, or a picture that cannot be read.
    """
    if not model.num_classes:
        raise ValueError(
            f"{model.source or 'this model'} has no classes, it gives features: use model(images), or "
            f"model.forward_features(images) for tokens."
        )
    for name, value in (("top", top), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not pictures:
        raise ValueError("no picture was given: name files, or folders of them.")
    like = model.head.weight
    found = []
    model_seconds = 0.0
    started = time.perf_counter()
    for start in range(0, len(pictures), batch):
        paths = [Path(path) for path in pictures[start : start + batch]]
        images = to_batch(paths, model.preprocessing).to(like.device, like.dtype)
        before = time.perf_counter()
        with torch.no_grad():
            probability_BC = model(images).float().softmax(-1).cpu()  # waits for the device
        model_seconds += time.perf_counter() - before
        found += [Prediction(path, _likeliest(model, row, top)) for path, row in zip(paths, probability_BC)]
    return Predictions(tuple(found), model_seconds, time.perf_counter() - started)


def _likeliest(model: VMoE | NAC, probability_C: Tensor, top: int) -> tuple[ClassScore, ...]:
    values, indices = probability_C.topk(min(top, len(probability_C)))
    names = model.labels or [str(index) for index in range(model.num_classes)]
    return tuple(ClassScore(index, str(names[index]), value) for index, value in zip(indices.tolist(), values.tolist()))


def _walk(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield Path(where) / name
