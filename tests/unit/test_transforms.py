"""Transforms against the teacher's own: timm's evaluation transform, transformers' image processor, and plain PIL."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.pictures import transform as transforms
from models.preprocessing import CROP_MODES, Preprocessing
from trainer.config.data import AugmentConfig
from trainer.config.load import load_recipe
from trainer.data.transforms import eval_transform, train_transform
from trainer.distributed.ranks import seed_draws

ROOT = Path(__file__).resolve().parents[2]
HALF = (0.5, 0.5, 0.5)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = AugmentConfig(hflip=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with a little noise, so that a resize by the wrong filter or corner shows."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 90 * np.sin(x / 9 + k) * np.cos(y / (7 + k)) for k in range(3)]
    values = np.stack(waves, axis=-1) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("crop_pct", "interpolation"), [(0.9, "bicubic"), (1.0, "bilinear"), (0.875, "bicubic")])
def test_centre_crop_equals_timm(crop_pct, interpolation):
    from timm.data import create_transform

    config = {"input_size": (3, 48, 48), "interpolation": interpolation, "mean": MEAN, "std": STD, "crop_pct": crop_pct}
    image = photo(120, 90)
    ours = eval_transform(Preprocessing(48, MEAN, STD, interpolation, crop_pct))(image)
    torch.testing.assert_close(ours, create_transform(**config)(image), rtol=0, atol=0)


def test_centre_crop_equals_pil_by_hand():
    image = photo(120, 90)
    # shorter side 90 -> floor(48 / 0.9) = 53, the other 120 * 53 / 90 = 70.67 -> 70;
    # the crop starts at (70 - 48) / 2 = 11 and (53 - 48) / 2 = 2.5 -> 2
    cropped = image.resize((70, 53), Image.Resampling.BICUBIC).crop((11, 2, 59, 50))
    expected = (torch.tensor(np.array(cropped)).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]) / 0.25
    ours = eval_transform(Preprocessing(48, MEAN, (0.25, 0.25, 0.25), "bicubic", 0.9))(image)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("interpolation", "resample"), [("bilinear", 2), ("bicubic", 3)])
def test_squash_equals_transformers(interpolation, resample):
    from transformers import ViTImageProcessorPil

    # the other backend, torchvision's, rounds some pixels to the next of the 255 levels: of bilinear 0.8% with AVX2 or
    # AVX-512, 14% without
    image = photo(120, 90)
    processor = ViTImageProcessorPil(
        size={"height": 48, "width": 48}, resample=resample, image_mean=list(HALF), image_std=list(HALF)
    )
    theirs = torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"][0]))
    ours = eval_transform(Preprocessing(48, HALF, HALF, interpolation, crop_mode="squash"))(image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    centre = eval_transform(Preprocessing(48, HALF, HALF, interpolation))(image)
    assert (centre - theirs).abs().mean() > 0.1  # the tolerance tells squash from crop


def test_training_without_augmentation_is_the_image():
    image = photo(32, 32)
    values = torch.tensor(np.array(image)).permute(2, 0, 1) / 255
    expected = (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    pre = Preprocessing(32, MEAN, STD)
    torch.testing.assert_close(train_transform(pre, PLAIN)(image), expected, rtol=0, atol=1e-6)
    flipped = train_transform(pre, AugmentConfig(hflip=1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0)))(image)
    torch.testing.assert_close(flipped, expected.flip(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change", [{"scale": (0.2, 0.3)}, {"color_jitter": 0.4}, {"random_erasing": 1.0}, {"rand_augment": "rand-m9-inc1"}]
)
def test_each_augmentation_changes_the_image(change):
    image, pre = photo(32, 32), Preprocessing(32, MEAN, STD)
    plain = {"hflip": 0.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    transform = train_transform(pre, AugmentConfig(**(plain | change)))
    seed_draws(0, 0, 0)  # else one time in a few RandAugment leaves the image as it is
    one, two = transform(image), transform(image)
    assert one.shape == (3, 32, 32)
    assert not torch.equal(one, train_transform(pre, PLAIN)(image))
    assert not torch.equal(one, two)


def test_unknown_rand_augment_and_grey_teachers_are_refused():
    with pytest.raises(ValueError, match=r"augment\.rand_augment='rand-q9' is not understood"):
        train_transform(Preprocessing(32, MEAN, STD), AugmentConfig(rand_augment="rand-q9"))
    with pytest.raises(ValueError, match="the teacher takes 1 channels"):
        eval_transform(Preprocessing(32, (0.5,), (0.5,), in_chans=1))


def test_posterize_to_no_bits_is_black_whatever_pillow_is_installed():
    transform = train_transform(Preprocessing(32, HALF, HALF), AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1"))
    ops = next(step.ops for step in transform.transforms if hasattr(step, "ops"))
    (op,) = [op for op in ops if op.name == "PosterizeIncreasing"]
    image = photo(24, 24)
    assert not np.asarray(op.aug_fn(image, 0)).any()
    for bits in range(1, 8):  # as before
        kept = np.asarray(op.aug_fn(image, bits))
        np.testing.assert_array_equal(kept, np.asarray(image) & (256 - 2 ** (8 - bits)))
    assert op.aug_fn(image, 8) is image


OPEN = ("data.path=images", "teacher.source=owner/name", "train.init=owner/name", "student.depth=2")  # ??? of recipes


def shipped() -> dict[str, AugmentConfig]:
    """Every augmentation of the recipes, by the first that has it."""
    found: dict[str, AugmentConfig] = {}
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        if not path.name.startswith("study_"):
            augment = load_recipe(path, OPEN if "???" in path.read_text() else []).augment
            if augment not in found.values():
                found[path.name] = augment
    return found


SHIPPED = shipped()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_augmentation_takes_thousands_of_images(name):
    """One image in a thousand has a strength that others do not: a run would meet it in its first epoch."""
    augment = SHIPPED[name]
    transform = train_transform(Preprocessing(16, HALF, HALF), augment)
    image = photo(20, 18)
    seed_draws(0, 0, 0)
    for number in range(4000 if augment.rand_augment else 500):
        made = transform(image)
        assert made.shape == (3, 16, 16) and bool(torch.isfinite(made).all()), number


# long thin pictures: resizing the shorter side of 2 x 50,000 pixels to 256 would make 1.6e9 of 1e5

THIN = ((2, 900), (900, 2), (1, 701), (701, 1), (37, 2000), (2000, 37), (300, 1999), (1, 1), (120, 90))


@pytest.mark.parametrize(
    ("interpolation", "crop_mode", "levels"),
    # two passes of one order or the other round differently, and where a box is held in 32 bits the last digits do
    [("bicubic", "center", 1.1), ("lanczos", "center", 1.1), ("bilinear", "center", 2.1), ("bilinear", "squash", 1.1)],
)
def test_the_way_for_thin_pictures_comes_to_the_same_pixels(monkeypatch, interpolation, crop_mode, levels):
    rng = np.random.default_rng(0)
    for width, height in THIN:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for size, crop_pct in ((32, 0.875), (33, 0.9), (48, 1.0)):
            pre = Preprocessing(size, HALF, HALF, interpolation, crop_pct, crop_mode)
            monkeypatch.setattr(transforms, "MAX_RESIZED", 2**25)
            expected = eval_transform(pre)(image)
            monkeypatch.setattr(transforms, "MAX_RESIZED", 0)
            found = eval_transform(pre)(image)
            assert (found - expected).abs().max() * 127.5 < levels, (width, height, size)


@pytest.mark.parametrize("size", [(2, 50_000), (50_000, 2), (1, 400_000), (400_000, 1), (1, 1)])
def test_thin_pictures_take_no_more_memory_than_others(monkeypatch, size):
    """The memory of a resize is what Pillow is asked to make, and what it makes in between."""
    original = Image.Image.resize

    def resize(image, new_size, *arguments, box=None, **options):
        rows = image.height if box is None else box[3] - box[1]
        assert new_size[0] * max(new_size[1], rows) <= 2**25  # 4 bytes each: 134 MB
        return original(image, new_size, *arguments, box=box, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    image = Image.new("RGB", size, (10, 200, 30))
    made = [eval_transform(Preprocessing(224, HALF, HALF, "bicubic", 0.875, mode))(image) for mode in CROP_MODES]
    made.append(train_transform(Preprocessing(224, HALF, HALF), AugmentConfig(scale=(0.08, 1.0), hflip=0.5))(image))
    for pixels in made:
        values = pixels[:, ::50, ::50] * 127.5 + 127.5
        torch.testing.assert_close(values, torch.tensor([10.0, 200, 30])[:, None, None].expand_as(values))


@pytest.mark.parametrize(
    ("size", "scale"), [((1, 1), (0.08, 1.0)), ((2, 2), (0.08, 1.0)), ((1, 3), (0.08, 1.0)), ((8, 8), (0.001, 0.002))]
)
def test_a_crop_is_never_of_no_pixel(size, scale):
    """timm rounds it to none, and Pillow makes black of that, without a word."""
    image = Image.new("RGB", size, (200, 200, 200))
    transform = train_transform(Preprocessing(16, HALF, HALF), AugmentConfig(scale=scale))
    seed_draws(0, 0, 0)
    for _ in range(100):
        made = transform(image) * 127.5 + 127.5
        torch.testing.assert_close(made, torch.full_like(made, 200))


def test_transforms_can_be_sent_to_a_worker_process():
    """As Python 3.14 does by default."""
    image, pre = photo(20, 30), Preprocessing(16, HALF, HALF)
    for transform in (eval_transform(pre), train_transform(pre, PLAIN)):
        torch.testing.assert_close(pickle.loads(pickle.dumps(transform))(image), transform(image), rtol=0, atol=0)
