"""One request for a plan: which recipe on which nodes. Checked without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.recipe import Recipe

PLAN = "plan"  # the word --phase takes
PLAN_HELP = "say what each phase needs and takes on --nodes of --gpus, with settings that fit; starts nothing"
# categories: COCO's; busiest: an assumption
DEFAULTS = {"nodes": 1, "gpus": 8, "gpu": "h200", "classes": 1000, "categories": 80, "busiest": 1.5}
MOST = {"nodes": 100_000, "gpus": 256, "images": 10**12, "classes": 10**7, "box-images": 10**12, "categories": 10**7}


@dataclass(frozen=True)
class PlanRequest:
    """A checked request.

    Attributes:
        ds_values: the DeepSpeed JSON as read; None = propose one.
        gpu: as trainer.config.gpus.parse takes it.
        images: training images, where the data is not to be opened.
        box_images: training images of phase detect, where theirs are not to be opened.
        busiest: rows of the busiest rank over the mean, where ranks share experts.
        out: a run folder whose finished teacher is looked at; None = none.
    """

    recipe: Recipe
    ds_values: dict[str, Any] | None
    nodes: int
    gpus: int
    gpu: str
    images: int | None
    classes: int
    box_images: int | None
    categories: int
    busiest: float
    out: Path | None
    command: str


def whole(flag: str, text: str | int | None) -> int | None:
    """A number behind a flag.

    Raises:
        ValueError: it is none, or out of range.
    """
    if text is None:
        return None
    most = MOST[flag]
    is_number = str(text).isascii() and str(text).isdecimal()
    if not is_number or not 1 <= int(text) <= most:
        raise ValueError(f"--{flag} is {text}, expected a whole number from 1 to {most:,}")
    return int(text)


def over_the_mean(text: str | float) -> float:
    """What --busiest says.

    Raises:
        ValueError: no number from 1 to 1000.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 1 <= value <= 1000:
        raise ValueError(f"--busiest is {text}, expected a number from 1 (an even load) to 1000")
    return value
