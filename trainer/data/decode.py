"""One picture of a data set into RGB: models/pictures/decode.py, with errors that name the recipe's keys.

For training, JPEGs by a shorter way and smaller where less is enough. H, W = height and width; C = the three channels.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from models.pictures import decode as pictures
from models.pictures.decode import EXTENSIONS, UnreadableImageError, opened, printable

__all__ = [
    "EXTENSIONS",
    "SKIP_HINT",
    "Pixels",
    "UnreadableImageError",
    "decode",
    "decode_pixels",
    "opened",
    "pixels_of",
    "printable",
]
SKIP_HINT = "Repair or remove it, or set data.skip_unreadable=true."
JPEG_START = b"\xff\xd8\xff"
LARGEST_JPEG = 2**26  # bytes that are read into memory at once; what is larger Pillow reads piece by piece
# told width and height, the number of times a picture may be made smaller while it is decoded: 1, 2, 4 or 8
ShrinkOf = Callable[[int, int], int]


@dataclass(frozen=True)
class Pixels:
    """A decoded picture, which may be smaller than the one that is stored."""

    values_HWC: np.ndarray  # uint8 RGB, ceil(height / shrink) x ceil(width / shrink)
    width: int  # of the picture that is stored
    height: int
    shrink: int = 1


def decode(source: str | bytes, description: str, max_pixels: int) -> Image.Image:
    """See models.pictures.decode.

    Raises:
        UnreadableImageError: anything that keeps it from being read; the image is named.
    """
    return pictures.decode(source, description, max_pixels, limit="data.max_pixels", hint=SKIP_HINT)


def decode_pixels(source: str | bytes, description: str, max_pixels: int, shrink_of: ShrinkOf) -> Pixels:
    """Decode for training: the pixels of decode(), of a JPEG by a shorter way, and smaller where less is enough.

    A colour or grey JPEG without a fault is decoded by simplejpeg, which is libjpeg-turbo as in Pillow and gives the
    same values. Everything else goes through decode(), whole. The way depends on the content alone.

    Args:
        shrink_of: asked before pixels are decoded, perhaps more than once; what counts is the last time.

    Raises:
        UnreadableImageError: as decode().
    """
    content = _jpeg_content(source)
    if content is not None:
        pixels = _jpeg_pixels(content, max_pixels, shrink_of)
        if pixels is not None:
            return pixels
        source = content
    return pixels_of(decode(source, description, max_pixels), shrink_of)


def pixels_of(image: Image.Image, shrink_of: ShrinkOf) -> Pixels:
    """A picture that is decoded already, whole; `shrink_of` is told its size all the same."""
    shrink_of(image.width, image.height)
    return Pixels(np.array(image), image.width, image.height)


def _jpeg_content(source: str | bytes) -> bytes | None:
    """The content of what begins as a JPEG, else None: also of what cannot be read, which decode() has words for."""
    if isinstance(source, bytes):
        return source if source.startswith(JPEG_START) else None
    with suppress(OSError, ValueError), opened(source) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= LARGEST_JPEG and file.peek(len(JPEG_START)).startswith(JPEG_START):
            return file.read(size)
    return None


def _jpeg_pixels(content: bytes, max_pixels: int, shrink_of: ShrinkOf) -> Pixels | None:
    """None for what Pillow has to judge: other colours, too many pixels, a fault anywhere, even one it passes over."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in ("YCbCr", "Gray") or not 0 < height * width <= max_pixels:
            return None
        shrink = shrink_of(width, height)
        smaller = (-(-height // shrink), -(-width // shrink))
        # without a least size libjpeg-turbo's smallest factor, 1/8, would be as good as any
        values_HWC = simplejpeg.decode_jpeg(
            content, "RGB", min_height=smaller[0], min_width=smaller[1], min_factor=shrink
        )
    except ValueError:  # simplejpeg's for all that libjpeg-turbo says, warnings too
        return None
    assert values_HWC.shape == (*smaller, 3), f"{values_HWC.shape} of {height} x {width} at 1/{shrink}"
    return Pixels(values_HWC, width, height, shrink)
