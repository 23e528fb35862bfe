"""What a teacher expects of its images (size, crop, interpolation, mean, std); student and meta model share it.

Evaluation resizes to `resize_size` (crop_mode "center": the shorter side; "squash": both sides, aspect ratio lost),
cuts the middle `image_size` square and normalises values in 0..1 by mean and std.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

MIN_CROP_PCT = 0.05  # below, an image is blown up to many times what is used of it
CROP_MODES = ("center", "squash")
MEAN_RANGE = (-1.0, 2.0)  # of pixels in 0..1; statistics of 0..255, or of pixels rescaled twice, lie far outside
STD_RANGE = (0.01, 100.0)
# PIL's Image.Resampling numbers, as preprocessor_config.json stores them
INTERPOLATIONS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


@dataclass(frozen=True)
class Preprocessing:
    """Image settings of a model, checked.

    Raises:
        ValueError: naming the setting that is out of range, its value, and what is expected.
    """

    image_size: int  # side of the square image the model sees, pixels
    mean: tuple[float, ...]  # per channel, of values in 0..1
    std: tuple[float, ...]
    interpolation: str = "bicubic"  # one of INTERPOLATIONS
    crop_pct: float = 1.0  # image_size / side after resizing
    crop_mode: str = "center"  # "center" keeps the aspect ratio, "squash" resizes both sides to one length
    in_chans: int = 3

    def __post_init__(self) -> None:
        # lists come in from JSON; equality and hashing need tuples
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.image_size < 1:
            raise ValueError(f"preprocessing image_size must be at least 1, got {self.image_size}.")
        if not MIN_CROP_PCT <= self.crop_pct <= 1:
            raise ValueError(f"preprocessing crop_pct is {self.crop_pct}, expected {MIN_CROP_PCT} to 1.")
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"preprocessing crop_mode {self.crop_mode!r} is not one of {', '.join(CROP_MODES)}.")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ValueError(f"preprocessing interpolation {self.interpolation!r} is not one of {known}.")
        if not len(self.mean) == len(self.std) == self.in_chans:
            raise ValueError(
                f"preprocessing needs {self.in_chans} values of mean and std (in_chans), "
                f"got mean {self.mean} and std {self.std}."
            )
        if not plausible(self.mean, self.std):
            raise ValueError(
                f"preprocessing has mean {self.mean} and std {self.std}, expected those of pixels in 0..1: mean from "
                f"{MEAN_RANGE[0]:g} to {MEAN_RANGE[1]:g}, std from {STD_RANGE[0]:g} to {STD_RANGE[1]:g}. Divide "
                f"statistics of 0..255 by 255."
            )

    @property
    def resize_size(self) -> int:
        """Side in pixels before the crop, as timm computes it: floor(image_size / crop_pct)."""
        return math.floor(self.image_size / self.crop_pct)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML; `from_dict` gives an equal Preprocessing back."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """What `to_dict` gave.

        Raises:
            ValueError: unknown keys, or settings out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = set(values) - known
        if unknown:
            raise ValueError(f"unknown preprocessing keys {sorted(unknown)}; known: {sorted(known)}.")
        return cls(**values)


def plausible(mean: tuple[float, ...], std: tuple[float, ...]) -> bool:
    """Whether these can be statistics of pixels in 0..1 (a value that is not finite is not)."""
    means_fit = all(MEAN_RANGE[0] <= value <= MEAN_RANGE[1] for value in mean)
    stds_fit = all(STD_RANGE[0] <= value <= STD_RANGE[1] for value in std)
    return means_fit and stds_fit


def crop_pct_of(image_size: int, resize_size: int) -> float:
    """The crop_pct whose floored resize is exactly `resize_size` (image_size / resize_size may miss it by rounding).

    Args:
        image_size, resize_size: sides in pixels after and before the crop.
    """
    crop_pct = image_size / resize_size
    # the next smaller floats, until floor(image_size / crop_pct) is large enough
    while math.floor(image_size / crop_pct) < resize_size:
        crop_pct = math.nextafter(crop_pct, 0.0)
    return crop_pct
