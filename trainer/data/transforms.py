"""PIL image -> normalised tensor for training, by timm's own transforms; in evaluation models/pictures/transform.py."""

from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation

from models.pictures.transform import Transform, create_options, eval_transform
from models.preprocessing import Preprocessing
from trainer.config.data import AugmentConfig

__all__ = ["Transform", "eval_transform", "train_transform"]


def train_transform(pre: Preprocessing, aug: AugmentConfig) -> Transform:
    """RandomResizedCrop, flip, RandAugment or colour jitter, normalisation, random erasing, in timm's order.

    Draws from `random`, numpy and torch, all three.

    Returns:
        PIL RGB image -> float32 (C, image_size, image_size).

    Raises:
        ValueError: timm does not understand `augment.rand_augment`.
    """
    try:
        transform = create_transform(
            **create_options(pre),
            is_training=True,
            scale=aug.scale,
            ratio=aug.ratio,
            hflip=aug.hflip,
            color_jitter=aug.color_jitter or None,
            auto_augment=aug.rand_augment or None,
            re_prob=aug.random_erasing,
            re_mode="pixel",  # noise per pixel, as DeiT and the m2mKD recipe
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"augment.rand_augment={aug.rand_augment!r} is not understood by timm ({error}); "
            "expected something like rand-m9-mstd0.5-inc1, or empty for none."
        ) from error
    _mend_posterize(transform)
    _mend_crop(transform)
    return transform


def _mend_posterize(transform: Transform) -> None:
    """Let timm's Posterize keep 0 bits again, in place.

    At its greatest strength (about one image in a thousand of rand-m9-mstd0.5-inc1) timm 1.0.31 asks Pillow for 0 bits,
    which was a black image until Pillow 13: "bits must be between or equal to 1 and 8". To go when timm does not ask.
    """
    for step in transform.transforms:
        ops = list(getattr(step, "ops", ()))  # RandAugment, AugMix
        for pair in getattr(step, "policy", ()):  # AutoAugment
            ops += pair
        for op in ops:
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)  # as Pillow before 13
    return auto_augment.posterize(image, bits_to_keep, **options)


def _mend_crop(transform: Transform) -> None:
    """Let timm's RandomResizedCrop keep a pixel at least, in place.

    Of 1 x 1 pixels, or of 8 x 8 at a scale of 0.001, it rounds to a crop of none, which is resized to a black image.
    """
    for step in transform.transforms:
        if isinstance(step, RandomResizedCropAndInterpolation):
            step.get_params = _crop_of_a_pixel_at_least


def _crop_of_a_pixel_at_least(
    image: Image.Image, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
    return min(top, image.height - 1), min(left, image.width - 1), max(height, 1), max(width, 1)
