"""Sections data and augment: where images come from, and what training does to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.knobs import MANY, SEEDS, SHARE, Range, check_ranges, knob, require, section

VALIDATION = "validation"  # the split to measure on where nobody names one
HELD_OUT = 0.1  # share of the training images where nobody has set one and there is no validation split
PROCEDURAL = ("fractals", "textures")  # sources drawn by trainer/data/drawing
BUILT_IN = ("digits", *PROCEDURAL)  # sources that read no data.path and bring validation images of their own
TRANSFORM_SETS = ("tweights", "t3a", "t3aw")  # what timm's RandAugment strings may name instead of a number


@dataclass(frozen=True)
class ProceduralConfig:
    """What every family of procedural images is asked for."""

    family = ""  # no knob: data.source, and the name of the section

    classes: int = knob(100, "classes", Range(2, 10_000))
    size: int = knob(64, "width and height, pixels", Range(16, 512))
    train_images: int = knob(20_000, "training images, equally many of each class", Range(1, MANY))
    val_images: int = knob(
        2_000, "validation images, drawn from parameters the training images never take", Range(1, MANY)
    )
    difficulty: float = knob(0.5, "0 to 1: how far the images of a class differ", SHARE)
    seed: int = knob(0, "of the data set; the recipe's own seed leaves it as it is", Range(0, SEEDS))
    cache: str = knob("", "folder for the images; empty = M2MKD_CACHE, or ~/.cache/m2mkd")

    def __post_init__(self):
        check_ranges(self, f"data.{self.family}.")
        for name in ("train_images", "val_images"):
            images = getattr(self, name)
            even = images >= self.classes and images % self.classes == 0
            expected = f"a multiple of data.{self.family}.classes={self.classes}"
            require(even, f"data.{self.family}.{name}", images, expected)


@dataclass(frozen=True)
class FractalConfig(ProceduralConfig):
    """Procedural images (source fractals): every class is a random iterated function system. Nothing to download."""

    family = "fractals"


@dataclass(frozen=True)
class TextureConfig(ProceduralConfig):
    """Procedural images (source textures): every class is a set of waves, told by its spectrum. Nothing to download."""

    family = "textures"


@dataclass(frozen=True)
class DataConfig:
    """Where images come from."""

    source: Literal["auto", "digits", "fractals", "textures", "folder", "hub"] = knob(
        "auto",
        "embedded digits, procedural fractals or textures, an ImageFolder, or `datasets`; auto = what data.path names: "
        "a folder of pictures or of tar files, one that `datasets` wrote, or a hub id; without data.path the digits",
    )
    path: str = knob("", "folder (source folder), or hub id[@revision] / local path (source hub)")
    image_key: str = knob("image", "column with the image (source hub); of tar files the extension")
    label_key: str = knob(
        "label", "column with the label (source hub); of tar files the field of KEY.json, or cls or txt"
    )
    config: str = knob("", "configuration (subset) of a data set that has several (source hub); empty = its only one")
    train_split: str = knob("train", "split or sub-folder for training; of tar files a word of their names too")
    val_split: str = knob(VALIDATION, "split or sub-folder for evaluation, likewise")
    val_share: float | None = knob(
        None,
        "share of the training images of each class that is held out for evaluation, always the same ones, where the "
        "data has no validation split (sources folder and hub), or in place of the validation images of digits, "
        "fractals and textures; null = 0.1 where nobody has named one and there is none, which a line says; 0 = "
        "val_split is the validation split",
        Range(0, 1, open_most=True),
    )
    workers: int | None = knob(
        0,
        "data loading processes per rank; null = as many as the first steps show to be needed, of the processors that "
        "do not train",
        Range(0, 1024),
    )
    skip_unreadable: bool = knob(False, "replace an unreadable image by the next one and count it, instead of stopping")
    max_pixels: int = knob(
        100_000_000, "width x height of the largest image that is decoded: a guard against bombs", Range(1, 10**12)
    )
    limit: int = knob(0, "use n images of each split, spread evenly over it, after val_share; 0 = all", Range(0, MANY))
    fractals: FractalConfig = section(FractalConfig)
    textures: TextureConfig = section(TextureConfig)

    def __post_init__(self):
        if self.source in ("folder", "hub") and not self.path:
            raise ValueError(f"data.source is {self.source!r} but data.path is empty: set data.path=FOLDER_OR_HUB_ID")
        check_ranges(self, "data.")
        source = self.source
        if source == "auto" and not self.path:
            source = "digits"
        if self.config and source not in ("hub", "auto"):
            require(False, "data.config", self.config, f"none with data.source={source}: only source hub has them")


@dataclass(frozen=True)
class AugmentConfig:
    """Training transforms and mixing, by timm's names."""

    hflip: float = knob(0.5, "probability of a horizontal flip", SHARE)
    scale: tuple[float, float] = knob((0.08, 1.0), "RandomResizedCrop: share of the area", Range(0, 1, open_least=True))
    ratio: tuple[float, float] = knob((0.75, 4 / 3), "RandomResizedCrop: aspect ratio", Range(0.01, 100.0))
    rand_augment: str = knob("", "timm RandAugment string, e.g. rand-m9-mstd0.5-inc1; empty = off")
    color_jitter: float = knob(0.0, "colour jitter strength; unused when rand_augment is on, as in timm", Range(0, 10))
    random_erasing: float = knob(0.0, "probability of random erasing", SHARE)
    mixup: float = knob(0.0, "mixup alpha; 0 = off", Range(0, 1000))
    cutmix: float = knob(0.0, "cutmix alpha; 0 = off", Range(0, 1000))
    switch_prob: float = knob(0.5, "probability of cutmix when both mixup and cutmix are on", SHARE)
    label_smoothing: float = knob(0.0, "label smoothing of the classification loss", SHARE)
    repeats: int = knob(
        1, "repeated augmentation: times an image stands in an epoch of unchanged length", Range(1, 1000)
    )

    def __post_init__(self):
        check_ranges(self, "augment.")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            require(low <= high, f"augment.{name}", (low, high), f"the smaller number first: [{high}, {low}]")
        for part in self.rand_augment.split("-")[1:]:
            # timm passes over a part without a number (rand-m trains at full strength) and over an unknown set
            has_number = any(letter.isdecimal() for letter in part)
            expected = f"a number in its part {part!r}, as in rand-m9-mstd0.5-inc1"
            require(has_number or part in TRANSFORM_SETS, "augment.rand_augment", self.rand_augment, expected)
