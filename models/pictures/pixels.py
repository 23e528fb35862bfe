"""Pixels of whatever mode a picture has, as 8-bit RGB: each by a stated rule, or refused by the name of the mode.

| pixels | become |
|---|---|
| 8-bit colour, grey, palette, 1 bit, CMYK, YCbCr, Lab | RGB as Pillow converts it |
| with transparency of any kind | laid over white |
| 16-bit grey (PNG, TIFF, PGM) | its high byte, as Pillow reads 16-bit colour and libpng and OpenCV read both |
| 12-bit grey TIFF | its high 8 bits |
| 32-bit and signed integers, floats | refused: which value is white is not told |
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)
BACKGROUND = (255, 255, 255)  # white, as viewers show a transparent picture on a page
# TIFF tags and values
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO = 0
SIGNED = 2


class UnclearPixelsError(ValueError):
    """Pixels whose values could mean several pictures."""


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened picture as a new 8-bit RGB one, by the table above.

    Raises:
        UnclearPixelsError: of a mode that is refused.
    """
    _correct_transparent_colour(image)
    image.load()
    if image.mode == "RGB" and not image.has_transparency_data:  # nearly every picture
        return image.convert("RGB")
    _refuse_unclear(image)
    if image.mode.startswith("I"):
        return _high_byte(image)
    if image.has_transparency_data:
        return _over_background(image)
    return image.convert("RGB")


def _correct_transparent_colour(image: Image.Image) -> None:
    """Of a PNG, in place: it counts in the bits of the file, and Pillow compares it with pixels brought to 8 bits.

    How many bits those are Pillow tells only before it loads the pixels.
    """
    colour = image.info.get("transparency")
    if colour is None:
        return
    stored_as = str(image.tile)
    if isinstance(colour, tuple) and "RGB;16" in stored_as:
        raise UnclearPixelsError(
            "it has 16 bits a channel (mode RGB;16) and a transparent colour; save it with an alpha channel or 8 bits"
        )
    if isinstance(colour, int):
        for bits in (2, 4):
            if f"'L;{bits}'" in stored_as:
                image.info["transparency"] = colour * 255 // (2**bits - 1)


def _refuse_unclear(image: Image.Image) -> None:
    if image.mode == "F":
        raise UnclearPixelsError(
            "its pixels are floats (mode F), and which value is white is not told; convert it to 8 or 16 bits"
        )
    if SIGNED in _tiff(image).get(SAMPLE_FORMAT, ()):
        raise UnclearPixelsError(
            f"its pixels are signed integers (mode {image.mode}), and which value is white is not told; convert it to "
            "8 or 16 bits without sign"
        )
    # a PNG or PGM in mode I has 16 bits
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise UnclearPixelsError(
            "its pixels are 32-bit integers (mode I), and which value is white is not told; convert it to 8 or 16 bits"
        )


def _high_byte(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of the 12 that a TIFF can have, as its high 8 bits."""
    values_HW = np.asarray(image)
    bits = _tiff(image).get(BITS_PER_SAMPLE, (16,))[0]
    largest = int(values_HW.max())
    if 0 < largest < 256 and bits == 16:
        raise UnclearPixelsError(
            f"its 16-bit pixels (mode {image.mode}) go up to {largest} of 65535, so all would be black; save values of "
            "0 to 255 with 8 bits"
        )
    if 256 <= largest < 4096 and bits == 16:
        _warn_of_few_bits()
    grey_HW = (values_HW >> (bits - 8)).astype(np.uint8)
    if _tiff(image).get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow turns 8-bit ones over, these it does not
        grey_HW = 255 - grey_HW
    transparent = image.info.get("transparency")  # of a grey PNG: one value
    if isinstance(transparent, int):
        grey_HW = np.where(values_HW == transparent, np.uint8(BACKGROUND[0]), grey_HW)
    return Image.fromarray(grey_HW).convert("RGB")


@functools.cache  # said once per process
def _warn_of_few_bits() -> None:
    logger.warning(
        "a 16-bit picture has no value above 4095 and is read as dark as it is; if these are 12 bits of a camera or a "
        "scanner, stretch the files to 0..65535"
    )


def _over_background(image: Image.Image) -> Image.Image:
    layers = image.convert("RGBA")
    if layers.getextrema()[3][0] == 255:
        return layers.convert("RGB")  # opaque after all
    background = Image.new("RGBA", layers.size, BACKGROUND)
    return Image.alpha_composite(background, layers).convert("RGB")


def _tiff(image: Image.Image) -> Mapping[int, Any]:
    """Tags of a TIFF; none of any other format."""
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
