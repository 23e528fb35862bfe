"""What a detector is: its sizes, its categories and how it looks at images. No torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..preprocessing import Preprocessing

MODEL_TYPE = "m2mkd_detector"  # in config.json


@dataclass(frozen=True)
class DetectorConfig:
    """A detector, without its backbone. The defaults are RF-DETR Base (Robinson et al. 2025, arXiv 2511.09554).

    Raises:
        ValueError: naming the field, its value, and what is expected.
    """

    categories: tuple[str, ...]  # names, in the order of the logits
    category_ids: tuple[int, ...]  # of the annotation files, in the same order
    preprocessing: Preprocessing  # mean, std and interpolation count; the size does not
    masks: bool = False  # tells a mask of every object as well
    shorter_side: int = 560  # pixels that images are resized to, keeping their shape ...
    longest_side: int = 896  # ... unless the longer side would exceed this
    width: int = 256
    queries: int = 300  # objects it can tell in an image, at most
    groups: int = 13  # of queries in training, each matched by itself (Group DETR)
    layers: int = 3  # of the decoder
    heads: int = 8
    mlp_dim: int = 2048
    dropout: float = 0.0
    maps: int = 4  # blocks of the backbone that are read, evenly spread; the last one is among them
    window: int = 0  # side of the windows that attention stays inside, patches; 0 = attention is global everywhere
    global_blocks: int = 4  # blocks without windows, evenly spread (Li et al. 2022, ViTDet)

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", tuple(self.categories))  # lists come in from JSON
        object.__setattr__(self, "category_ids", tuple(self.category_ids))
        if isinstance(self.preprocessing, Mapping):
            object.__setattr__(self, "preprocessing", Preprocessing.from_dict(self.preprocessing))
        if not self.categories or len(self.categories) != len(self.category_ids):
            raise ValueError(
                f"a detector needs a name and an id for every category, got {len(self.categories)} names and "
                f"{len(self.category_ids)} ids."
            )
        for name in ("shorter_side", "longest_side", "width", "queries", "groups", "layers", "heads", "maps"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 100_000:
                raise ValueError(f"detector {name} must be a whole number from 1 to 100,000, got {value!r}.")
        # transformers' sine embedding of a box takes an even number of channels per coordinate
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"detector width must be a multiple of 4 and of heads {self.heads}, got {self.width}.")
        if self.longest_side < self.shorter_side:
            raise ValueError(f"detector longest_side {self.longest_side} is below shorter_side {self.shorter_side}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` gives an equal configuration back."""
        return {**asdict(self), "preprocessing": self.preprocessing.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DetectorConfig":
        """What `to_dict` gave.

        Raises:
            ValueError: unknown keys, or values that make no detector.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown detector settings {sorted(unknown)}.")
        return cls(**values)
