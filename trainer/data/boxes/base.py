"""Images with boxes, wherever they come from: what is known of an image, what a source of them is.

N objects of an image, H, W its height and width.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Annotated:
    """What an annotation file says of an image.

    Attributes:
        category_N: index among the categories.
        box_N4: left, top, width, height in pixels.
        area_N: pixels of the object, by which COCO calls it small, medium or large.
        crowd_N: whether it is a crowd, which nothing is taught of and which evaluation passes over.
        outlines: COCO's segmentation of each (polygons or run lengths); empty where the file has none.
    """

    id: int
    name: str  # of the file, or what stands for one
    height: int
    width: int
    category_N: np.ndarray
    box_N4: np.ndarray
    area_N: np.ndarray
    crowd_N: np.ndarray
    outlines: tuple[Any, ...] = ()

    def masks(self) -> np.ndarray:
        """(N, H, W) uint8, 1 where the object is."""
        from pycocotools import mask as coco_mask

        found = np.zeros((len(self.outlines), self.height, self.width), np.uint8)
        for number, outline in enumerate(self.outlines):
            found[number] = coco_mask.decode(run_lengths(outline, self.height, self.width))
        return found


def run_lengths(outline: Any, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed run lengths of a segmentation: polygons, run lengths as a list, or compressed already."""
    from pycocotools import mask as coco_mask

    if isinstance(outline, list):
        return coco_mask.merge(coco_mask.frPyObjects(outline, height, width))
    if isinstance(outline["counts"], list):
        return coco_mask.frPyObjects(outline, height, width)
    return outline


class BoxSource(ABC):
    """The images of one split with their objects.

    Attributes:
        name, origin: for people, and for the record.
        categories, category_ids: names, and what annotation files call them.
        skipped: always empty: an image that cannot be read is an error.
    """

    name: str
    origin: str
    categories: list[str]
    category_ids: list[int]

    def __init__(self) -> None:
        self.skipped: set[int] = set()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Image `index` in RGB. Raises ValueError, naming the file."""

    @abstractmethod
    def annotated(self, index: int) -> Annotated:
        """What is known of image `index`."""

    @abstractmethod
    def sizes(self) -> Counter[tuple[int, int]]:
        """How many images there are of each height and width."""

    @property
    def has_masks(self) -> bool:
        """Whether every object has an outline."""
        return True

    def coco(self) -> dict[str, Any]:
        """All images as COCO's annotation file has them, for pycocotools; images and objects in order, ids anew."""
        images = []
        annotations = []
        for index in range(len(self)):
            known = self.annotated(index)
            images.append({"id": index, "height": known.height, "width": known.width})
            for number, box in enumerate(known.box_N4.tolist()):
                entry = {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": int(known.category_N[number]),
                    "bbox": box,
                    "area": float(known.area_N[number]),
                    "iscrowd": int(known.crowd_N[number]),
                }
                if known.outlines:
                    entry["segmentation"] = run_lengths(known.outlines[number], known.height, known.width)
                annotations.append(entry)
        categories = [{"id": number, "name": name} for number, name in enumerate(self.categories)]
        return {"images": images, "annotations": annotations, "categories": categories}


def record_of(source: BoxSource) -> dict[str, Any]:
    """What tells this split from others, as plain values: images, objects of each category, and a digest of both."""
    counts = np.zeros(len(source.categories), dtype=np.int64)
    digest = hashlib.sha256()
    for index in range(len(source)):
        known = source.annotated(index)
        counts += np.bincount(known.category_N, minlength=len(counts))
        digest.update(f"{known.name} {known.height} {known.width}".encode())
        digest.update(known.category_N.astype("<i8").tobytes() + known.box_N4.astype("<f8").tobytes())
    named = dict(zip(source.categories, counts.tolist()))
    return {"images": len(source), "classes": named, "sha256": digest.hexdigest()}
