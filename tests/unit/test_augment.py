"""The training transform against timm's own, image by image from one seed: the same draws, nearly the same pixels."""

import io
import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation

from models.preprocessing import Preprocessing
from trainer.config.data import AugmentConfig
from trainer.data.augment import SPARE, Crop, TrainTransform, finish, gathered, posterize
from trainer.data.decode import Pixels, decode, decode_pixels
from trainer.distributed.ranks import seed_draws

SIZE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, random_erasing=0.25)
PLAIN = AugmentConfig(random_erasing=0.25)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise whose amplitude falls with its frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    fields = []
    for _ in range(3):
        spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        field = np.fft.irfft2(spectrum / frequency**1.15, (height, width))
        fields.append(field / field.std())
    values = 128 + 55 * np.stack([fields[0], fields[0] + 0.3 * fields[1], fields[0] + 0.3 * fields[2]], axis=-1)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def timms(pre: Preprocessing, aug: AugmentConfig):
    """timm's own transform; black where it would ask Pillow 13 for a picture of 0 bits."""
    transform = create_transform(
        input_size=(3, pre.image_size, pre.image_size),
        is_training=True,
        interpolation=pre.interpolation,
        mean=pre.mean,
        std=pre.std,
        scale=aug.scale,
        ratio=aug.ratio,
        hflip=aug.hflip,
        color_jitter=aug.color_jitter or None,
        auto_augment=aug.rand_augment or None,
        re_prob=aug.random_erasing,
        re_mode="pixel",
    )
    for step in transform.transforms:
        for op in getattr(step, "ops", ()):
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize
    return transform


def levels_apart(ours_CHW: torch.Tensor, theirs_CHW: torch.Tensor) -> torch.Tensor:
    """Of 255, before the normalisation."""
    return (ours_CHW - theirs_CHW).abs() * torch.tensor(STD)[:, None, None] * 255


def draws_left() -> tuple:
    """What each generator would give next: the same only where as much was drawn before."""
    return random.random(), np.random.random(), float(torch.rand(1))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_without_colours_pixels_are_timms_to_a_level(interpolation):
    pre = Preprocessing(SIZE, MEAN, STD, interpolation)
    ours, theirs = TrainTransform(pre, PLAIN), timms(pre, PLAIN)
    apart = []
    for seed in range(150):
        image = photo(150 - seed % 7, 80 + seed % 50, seed % 5)
        seed_draws(seed, 0, 0)
        found = ours(image)
        found_next = draws_left()
        seed_draws(seed, 0, 0)
        apart.append(levels_apart(found, theirs(image)))
        assert draws_left() == found_next
    apart = torch.stack(apart)
    # a level; more in crops whose height Pillow 13 resizes before the width, where overshoots are cut off elsewhere.
    # The noise of erased pixels, up to 4 x 255 levels, is the same
    assert apart.max() < 8.001
    assert (apart > 1.001).float().mean() < 1e-3
    assert (apart > 0.5).float().mean() < 0.04


def test_the_whole_recipe_draws_what_timm_draws():
    """Colours turn a level of difference into more: at the threshold of a solarisation into 255."""
    pre = Preprocessing(SIZE, MEAN, STD)
    ours, theirs = TrainTransform(pre, RECIPE), timms(pre, RECIPE)
    apart = []
    for seed in range(200):
        image = photo(150 - seed % 7, 80 + seed % 50, seed % 5)
        seed_draws(seed, 0, 0)
        found = ours(image)
        found_next = draws_left()
        seed_draws(seed, 0, 0)
        apart.append(levels_apart(found, theirs(image)))
        assert draws_left() == found_next  # strengths and directions are drawn alike, and as many of them
    apart = torch.stack(apart)
    assert apart.mean() < 0.05
    assert (apart > 1.001).float().mean() < 0.002
    assert apart.mean(dim=(1, 2, 3)).max() < 2  # of any image; another draw would be some tens


def test_color_jitter_draws_what_timm_draws():
    pre, aug = Preprocessing(SIZE, MEAN, STD), AugmentConfig(color_jitter=0.4)
    ours, theirs = TrainTransform(pre, aug), timms(pre, aug)
    for seed in range(40):
        image = photo(120, 90, seed % 5)
        seed_draws(seed, 0, 0)
        found = ours(image)
        seed_draws(seed, 0, 0)
        apart = levels_apart(found, theirs(image))
        assert apart.mean() < 0.6 and apart.max() < 12  # a few levels, times saturation, contrast and brightness


@pytest.mark.parametrize("size", [(500, 375), (30, 900), (1, 1)])
def test_crops_are_distributed_as_timms(size):
    """Area and ratio of crops beside as many of timm's from other seeds: Kolmogorov and Smirnov's distance."""
    crops = 800
    transform = TrainTransform(Preprocessing(SIZE, MEAN, STD), PLAIN)
    image = Image.new("RGB", size)
    found, expected = [], []
    for seed in range(crops):
        seed_draws(seed, 1, 0)
        crop = transform.crop(*size)
        found.append((crop.top, crop.left, crop.height * crop.width, crop.width / crop.height))
        assert crop.top + crop.height <= size[1] and crop.left + crop.width <= size[0]
        seed_draws(seed, 2, 0)
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, PLAIN.scale, PLAIN.ratio)
        height, width = max(height, 1), max(width, 1)
        expected.append((min(top, size[1] - 1), min(left, size[0] - 1), height * width, width / height))
    for ours, theirs in zip(np.array(found).T, np.array(expected).T, strict=True):
        places = np.unique(np.concatenate([ours, theirs]))
        steps = [np.searchsorted(np.sort(values), places, side="right") / len(values) for values in (ours, theirs)]
        # beyond 1.95 sqrt(2 / n) one time in a thousand, of draws of one distribution
        assert np.abs(steps[0] - steps[1]).max() < 1.95 * math.sqrt(2 / crops)


def test_operations_are_chosen_as_often_as_timms():
    transform = TrainTransform(Preprocessing(SIZE, MEAN, STD), RECIPE)
    (rand_augment,) = transform.colours
    names = []
    for op in rand_augment.ops:
        op.aug_fn = lambda image, *_, name=op.name, **__: names.append(name) or image
    seed_draws(0, 0, 0)
    for _ in range(3000):
        rand_augment(photo(4, 4))
    # 2 a picture, each half of the time, over 15 operations: 200 each, standard deviation 13.7
    counts = [names.count(op.name) for op in rand_augment.ops]
    assert len(counts) == 15 and all(145 < count < 255 for count in counts), counts


@pytest.mark.parametrize("interpolation", ["lanczos", "box", "hamming"])
def test_teachers_whose_filter_cannot_turn_a_picture(interpolation):
    """Pillow resizes by these and refuses to shear: one image in three stopped a run."""
    transform = TrainTransform(Preprocessing(SIZE, MEAN, STD, interpolation), AugmentConfig(rand_augment="rand-m9-p1"))
    seed_draws(0, 0, 0)
    for _ in range(60):
        assert transform(photo(40, 30)).isfinite().all()


# erasing and normalisation of a batch


def test_a_batch_is_erased_as_its_images_are_one_by_one():
    pre = Preprocessing(32, MEAN, STD)
    transform = TrainTransform(pre, AugmentConfig(random_erasing=1.0))
    views_BCHW = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    seed_draws(3, 0, 0)
    rectangles = [transform.rectangle() for _ in views_BCHW]
    together = finish(views_BCHW, gathered(rectangles), pre)
    seed_draws(3, 0, 0)
    erase = transform.erasing
    for view_CHW, found_CHW in zip(views_BCHW, together, strict=True):
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        expected = erase((view_CHW / 255 - mean) / std)
        torch.testing.assert_close(found_CHW, expected, rtol=0, atol=1e-6)
        assert (found_CHW - (view_CHW / 255 - mean) / std).abs().max() > 0.1  # something is erased


def test_a_device_is_never_waited_for():
    """The meta device raises where a value would come back to the processor, or where two devices meet."""
    pre = Preprocessing(32, MEAN, STD)
    transform = TrainTransform(pre, AugmentConfig(random_erasing=1.0))
    erased = gathered([transform.rectangle() for _ in range(4)])
    made = finish(torch.zeros((4, 3, 32, 32), dtype=torch.uint8), erased, pre, "meta")
    assert (made.device.type, made.dtype, made.shape) == ("meta", torch.float32, (4, 3, 32, 32))


# JPEGs that are decoded smaller


def encoded(image: Image.Image, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", **options)
    return content.getvalue()


@pytest.mark.parametrize(
    ("width", "height", "shrink"),
    [(127, 500, 1), (128, 128, 1), (256, 256, 2), (255, 900, 1), (513, 512, 4), (5000, 1024, 8)],
)
def test_a_picture_is_decoded_smaller_where_its_crop_has_pixels_to_spare(width, height, shrink):
    transform = TrainTransform(Preprocessing(SIZE, MEAN, STD), PLAIN)
    assert SPARE * SIZE == 128
    assert transform.shrink(Crop(0, 0, height, width)) == shrink


def test_what_is_decoded_smaller_looks_the_same():
    """The crop's edges lie at the nearest of the larger pixels, up to a quarter of a pixel of the result away."""
    image = photo(1200, 900)
    content = encoded(image, quality=92)
    transform = TrainTransform(Preprocessing(SIZE, MEAN, STD), AugmentConfig(hflip=0.0, scale=(0.5, 1.0)))
    whole = Pixels(np.array(decode(content, "it", 10**8)), 1200, 900)
    for seed in range(20):
        seed_draws(seed, 0, 0)
        crop = transform.crop(1200, 900)
        shrink = transform.shrink(crop)
        assert shrink > 1
        pixels = decode_pixels(content, "it", 10**8, lambda width, height, shrink=shrink: shrink)
        assert pixels.values_HWC.shape == (-(-900 // shrink), -(-1200 // shrink), 3)
        small_CHW = transform.view(pixels, crop).float()
        # noise as sharp as this has a standard deviation of 60 levels
        apart = (small_CHW - transform.view(whole, crop)).abs()
        assert apart.mean() < 5 and apart.max() < 30, seed
        rounded = [round(side / shrink) * shrink for side in (crop.top, crop.left)]
        ends = [round((crop.top + crop.height) / shrink) * shrink, round((crop.left + crop.width) / shrink) * shrink]
        at_the_pixels = Crop(*rounded, ends[0] - rounded[0], ends[1] - rounded[1])
        apart = (small_CHW - transform.view(whole, at_the_pixels)).abs()
        assert apart.mean() < 1.5 and apart.max() < 12, (seed, apart.mean(), apart.max())


def test_a_crop_of_a_smaller_picture_is_of_a_pixel_at_least():
    transform = TrainTransform(Preprocessing(SIZE, MEAN, STD), PLAIN)
    pixels = Pixels(np.full((2, 3, 3), 7, np.uint8), width=24, height=16, shrink=8)
    for crop in (Crop(15, 23, 1, 1), Crop(0, 0, 1, 1), Crop(7, 11, 2, 2), Crop(0, 0, 16, 24)):
        assert transform.view(pixels, crop).shape == (3, SIZE, SIZE)


def test_it_can_be_sent_to_a_worker_process():
    transform = TrainTransform(Preprocessing(SIZE, MEAN, STD), RECIPE)
    copied = pickle.loads(pickle.dumps(transform))
    image = photo(80, 60)
    made = []
    for each in (transform, copied):
        seed_draws(5, 0, 0)
        made.append(each(image))
    assert torch.equal(*made)
