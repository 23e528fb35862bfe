"""What a source of images is; trainer/data/sources.py has the kinds."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from trainer.config.data import DataConfig
from trainer.data.classes import checked_names
from trainer.data.decode import Pixels, ShrinkOf, UnreadableImageError, pixels_of
from trainer.data.hub_splits import listed

logger = logging.getLogger(__name__)
Picture = TypeVar("Picture", Image.Image, Pixels)


class ImageSource(ABC):
    """The images of one split. `rows` are the numbers of the images used, `targets` their labels.

    Images without labels have `labels == []`, and every target is 0.

    Args:
        named: False when nobody gave the classes a name: they are called by their numbers, 0, 1, 2 ...

    Raises:
        ValueError: no images, fewer than two classes, or names of classes that are none (classes.py).
    """

    origin: str  # where they come from, for the record: a folder, or a hub id with the commit it resolved to
    remarks: str = ""  # what was left out of a folder and why, in one line
    held_out: float = 0.0  # share of the training split that these validation images are; 0 = a split of their own

    def __init__(self, name: str, labels: Sequence[str], targets: np.ndarray, data: DataConfig, *, named: bool = True):
        if not len(targets):
            raise ValueError(f"{name} has no images: check data.path and the names of its splits.")
        if len(labels) == 1:
            raise ValueError(f"{name} has one class ({listed(labels)}): give images of two or more to tell apart.")
        self.name = name
        self.max_pixels = data.max_pixels
        self.labels = checked_names(labels, name)
        self.named = named
        self.skip_unreadable = data.skip_unreadable
        self.skipped: set[int] = set()  # indices found unreadable so far; only filled when skip_unreadable is on
        self.rows = np.arange(len(targets))
        self.targets = targets
        # images per class, before data.limit; of images without labels their number
        self.counts = np.bincount(targets, minlength=len(labels))
        if 0 < data.limit < len(targets):
            self.rows = spread_over(len(targets), data.limit)
            self.targets = targets[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def label(self, index: int) -> int:
        return int(self.targets[index])

    def image(self, index: int) -> Image.Image:
        """Image `index` in RGB. Raises UnreadableImageError (a ValueError) naming the file or row."""
        return self._read(int(self.rows[index]))

    def pixels(self, index: int, shrink_of: ShrinkOf) -> Pixels:
        """Image `index` for training, smaller where that is enough; see decode.decode_pixels."""
        return pixels_of(self.image(index), shrink_of)

    def try_image(self, index: int) -> Image.Image | None:
        """Image `index`, or None when it is unreadable and skip_unreadable is on (counted in `skipped`, logged)."""
        return self._try(index, self.image)

    def image_or_next(self, index: int) -> tuple[Image.Image, int]:
        """Image `index`, or the next readable one when skip_unreadable is on, and the index that was read."""
        return self._or_next(index, self.image)

    def pixels_or_next(self, index: int, shrink_of: ShrinkOf) -> tuple[Pixels, int]:
        """The same for training, as from pixels()."""
        return self._or_next(index, lambda candidate: self.pixels(candidate, shrink_of))

    def _try(self, index: int, read: Callable[[int], Picture]) -> Picture | None:
        if index in self.skipped:
            return None
        try:
            return read(index)
        except UnreadableImageError as error:
            if not self.skip_unreadable:
                raise
            self.skipped.add(index)
            logger.warning("skipped: %s", error)
            return None

    def _or_next(self, index: int, read: Callable[[int], Picture]) -> tuple[Picture, int]:
        for candidate in range(index, index + len(self)):
            picture = self._try(candidate % len(self), read)
            if picture is not None:
                return picture, candidate % len(self)
        raise ValueError(f"none of the {len(self)} images of {self.name} can be read.")

    def subset(self, indices: np.ndarray) -> ImageSource:
        """A view of this source on the images of these indices, in this order."""
        view = copy.copy(self)
        view.rows = self.rows[indices]
        view.targets = self.targets[indices]
        view.skipped = set()
        return view

    def spread(self, count: int) -> ImageSource:
        """A view on `count` images spread evenly over this source; all of them when it has no more."""
        return self.subset(spread_over(len(self), min(count, len(self))))

    def name_of(self, row: int) -> bytes:
        """Name of an image's file relative to its split, for the fingerprint; empty where it has none."""
        return b""

    def size_of(self, row: int) -> int:
        """Size of an image's file, bytes, for the fingerprint; 0 where it has none."""
        return 0

    def content_of(self, row: int, limit: int) -> bytes:
        """What an image is, for the fingerprint: the first `limit` bytes of its file, or of its pixels."""
        return self._read(row).tobytes()[:limit]

    @abstractmethod
    def _read(self, row: int) -> Image.Image: ...


def spread_over(total: int, count: int) -> np.ndarray:
    """`count` of `total` places, evenly spread: most data is sorted by class, and the first would be of one class."""
    return np.arange(count) * total // count
