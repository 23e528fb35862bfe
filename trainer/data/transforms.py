"""PIL image -> normalised tensor, by timm's own transforms and by what the teacher expects of its images."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment, create_transform

from models.preprocessing import Preprocessing
from trainer.config.data import AugmentConfig

Transform = Callable[[Image.Image], torch.Tensor]


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
            **_shared(pre),
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
    return transform


def eval_transform(pre: Preprocessing) -> Transform:
    """Resize, centre crop and normalise as the teacher's own evaluation. Draws nothing.

    Returns:
        PIL RGB image -> float32 (C, image_size, image_size).
    """
    return create_transform(**_shared(pre), is_training=False, crop_pct=pre.crop_pct, crop_mode=pre.crop_mode)


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


def _shared(pre: Preprocessing) -> dict:
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
