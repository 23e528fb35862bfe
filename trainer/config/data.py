"""Sections data and augment: where images come from, and what training does to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.knobs import knob, require, section


@dataclass(frozen=True)
class FractalConfig:
    """Procedural images (source fractals): every class is a random iterated function system. Nothing to download."""

    classes: int = knob(100, "classes")
    size: int = knob(64, "width and height, pixels")
    train_images: int = knob(20_000, "training images, equally many of each class")
    val_images: int = knob(2_000, "validation images, drawn from parameters the training images never take")
    difficulty: float = knob(0.5, "0 to 1: how far rotation, scale, shift and the maps themselves vary in a class")
    seed: int = knob(0, "of the data set; the recipe's own seed leaves it as it is")
    cache: str = knob("", "folder for the images; empty = M2MKD_CACHE, or ~/.cache/m2mkd")

    def __post_init__(self):
        require(2 <= self.classes <= 10_000, "data.fractals.classes", self.classes, "2 to 10,000")
        require(16 <= self.size <= 512, "data.fractals.size", self.size, "16 to 512 pixels")
        for name in ("train_images", "val_images"):
            images = getattr(self, name)
            even = images >= self.classes and images % self.classes == 0
            require(even, f"data.fractals.{name}", images, f"a multiple of data.fractals.classes={self.classes}")
        require(0 <= self.difficulty <= 1, "data.fractals.difficulty", self.difficulty, "0 to 1")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from."""

    source: Literal["digits", "fractals", "folder", "hub"] = knob(
        "digits", "embedded digits, procedural fractals, an ImageFolder, or `datasets`"
    )
    path: str = knob("", "folder (source folder), or hub id[@revision] / local path (source hub)")
    image_key: str = knob("image", "column with the image (source hub)")
    label_key: str = knob("label", "column with the label (source hub)")
    config: str = knob("", "configuration (subset) of a data set that has several (source hub); empty = its only one")
    train_split: str = knob("train", "split or sub-folder for training")
    val_split: str = knob("validation", "split or sub-folder for evaluation")
    val_share: float = knob(
        0.0,
        "share of the training images of each class that is held out for evaluation, always the same ones, where the "
        "data has no validation split (sources folder and hub); 0 = val_split is the validation split",
    )
    workers: int = knob(0, "data loading processes per rank")
    skip_unreadable: bool = knob(False, "replace an unreadable image by the next one and count it, instead of stopping")
    max_pixels: int = knob(100_000_000, "width x height of the largest image that is decoded: a guard against bombs")
    limit: int = knob(0, "use n images of each split, spread evenly over it, after val_share; 0 = all")
    fractals: FractalConfig = section(FractalConfig)

    def __post_init__(self):
        if self.source in ("folder", "hub") and not self.path:
            raise ValueError(f"data.source is {self.source!r} but data.path is empty: set data.path=FOLDER_OR_HUB_ID")
        require(0 <= self.val_share < 1, "data.val_share", self.val_share, "0 (off) to below 1, e.g. 0.1 for a tenth")
        if self.source not in ("folder", "hub"):
            expected = f"0 with data.source={self.source}, which brings its own validation images"
            require(not self.val_share, "data.val_share", self.val_share, expected)
        if self.config and self.source != "hub":
            require(False, "data.config", self.config, f"none with data.source={self.source}: only source hub has them")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(self.max_pixels >= 1, "data.max_pixels", self.max_pixels, "1 or more")
        require(self.limit >= 0, "data.limit", self.limit, "0 (all) or more")


@dataclass(frozen=True)
class AugmentConfig:
    """Training transforms and mixing, by timm's names."""

    hflip: float = knob(0.5, "probability of a horizontal flip")
    scale: tuple[float, float] = knob((0.08, 1.0), "RandomResizedCrop: share of the area")
    ratio: tuple[float, float] = knob((0.75, 4 / 3), "RandomResizedCrop: aspect ratio")
    rand_augment: str = knob("", "timm RandAugment string, e.g. rand-m9-mstd0.5-inc1; empty = off")
    color_jitter: float = knob(0.0, "colour jitter strength; unused when rand_augment is on, as in timm")
    random_erasing: float = knob(0.0, "probability of random erasing")
    mixup: float = knob(0.0, "mixup alpha; 0 = off")
    cutmix: float = knob(0.0, "cutmix alpha; 0 = off")
    switch_prob: float = knob(0.5, "probability of cutmix when both mixup and cutmix are on")
    label_smoothing: float = knob(0.0, "label smoothing of the classification loss")
    repeats: int = knob(1, "repeated augmentation: times an image stands in an epoch of unchanged length")

    def __post_init__(self):
        for name in ("hflip", "random_erasing", "switch_prob", "label_smoothing"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"augment.{name}", share, "a value from 0 to 1")
        for name in ("color_jitter", "mixup", "cutmix"):
            strength = getattr(self, name)
            require(strength >= 0, f"augment.{name}", strength, "0 (off) or more")
        require(self.repeats >= 1, "augment.repeats", self.repeats, "1 or more")
