"""What a picture becomes: for training augment.py, in evaluation models/pictures/transform.py."""

from models.pictures.transform import Transform, create_options, eval_transform
from models.preprocessing import Preprocessing
from trainer.config.data import AugmentConfig
from trainer.data.augment import TrainTransform

__all__ = ["Transform", "eval_transform", "train_transform"]


def train_transform(pre: Preprocessing, aug: AugmentConfig) -> TrainTransform:
    """RandomResizedCrop, flip, RandAugment or colour jitter, normalisation, random erasing, in timm's order.

    Draws from `random`, numpy and torch, all three.

    Returns:
        PIL RGB image -> float32 (C, image_size, image_size); its parts, for a batch, are in augment.py.

    Raises:
        ValueError: timm does not understand `augment.rand_augment`; images of other than 3 channels.
    """
    create_options(pre)  # what it refuses has nothing to do with RandAugment
    try:
        return TrainTransform(pre, aug)
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"augment.rand_augment={aug.rand_augment!r} is not understood by timm ({error}); "
            "expected something like rand-m9-mstd0.5-inc1, or empty for none."
        ) from error
