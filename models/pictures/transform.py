"""PIL image -> normalised tensor as a model's own evaluation has it, by timm's transforms."""

import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform

from ..preprocessing import INTERPOLATIONS, Preprocessing

Transform = Callable[[Image.Image], torch.Tensor]
ImageFunction = Callable[[Image.Image], Image.Image]
# pixels that resizing may make of a picture, also in between: 2 x 50,000 with the shorter side at 256 would be 1.6e9
MAX_RESIZED = 2**25
MARGIN = 4  # pixels of the smaller picture that interpolation looks at around a place: lanczos 3


def eval_transform(pre: Preprocessing) -> Transform:
    """Resize, centre crop and normalise as the teacher's own evaluation. Draws nothing.

    Long thin pictures, of which a resize would make more than MAX_RESIZED pixels, come to the same in bounded memory.

    Returns:
        PIL RGB image -> float32 (C, image_size, image_size).
    """
    transform = create_transform(
        **create_options(pre), is_training=False, crop_pct=pre.crop_pct, crop_mode=pre.crop_mode
    )
    resize, crop, *rest = transform.transforms
    transform.transforms = [_ResizeAndCrop(pre, resize, crop), *rest]
    return transform


def create_options(pre: Preprocessing) -> dict[str, Any]:
    """What timm's create_transform is told for training and evaluation alike.

    Raises:
        ValueError: images of other than 3 channels.
    """
    if pre.in_chans != 3:
        raise ValueError(
            f"images are RGB, but the teacher takes {pre.in_chans} channels; choose a teacher that takes 3."
        )
    return {
        "input_size": (pre.in_chans, pre.image_size, pre.image_size),
        "interpolation": pre.interpolation,
        "mean": pre.mean,
        "std": pre.std,
    }


class _ResizeAndCrop:
    """timm's resize and centre crop; for what would take too much memory in between, another way to the same pixels."""

    def __init__(self, pre: Preprocessing, resize: ImageFunction, crop: ImageFunction):
        self.pre, self.resize, self.crop = pre, resize, crop
        self.resample = INTERPOLATIONS[pre.interpolation]

    def __call__(self, image: Image.Image) -> Image.Image:
        if self._pixels(image) <= MAX_RESIZED:
            return self.crop(self.resize(image))
        if self.pre.crop_mode == "squash":
            flat = image.resize((image.width, self.pre.resize_size), self.resample)  # the height first
            return self.crop(self.resize(flat))
        return self._middle(image)

    def _pixels(self, image: Image.Image) -> int:
        """The most pixels at a time of a resize: Pillow changes the width first, then the height."""
        width, height = self._resized_size(image)
        return width * max(height, image.height)

    def _resized_size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) after the resize, as torchvision rounds."""
        side = self.pre.resize_size
        if self.pre.crop_mode == "squash":
            return side, side
        if image.width <= image.height:
            return side, int(side * image.height / image.width)
        return int(side * image.width / image.height), side

    def _middle(self, image: Image.Image) -> Image.Image:
        """The centre crop of the resized picture, made of nothing but the part of the picture that it shows."""
        size = self.pre.image_size
        width, height = self._resized_size(image)
        first_x, last_x, left, right = _span(image.width, width, size)
        first_y, last_y, top, bottom = _span(image.height, height, size)
        part = image.crop((first_x, first_y, last_x, last_y))
        return part.resize((size, size), self.resample, box=(left, top, right, bottom))


def _span(side: int, resized: int, crop: int) -> tuple[int, int, float, float]:
    """Where the middle `crop` pixels of a side of `resized` come from, in pixels of the side before.

    Returns:
        (first, last, start, end): the whole pixels that interpolation looks at, and the place of the crop, counted from
        `first`: Pillow holds it in 32 bits, too few far inside of a very long picture.
    """
    scale = side / resized
    start = round((resized - crop) / 2) * scale  # as torchvision rounds
    end = start + crop * scale
    margin = MARGIN * max(scale, 1)
    first = max(0, math.floor(start - margin))
    last = min(side, math.ceil(end + margin))
    return first, last, start - first, end - first
