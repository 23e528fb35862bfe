"""Shears and translations along one axis against Pillow's own, and by hand."""

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment

from trainer.data import warps

FILL = (124, 116, 104)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
AMOUNTS = (0.0, 0.3, -0.3, 0.5, 1.0, -1.0, 0.25, 2.0, -2.0, 1 / 61, *np.random.default_rng(1).uniform(-0.45, 0.45, 20))


def both(original, amount, image, resample) -> tuple[np.ndarray, np.ndarray]:
    pictures = []
    for move in (warps.FASTER[original], original):
        pictures.append(np.asarray(move(image, amount, fillcolor=FILL, resample=resample)).astype(int))
    return tuple(pictures)


@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("original", warps.FASTER, ids=lambda function: function.__name__)
def test_pixels_are_pillows_to_a_level(original, resample):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8))
    differing = []
    for amount in AMOUNTS:
        found, expected = both(original, amount, noise, resample)
        assert np.abs(found - expected).max() <= 1, amount
        differing.append((found != expected).mean())
    # a fraction that Pillow cuts off just below a whole number: most often where the shift is a round number itself
    assert np.mean(differing) < 0.006


@pytest.mark.parametrize("original", warps.FASTER, ids=lambda function: function.__name__)
def test_one_colour_stays_that_colour(original):
    image = Image.new("RGB", (64, 48), (200, 100, 3))
    for amount in AMOUNTS:
        found, expected = both(original, amount, image, BICUBIC)
        np.testing.assert_array_equal(found, expected)


def test_half_a_pixel_by_hand():
    row = np.array([[10, 20, 60, 100]], np.uint8)
    image = Image.fromarray(np.stack([row] * 3, axis=-1))
    # to the right by 1/8 of 4 = 1/2 pixel: bilinear is the mean of two neighbours, the last one has the edge for its
    # neighbour, and its middle lies on the border, where nothing is left of the picture
    moved = warps.translate_x(image, 1 / 8, fillcolor=(1, 2, 3), resample=BILINEAR)
    assert np.asarray(moved)[0].tolist() == [[15] * 3, [40] * 3, [80] * 3, [1, 2, 3]]
    # bicubic, a = -1: weights -1/8, 5/8, 5/8, -1/8
    moved = warps.translate_x(image, 1 / 8, fillcolor=(1, 2, 3), resample=BICUBIC)
    # (-10 + 5 * 10 + 5 * 20 - 60) / 8 = 10, (-10 + 5 * 20 + 5 * 60 - 100) / 8 = 36.25, (-20 + 300 + 500 - 100) / 8 = 85
    assert np.asarray(moved)[0].tolist() == [[10] * 3, [36] * 3, [85] * 3, [1, 2, 3]]


def test_what_has_no_shorter_way_goes_timms(monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    monkeypatch.setattr(warps, "_moved", lambda *_: pytest.fail("not bilinear or bicubic of RGB"))
    for picture, resample in ((image, Image.Resampling.NEAREST), (image.convert("L"), BICUBIC)):
        fill = FILL if picture.mode == "RGB" else 5
        options = {"fillcolor": fill, "resample": resample}
        found = warps.shear_x(picture, 0.2, **options)
        assert found.tobytes() == auto_augment.shear_x(picture, 0.2, **options).tobytes()
