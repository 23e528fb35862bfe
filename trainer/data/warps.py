"""Shears and translations of timm's RandAugment, along one axis at a time: Pillow's pixels in a fifth of its time.

Pillow moves a picture by any affine map with 4 x 4 pixels for each new one (bicubic) or 2 x 2. A shear or a translation
along x leaves y as it is, so only 4 or 2 pixels of the row count, and their weights are the same along the row. The
values are Pillow's but for rounding in 32 bits: a level in one value of a thousand (tests/unit/test_warps.py).
H, W = height and width; C = channels.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment

# Pillow cuts off the fraction; in 32 bits a value that is a whole number in 64 can come out a little below it
NEARLY = 2e-4


def shear_x(image: Image.Image, factor: float, **options: Any) -> Image.Image:
    """timm's shear_x: row y takes its pixels from `factor` * (y + 1/2) further right."""
    shifts_H = factor * (np.arange(image.height) + 0.5)
    return _shifted(image, shifts_H, auto_augment.shear_x, factor, options)


def shear_y(image: Image.Image, factor: float, **options: Any) -> Image.Image:
    """timm's shear_y: column x takes its pixels from `factor` * (x + 1/2) further down."""
    shifts_W = factor * (np.arange(image.width) + 0.5)
    return _shifted(image, shifts_W, auto_augment.shear_y, factor, options, turned=True)


def translate_x(image: Image.Image, share: float, **options: Any) -> Image.Image:
    """timm's translate_x_rel: every row takes its pixels from `share` of the width further right."""
    return _shifted(image, np.full(image.height, share * image.width), auto_augment.translate_x_rel, share, options)


def translate_y(image: Image.Image, share: float, **options: Any) -> Image.Image:
    """timm's translate_y_rel: every column takes its pixels from `share` of the height further down."""
    shifts_W = np.full(image.width, share * image.height)
    return _shifted(image, shifts_W, auto_augment.translate_y_rel, share, options, turned=True)


FASTER: dict[Callable, Callable] = {
    auto_augment.shear_x: shear_x,
    auto_augment.shear_y: shear_y,
    auto_augment.translate_x_rel: translate_x,
    auto_augment.translate_y_rel: translate_y,
}


def _shifted(
    image: Image.Image,
    shifts: np.ndarray,
    original: Callable[..., Image.Image],
    amount: float,
    options: dict[str, Any],
    turned: bool = False,
) -> Image.Image:
    """Every row moved by its own shift in pixels, or every column where `turned`; what comes from outside is filled.

    Args:
        original: timm's own, for other interpolations than bilinear and bicubic, and for a choice between several:
            which of them it is timm draws.
        amount: its argument.
        options: "fillcolor" and "resample", as timm passes them.
    """
    taps_of = _TAPS.get(options["resample"]) if image.mode == "RGB" else None
    if taps_of is None:
        return original(image, amount, **options)
    values_HWC = np.asarray(image.transpose(Image.Transpose.TRANSPOSE) if turned else image)
    moved = Image.fromarray(_moved(values_HWC, shifts, taps_of, options["fillcolor"]))
    return moved.transpose(Image.Transpose.TRANSPOSE) if turned else moved


def _moved(
    values_HWC: np.ndarray, shifts_H: np.ndarray, taps_of: Callable[[np.ndarray], tuple[int, list]], fill: tuple
) -> np.ndarray:
    height, width, channels = values_HWC.shape
    whole_H = np.floor(shifts_H).astype(int)
    first, weights = taps_of((shifts_H - whole_H)[:, None])
    rows = torch.from_numpy(_rows_from(values_HWC, whole_H + first, width + len(weights) - 1))
    size = width * channels
    total = torch.full((height, size), NEARLY)
    for number, weight in enumerate(weights):
        # torch's, which needs no picture of its own for the product
        total.addcmul_(rows[:, number * channels : number * channels + size], torch.from_numpy(weight).float())
    moved = total.clamp_(0, 255).numpy()
    # inside where 0 <= x + 1/2 + shift < width
    inside_from = np.clip(np.ceil(-shifts_H - 0.5), 0, width).astype(int) * channels
    inside_to = np.clip(np.ceil(width - shifts_H - 0.5), 0, width).astype(int) * channels
    filled = np.tile(np.float32(fill), width)
    for begin, end in _runs(inside_from * (size + 1) + inside_to):
        left, right = inside_from[begin], inside_to[begin]
        if left:
            moved[begin:end, :left] = filled[:left]
        if right < size:
            moved[begin:end, right:] = filled[right:]
    return moved.astype(np.uint8).reshape(values_HWC.shape)


def _rows_from(values_HWC: np.ndarray, starts_H: np.ndarray, count: int) -> np.ndarray:
    """`count` pixels of every row from a place of its own on, as float32 (H, count * C); the edges go on outside."""
    height, width, channels = values_HWC.shape
    before = max(0, -int(starts_H.min()))
    after = max(0, int(starts_H.max()) + count - width)
    padded_HWC = np.empty((height, before + width + after, channels), dtype=np.float32)
    padded_HWC[:, :before] = values_HWC[:, :1]
    padded_HWC[:, before : before + width] = values_HWC
    padded_HWC[:, before + width :] = values_HWC[:, -1:]
    padded = padded_HWC.reshape(height, -1)
    begins_H = (starts_H + before) * channels
    taken = count * channels
    runs = list(_runs(starts_H))
    if len(runs) == 1:
        return padded[:, begins_H[0] : begins_H[0] + taken]
    rows = np.empty((height, taken), dtype=np.float32)
    for begin, end in runs:
        rows[begin:end] = padded[begin:end, begins_H[begin] : begins_H[begin] + taken]
    return rows


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """(begin, end) of every stretch of equal values: a shear moves a few rows in a row by the same whole pixels."""
    borders = np.flatnonzero(np.diff(values)) + 1
    return itertools.pairwise([0, *borders.tolist(), len(values)])


def _bilinear(fraction: np.ndarray) -> tuple[int, list[np.ndarray]]:
    """Where the first of the pixels lies, seen from the whole part of the shift, and the weight of each."""
    return 0, [1 - fraction, fraction]


def _bicubic(fraction: np.ndarray) -> tuple[int, list[np.ndarray]]:
    """Pillow's: the cubic convolution with a = -1 (its resize has a = -1/2)."""
    d = fraction
    return -1, [-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, -(d**2) + d**3]


_TAPS = {Image.Resampling.BILINEAR: _bilinear, Image.Resampling.BICUBIC: _bicubic}
