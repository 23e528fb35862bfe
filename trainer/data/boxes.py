"""Images with boxes: COCO's annotation files, or pictures of shapes drawn here; the batches of a detector.

As in loader.py, what an image looks like after its random changes depends on (seed, epoch, position) only.
N objects of an image, C = 3 channels, H, W height and width.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from models.detection.config import DetectorConfig
from models.detection.detector import Target
from models.detection.images import normalised, resized, resized_size
from models.files.places import expanded
from models.labels import differences
from models.preprocessing import Preprocessing
from trainer.config.data import AugmentConfig
from trainer.config.detect import BoxDataConfig, DetectConfig
from trainer.config.knobs import close, shown
from trainer.data.decode import decode
from trainer.data.drawing import shapes
from trainer.data.drawing.common import TRAIN, VAL
from trainer.data.loader import load_requests, steps_per_epoch
from trainer.data.sampler import TrainRequest, train_requests

SLACK = 1.0  # pixels that a box may reach over the edge of its image: annotation files are rounded
MOST_NAMED = 3


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


class ShapesSource(BoxSource):
    """Pictures of shapes, drawn whenever they are asked for; nothing to download.

    Args:
        split: train or val.
    """

    def __init__(self, data: BoxDataConfig, split: str) -> None:
        super().__init__()
        self.data = data
        self.kind = {"train": TRAIN, "val": VAL}[split]
        self.count = {"train": data.train_pictures, "val": data.val_pictures}[split]
        self.categories = list(shapes.SHAPES[: data.shapes])
        self.category_ids = list(range(1, data.shapes + 1))
        self.name = f"drawn shapes, {split}"
        self.origin = f"{data.shapes} shapes in pictures of {data.size} pixels, seed {data.seed}"

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Image.Image:
        """See BoxSource.image."""
        return Image.fromarray(self._drawn(index).image_HWC)

    def annotated(self, index: int) -> Annotated:
        """See BoxSource.annotated."""
        from pycocotools import mask as coco_mask

        drawn = self._drawn(index)
        outlines = tuple(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in drawn.mask_KHW)
        boxes = [coco_mask.toBbox(outline) for outline in outlines]
        return Annotated(
            id=index,
            name=f"{self.name} {index}",
            height=drawn.image_HWC.shape[0],
            width=drawn.image_HWC.shape[1],
            category_N=drawn.shape_K,
            box_N4=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            area_N=np.array([coco_mask.area(outline) for outline in outlines], dtype=np.float64),
            crowd_N=np.zeros(len(outlines), dtype=bool),
            outlines=outlines,
        )

    def sizes(self) -> Counter[tuple[int, int]]:
        """See BoxSource.sizes."""
        return Counter(shapes.size_of(index, self.data.size) for index in range(self.count))

    def _drawn(self, index: int) -> shapes.Drawn:
        data = self.data
        return shapes.draw(data.seed, self.kind, index, data.size, data.shapes, data.objects)


def open_boxes(detect: DetectConfig, max_pixels: int) -> tuple[BoxSource, BoxSource]:
    """The training and the validation images of section detect.

    Raises:
        ValueError: whatever CocoSource refuses, or splits of other categories.
    """
    data = detect.data
    if not data.path:
        return ShapesSource(data, "train"), ShapesSource(data, "val")
    root = Path(expanded(data.path))
    places = ((data.train_images, data.train_annotations), (data.val_images, data.val_annotations))
    train, val = (
        CocoSource(root / images, root / annotations, max_pixels, detect.masks) for images, annotations in places
    )
    if (train.categories, train.category_ids) != (val.categories, val.category_ids):
        told = differences(train.categories, val.categories, val.name, train.name)
        raise ValueError(f"{val.name} has other categories than {train.name}: {told or 'their ids differ'}")
    return train, val


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


@dataclass(frozen=True)
class BoxBatch:
    """A micro-batch of training, as the loop takes it."""

    images: Pictures
    labels: Targets
    skipped: tuple[int, ...] = ()


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

    def train_batches(
        self,
        *,
        seed: int,
        epoch: int,
        start_step: int,
        epochs: int,
        micro_batch: int,
        accumulation: int,
        world: int,
        rank: int,
        workers: int,
        device: torch.device | str,
    ) -> Iterator[BoxBatch]:
        """One batch per micro-step of this rank; see trainer.data.loader.train_batches."""
        steps_per_epoch(len(self.train), micro_batch=micro_batch, accumulation=accumulation, world=world)
        requests = train_requests(
            len(self.train),
            seed=seed,
            epoch=epoch,
            start_step=start_step,
            epochs=epochs,
            micro_batch=micro_batch,
            accumulation=accumulation,
            world=world,
            rank=rank,
            repeats=1,
        )
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


def _patches(size: tuple[int, int], side: int) -> int:
    return math.ceil(size[0] / side) * math.ceil(size[1] / side)


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
