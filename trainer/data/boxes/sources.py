"""The images of section detect: COCO's files, or pictures of shapes drawn here."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from models.files.places import expanded
from models.labels import differences
from trainer.config.detect import BoxDataConfig, DetectConfig
from trainer.data.boxes.base import Annotated, BoxSource
from trainer.data.boxes.coco import CocoSource
from trainer.data.drawing import shapes
from trainer.data.drawing.common import TRAIN, VAL


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
