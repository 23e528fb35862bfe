"""The batches of a detector: images resized and mirrored with their objects, of any sizes.

As in trainer/data/loader.py, what an image looks like after its random changes depends on (seed, epoch, position) only.
N objects of an image, C = 3 channels, H, W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from models.detection.config import DetectorConfig
from models.detection.detector import Target
from models.detection.images import normalised, resized, resized_size
from models.preprocessing import Preprocessing
from trainer.config.data import AugmentConfig
from trainer.data.boxes.base import Annotated, BoxSource
from trainer.data.loader import checked_requests, load_requests
from trainer.data.sampler import TrainRequest


@dataclass(frozen=True)
class BoxData:
    """Images of a detector's training, with the attributes and methods that the loop wants of trainer.data.loader.Data.

    Attributes:
        hflip: probability of a mirrored image.
        jitter: lowest and highest factor of the shorter side in training.
    """

    train: BoxSource
    val: BoxSource
    config: DetectorConfig
    hflip: float
    jitter: tuple[float, float]
    workers: int
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # nothing of it is read: boxes cannot be mixed
    skip_unreadable: bool = False
    measure_workers: bool = False

    @property
    def preprocessing(self) -> Preprocessing:
        """The backbone's."""
        return self.config.preprocessing

    @property
    def num_classes(self) -> int:
        """Categories."""
        return len(self.config.categories)

    def train_batches(self, *, workers: int, device: torch.device | str, **where: int) -> Iterator[BoxBatch]:
        """One batch per micro-step of this rank; see trainer.data.loader.train_batches. They come on the CPU."""
        requests = checked_requests(len(self.train), repeats=1, **where)
        return load_requests(_TrainBoxes(self), requests, self.train, workers)

    def mean_patches(self, side: int) -> int:
        """Patches of `side` pixels of a training image, resized without jitter, in the mean."""
        patches = 0
        for (height, width), count in self.train.sizes().items():
            resized = resized_size(height, width, self.config.shorter_side, self.config.longest_side)
            patches += count * _patches(resized, side)
        return round(patches / len(self.train))

    def most_patches(self, side: int) -> int:
        """Patches of the largest image that there can be in training, whatever its shape."""
        shorter, longest = (
            math.ceil(length * self.jitter[1]) for length in (self.config.shorter_side, self.config.longest_side)
        )
        return _patches((shorter, longest), side)

    def picture(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        """Validation image `index` as bytes (C, H, W) of the size the detector wants, and its own height and width."""
        image = self.val.image(index)
        size = resized_size(image.height, image.width, self.config.shorter_side, self.config.longest_side)
        return resized(image, size, self.preprocessing), (image.height, image.width)


@dataclass(frozen=True)
class BoxBatch:
    """A micro-batch of training, as the loop takes it."""

    images: Pictures
    labels: Targets
    skipped: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """The images of a micro-batch, of any sizes, as bytes (C, H, W)."""

    bytes_: tuple[Tensor, ...]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.bytes_)

    def to(self, device: torch.device | str, dtype: torch.dtype, non_blocking: bool = False) -> list[Tensor]:
        """Normalised, on a device."""
        moved = (picture.to(device, non_blocking=non_blocking) for picture in self.bytes_)
        return [normalised(picture, self.preprocessing, dtype) for picture in moved]


@dataclass(frozen=True)
class Targets:
    """What is on the images of a micro-batch."""

    targets: tuple[Target, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> list[Target]:
        """The same on a device."""
        return [target.to(device) for target in self.targets]


class _TrainBoxes(Dataset):
    """A whole micro-batch per item."""

    def __init__(self, data: BoxData) -> None:
        self.data = data

    def __getitem__(self, request: TrainRequest) -> BoxBatch:
        pictures = []
        targets = []
        for index, seed in zip(*(numbers.tolist() for numbers in request), strict=True):
            picture, target = self._changed(index, seed)
            pictures.append(picture)
            targets.append(target)
        return BoxBatch(Pictures(tuple(pictures), self.data.preprocessing), Targets(tuple(targets)))

    def _changed(self, index: int, seed: int) -> tuple[Tensor, Target]:
        """An image and its objects, resized and perhaps mirrored as `seed` says."""
        data = self.data
        config = data.config
        draws = np.random.RandomState(seed)  # whose streams never change
        low, high = data.jitter
        factor = low + (high - low) * draws.random_sample()
        mirrored = draws.random_sample() < data.hflip
        image = data.train.image(index)
        known = data.train.annotated(index)
        shorter, longest = (max(1, round(side * factor)) for side in (config.shorter_side, config.longest_side))
        size = resized_size(image.height, image.width, shorter, longest)
        picture = resized(image, size, data.preprocessing)
        taught_N = ~known.crowd_N
        target = Target(
            torch.from_numpy(known.category_N[taught_N]),
            shares(known.box_N4[taught_N], known.height, known.width),
            _masks(known, taught_N, size) if config.masks else None,
        )
        if not mirrored:
            return picture, target
        masks = target.mask_NHW
        box_N4 = target.box_N4.clone()
        box_N4[:, 0] = 1 - box_N4[:, 0]
        return picture.flip(-1), Target(target.category_N, box_N4, None if masks is None else masks.flip(-1))


def shares(box_N4: np.ndarray, height: int, width: int) -> Tensor:
    """Left, top, width, height in pixels -> centre x, centre y, width, height as shares of the image, float32."""
    left, top, wide, high = box_N4.T
    right, bottom = (left + wide).clip(0, width), (top + high).clip(0, height)
    left, top = left.clip(0, width), top.clip(0, height)
    columns = ((left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height)
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def _masks(known: Annotated, taught_N: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(N, H, W) uint8 of the objects that are taught, at the size of the resized image."""
    masks_NHW = torch.from_numpy(known.masks()[taught_N])
    if not len(masks_NHW):
        return torch.zeros(0, *size, dtype=torch.uint8)
    return torch.nn.functional.interpolate(masks_NHW[None].float(), size=size, mode="nearest-exact")[0].byte()


def _patches(size: tuple[int, int], side: int) -> int:
    return math.ceil(size[0] / side) * math.ceil(size[1] / side)
