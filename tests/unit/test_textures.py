"""Source textures, the images: the same bytes everywhere, and nothing but the spectrum tells their classes."""

import hashlib

import numpy as np
import pytest

from benchmarks.fractals import grey, linear_accuracy, shortcuts
from trainer.config.data import DataConfig, TextureConfig
from trainer.data.drawing.common import TRAIN, UNIT, VAL, ZERO
from trainer.data.drawing.textures import CYCLES, WAVES, draw_images, draw_waves
from trainer.data.sources import open_source

# SHA-256 of what draw_images(*arguments) returns. When it changes, raise procedural.FORMAT.
KNOWN = {
    (0, TRAIN, 3, range(4), 64, 0.5): "1f19f4bdbb6aeef2f6453137366269c2349caa803241ff27a6d7f02a947fef64",
    (7, VAL, 11, range(3), 20, 1.0): "01af3832c876f1ab64294a73882512eb5ea000a81504db6a653860f60c56c653",
}


@pytest.mark.parametrize("arguments", KNOWN)
def test_images_are_the_known_bytes(arguments):
    images, palettes = draw_images(*arguments)
    assert hashlib.sha256(images.tobytes() + palettes.tobytes()).hexdigest() == KNOWN[arguments]


def test_an_image_depends_on_its_own_number_alone():
    together = draw_images(0, TRAIN, 5, range(70), 16, 0.5)  # more than a batch
    alone = draw_images(0, TRAIN, 5, range(66, 67), 16, 0.5)
    assert all((a[66:67] == b).all() for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("change", [{"seed": 1}, {"kind": VAL}, {"label": 6}, {"difficulty": 0.6}])
def test_another_parameter_gives_other_images(change):
    values = {"seed": 0, "kind": TRAIN, "label": 5, "indices": range(3), "size": 16, "difficulty": 0.5}
    before, after = draw_images(**values)[0], draw_images(**(values | change))[0]
    assert all((a != b).mean() > 0.2 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("size", [16, 225])
def test_every_image_has_the_same_mean_and_nearly_the_same_deviation(size):
    images, _ = draw_images(0, TRAIN, 1, range(3), size, 1.0)
    assert images.shape == (3, size, size) and images.dtype == np.uint8
    assert np.abs(images.mean(axis=(1, 2)) - ZERO).max() < 3
    deviation = images.std(axis=(1, 2)) / UNIT  # of the waves 1, of the noise up to 0.5 / sqrt(3) = 0.29
    assert 0.9 < deviation.min() <= deviation.max() < np.hypot(1, 0.29)


def test_the_power_of_easy_images_lies_at_the_waves_of_their_class():
    waves = draw_waves(0, 2)
    assert waves.shape == (WAVES, 2)
    assert CYCLES[0] <= waves[:, 1].min() <= waves[:, 1].max() <= CYCLES[1]
    images, _ = draw_images(0, TRAIN, 2, range(40), 64, 0.0)
    power = np.abs(np.fft.fft2(images.astype(float) - images.mean(axis=(1, 2), keepdims=True))) ** 2
    power = power.mean(axis=0) / power.mean(axis=0).sum()
    frequency = np.fft.fftfreq(64, 1 / 64)  # cycles over the picture
    near = np.zeros((64, 64), dtype=bool)
    for turn, cycles in waves:
        row, column = cycles * np.sin(2 * np.pi * turn), cycles * np.cos(2 * np.pi * turn)
        for sign in (1, -1):
            near |= np.hypot(frequency[:, None] - sign * row, frequency[None] - sign * column) < 1.5
    assert near.mean() < 0.02
    assert power[near].sum() > 0.75


# shortcuts: with 8 classes chance is 12.5%, and 160 validation images have a standard error of 2.6 points


@pytest.fixture
def sources(tmp_path):
    """Training and validation source of 8 classes, 60 and 20 images each, at a difficulty."""

    def build(difficulty: float):
        data = DataConfig(source="textures", textures=TextureConfig(8, 32, 480, 160, difficulty, cache=str(tmp_path)))
        return [open_source(data, split) for split in ("train", "val")]

    return build


def rows(sources, feature) -> list[np.ndarray]:
    """(N, F) features of each split."""
    return [np.stack([feature(source.image(index)) for index in range(len(source))]) for source in sources]


def spectrum(image) -> np.ndarray:
    """Square root of the power at the lowest 13 x 25 frequencies, without colour."""
    pixels = np.asarray(image, dtype=float).mean(axis=2)
    amplitude = np.abs(np.fft.fft2((pixels - pixels.mean()) / pixels.std()))
    return np.concatenate([amplitude[:13, :13], amplitude[:13, -12:]], axis=1).ravel()


def test_neither_places_nor_colours_tell_the_class_but_the_spectrum_does(sources):
    splits = sources(0.5)
    targets = [split.targets for split in splits]
    mean_colours = [values[:, :3] for values in rows(splits, shortcuts)]
    assert linear_accuracy(*mean_colours, *targets) < 0.25  # 8% to 14% for three seeds
    assert linear_accuracy(*rows(splits, grey), *targets) < 0.35  # 17% to 23%
    assert linear_accuracy(*rows(splits, spectrum), *targets) > 0.9  # 98% to 99%
