"""COCO's annotation files: read, and refused with file and id where something in them cannot be right."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.config.knobs import close, shown
from trainer.data.boxes.base import Annotated, BoxSource
from trainer.data.decode import decode

SLACK = 1.0  # pixels that a box may reach over the edge of its image: annotation files are rounded
MOST_NAMED = 3


class CocoSource(BoxSource):
    """A folder of images and COCO's annotation file.

    Args:
        folder: of the images.
        annotations: the JSON file.
        masks: whether outlines are wanted, and so needed.

    Raises:
        ValueError: files that are not there, a file that is no annotation file, or annotations that cannot be right;
            file and id are named.
    """

    def __init__(self, folder: Path, annotations: Path, max_pixels: int, masks: bool = False) -> None:
        super().__init__()
        self.folder = folder
        self.max_pixels = max_pixels
        self.name = str(annotations)
        self.origin = str(annotations)
        if not folder.is_dir():
            raise ValueError(f"the image folder {folder} does not exist. {_near(folder)}")
        content = _content(annotations)
        self.categories, self.category_ids = self._categories(content["categories"])
        objects = self._objects(content["annotations"], masks)
        self.images = self._images(content["images"], objects)
        self._check_files()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_masks(self) -> bool:
        """Whether outlines were asked for."""
        return any(known.outlines for known in self.images)

    def image(self, index: int) -> Image.Image:
        """See BoxSource.image."""
        known = self.images[index]
        path = self.folder / known.name
        image = decode(str(path), str(path), self.max_pixels)
        if image.size != (known.width, known.height):
            raise ValueError(
                f"{path} (image id {known.id}) is {image.width} x {image.height} pixels, but {self.name} says "
                f"{known.width} x {known.height}: its boxes are those of another image"
            )
        return image

    def annotated(self, index: int) -> Annotated:
        """See BoxSource.annotated."""
        return self.images[index]

    def sizes(self) -> Counter[tuple[int, int]]:
        """See BoxSource.sizes."""
        return Counter((known.height, known.width) for known in self.images)

    def _categories(self, listed: Any) -> tuple[list[str], list[int]]:
        names = [str(entry["name"]) for entry in listed]
        ids = [entry["id"] for entry in listed]
        if not names:
            raise ValueError(f"{self.name} has no categories: nothing could be told apart")
        for what, values in (("name", names), ("id", ids)):
            doubled = sorted({str(value) for value in values if values.count(value) > 1})
            if doubled:
                raise ValueError(f"{self.name} has two categories of {what} {', '.join(doubled[:MOST_NAMED])}")
        return names, ids

    def _objects(self, listed: Any, masks: bool) -> dict[Any, list[tuple[Any, ...]]]:
        """Of every image id: (annotation id, category, box, area, crowd, outline) of each object."""
        places = {category: place for place, category in enumerate(self.category_ids)}
        objects: dict[Any, list[tuple[Any, ...]]] = {}
        for entry in listed:
            category = entry["category_id"]
            if category not in places:
                known = [f"{number} ({name})" for number, name in zip(self.category_ids, self.categories)]
                raise ValueError(
                    f"{self.name}: annotation {entry['id']} is of category {shown(category)}, which the file does not "
                    f"have. Known: {_few(known)}"
                )
            outline = entry.get("segmentation") if masks else None
            if masks and not outline:
                raise ValueError(
                    f"{self.name}: annotation {entry['id']} has no segmentation, which detect.masks=true needs: set it "
                    "to false, or use a file with masks"
                )
            box = entry["bbox"]
            if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
                raise ValueError(
                    f"{self.name}: annotation {entry['id']} has the box {shown(box)}, expected [left, top, width, "
                    "height] in pixels"
                )
            area = entry.get("area", box[2] * box[3])
            found = (entry["id"], places[category], box, area, bool(entry.get("iscrowd", 0)), outline)
            objects.setdefault(entry["image_id"], []).append(found)
        return objects

    def _images(self, listed: Any, objects: dict[Any, list[tuple[Any, ...]]]) -> list[Annotated]:
        if not listed:
            raise ValueError(f"{self.name} has no images: is it the annotation file of this split?")
        images = []
        seen = set()
        for entry in sorted(listed, key=lambda entry: entry["id"]):
            if entry["id"] in seen:
                raise ValueError(f"{self.name} has two images of id {entry['id']}")
            seen.add(entry["id"])
            images.append(self._annotated(entry, objects.get(entry["id"], [])))
        lost = [image for image in objects if image not in seen]
        if lost:
            annotation = objects[lost[0]][0][0]
            raise ValueError(
                f"{self.name}: annotation {annotation} is of image {lost[0]}, which the file does not have "
                f"({len(lost)} such images)"
            )
        return images

    def _annotated(self, entry: Mapping[str, Any], objects: list[tuple[Any, ...]]) -> Annotated:
        height, width = entry["height"], entry["width"]
        kept = []
        for found in objects:
            annotation, box = found[0], found[2]
            left, top, wide, high = map(float, box)
            ends = (left + wide, top + high)
            numbers = all(map(math.isfinite, (left, top, *ends)))
            reaches_in = left >= -SLACK and top >= -SLACK and ends[0] <= width + SLACK and ends[1] <= height + SLACK
            if not numbers or wide < 0 or high < 0 or not reaches_in:
                raise ValueError(
                    f"{self.name}: annotation {annotation} has the box {box}, outside of image {entry['id']} "
                    f"({entry['file_name']}, {width} x {height} pixels); expected [left, top, width, height] in pixels"
                )
            if wide > 0 and high > 0:  # COCO's own files have boxes of no size, which nobody learns from
                kept.append(found)
        outlines = tuple(found[5] for found in kept)
        return Annotated(
            id=entry["id"],
            name=entry["file_name"],
            height=height,
            width=width,
            category_N=np.array([found[1] for found in kept], dtype=np.int64),
            box_N4=np.array([found[2] for found in kept], dtype=np.float64).reshape(-1, 4),
            area_N=np.array([found[3] for found in kept], dtype=np.float64),
            crowd_N=np.array([found[4] for found in kept], dtype=bool),
            outlines=() if None in outlines else outlines,
        )

    def _check_files(self) -> None:
        there = {path.name for path in self.folder.iterdir()}
        missing = []
        for known in self.images:
            if known.name not in there and not (self.folder / known.name).is_file():
                missing.append(known)
        if missing:
            first = missing[0]
            hint = close(first.name, sorted(there)[:100_000], f"It holds {_few(sorted(there)) or 'nothing'}")
            raise ValueError(
                f"{len(missing)} of the {len(self.images)} images of {self.name} are not in {self.folder}, the first "
                f"is {first.name} (image id {first.id}). {hint}"
            )


def _content(path: Path) -> dict[str, Any]:
    """The three lists of an annotation file."""
    if not path.is_file():
        raise ValueError(f"the annotation file {path} does not exist. {_near(path)}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or no JSON: {error}") from None
    wanted = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for name, keys in wanted.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path} has no list {name!r}: expected COCO's format with {', '.join(wanted)}")
        for entry in entries:
            lacking = [key for key in keys if key not in entry] if isinstance(entry, dict) else list(keys)
            if lacking:
                raise ValueError(f"{path}: an entry of {name} lacks {', '.join(lacking)}: {shown(entry)}")
    return content


def _near(path: Path) -> str:
    """What is there in place of a file or folder."""
    parent = path.parent
    if not parent.is_dir():
        return f"Nor does {parent}: check detect.data.path"
    there = sorted(entry.name for entry in parent.iterdir())
    return close(path.name, there, f"{parent} holds {_few(there) or 'nothing'}")


def _few(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
