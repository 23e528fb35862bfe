"""Section evaluate, and what the evaluations of trainer/judge can be told: their settings, checked. No torch here.

An evaluation is asked for in one word with its settings behind it: accuracy, fewshot:ways=5,shots=5,
corruptions:kinds=[fog,snow],severities=[1,3], accuracy:data=my/folder,data.label_key=wnid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trainer.config.knobs import Range, check_ranges, close, knob, require

# the 15 kinds of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261), in its order
CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
ALEXNET = "alexnet"  # the reference of the published mCE
NUMBERS = "numbers"  # of AccuracyConfig.map


@dataclass(frozen=True)
class ImagesConfig:
    """Which images an evaluation is made on: what every one of them can be told."""

    data: str = knob("", "folder, hub id, digits, fractals or textures; empty = the data of the command or recipe")
    split: str = knob("", "split to measure on; empty = the validation split, else the test split, else the only one")
    image_size: int | None = knob(
        None, "side of the images in pixels; null = the model's own. Positions are resampled", Range(1, 10_000)
    )

    def __post_init__(self):
        check_ranges(self, "")


@dataclass(frozen=True)
class AccuracyConfig(ImagesConfig):
    """Classification of images whose classes are the model's, some of them, or others by name."""

    map: str = knob(
        "",
        "file of columns (.csv, .tsv, .json): class of the data, and one or more of the model that it stands for; "
        "numbers = the data's classes are called by the numbers of the model's",
    )
    unknown: Literal["refuse", "drop"] = knob(
        "refuse", "classes of the data that the model does not have: refuse them, or leave their images out"
    )


@dataclass(frozen=True)
class CorruptionsConfig(AccuracyConfig):
    """Classification of the same images corrupted."""

    kinds: tuple[str, ...] = knob(CORRUPTIONS, f"of corruption: {', '.join(CORRUPTIONS)}")
    severities: tuple[int, ...] = knob(SEVERITIES, "1 to 5")
    stored: str = knob(
        "", "folder STORED/<kind>/<severity>/<class>/ of images, as ImageNet-C is; empty = corrupt them here"
    )
    reference: str = knob(
        "",
        f"the model mCE is relative to: one of those judged, by its name; {ALEXNET} = as published; empty = the first",
    )
    side: int = knob(
        0,
        "enlarge pictures to this side before they are corrupted, and reduce them after: severities are made for 224; "
        "0 = as the model sees them, but for the 32 pixels that are the least",
        Range(0, 10_000),
    )

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.kinds), "kinds", self.kinds, "one or more kinds of corruption")
        require(bool(self.severities), "severities", self.severities, "one or more of 1 to 5")
        for kind in self.kinds:
            require(kind in CORRUPTIONS, "kinds", kind, f"a kind of corruption. {close(kind, CORRUPTIONS)}")
        for severity in self.severities:
            require(severity in SEVERITIES, "severities", severity, "1 to 5")


@dataclass(frozen=True)
class FewShotConfig(ImagesConfig):
    """k-way n-shot episodes."""

    ways: int = knob(5, "classes of an episode", Range(2, 10_000))
    shots: int = knob(5, "training images of each class", Range(1, 10_000))
    queries: int = knob(15, "images of each class that are told", Range(1, 10_000))
    episodes: int = knob(600, "episodes", Range(2, 1_000_000))
    head: Literal["mean", "linear", "finetune"] = knob(
        "mean", "nearest class mean, a linear classifier on frozen features, or training of the whole model"
    )
    epochs: int = knob(100, "passes over the training images of an episode (linear, finetune)", Range(1, 100_000))
    lr: float = knob(1.0e-4, "learning rate of finetune; that of its new head is ten times it", Range(0, 10, True))


@dataclass(frozen=True)
class FeaturesConfig(ImagesConfig):
    """What the features of a model tell of the classes of a data set it was not trained on."""


SETTINGS: dict[str, type[ImagesConfig]] = {
    "accuracy": AccuracyConfig,
    "corruptions": CorruptionsConfig,
    "fewshot": FewShotConfig,
    "knn": FeaturesConfig,
    "probe": FeaturesConfig,
}


@dataclass(frozen=True)
class Preset:
    """A known set of images: the evaluation it serves, and how it is read; a setting that is given wins.

    Attributes:
        settings: of the evaluation, and of section data with "data." in front.
        where: to get it, for whoever has not given data=FOLDER; empty where the hub id is in `settings`.
    """

    task: str
    settings: dict[str, Any]
    where: str = ""


_ON_HUB = {"data": "axiong/imagenet-r", "data.label_key": "wnid"}
PRESETS = {
    "imagenet-r": Preset("accuracy", _ON_HUB),
    "tiny-imagenet-r": Preset("accuracy", {**_ON_HUB, "unknown": "drop"}),  # the classes that Tiny-ImageNet shares
    "imagenet-a": Preset("accuracy", {}, "github.com/hendrycks/natural-adv-examples"),
    "imagenet-sketch": Preset("accuracy", {}, "github.com/HaohanWang/ImageNet-Sketch"),
    "imagenet-v2": Preset("accuracy", {"map": NUMBERS}, "github.com/modestyachts/ImageNetV2"),
    "imagenet-c": Preset("corruptions", {"reference": ALEXNET}, "github.com/hendrycks/robustness"),
    "objectnet": Preset("accuracy", {"unknown": "drop"}, "objectnet.dev"),
    "cifar-100-fewshot": Preset(
        "fewshot", {"data": "uoft-cs/cifar100", "data.image_key": "img", "data.label_key": "fine_label"}
    ),
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluations beside the one on the validation images (docs/evaluations.md)."""

    tasks: tuple[str, ...] = knob(
        (),
        f"of phase evaluate: {', '.join(SETTINGS)}, or a known set of images, each with its settings behind a colon as "
        "in fewshot:ways=5,shots=5",
    )
    resamples: int = knob(1000, "of the images, for the 95% intervals of the tasks", Range(100, 1_000_000))

    def __post_init__(self):
        check_ranges(self, "evaluate.")
