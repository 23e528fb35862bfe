"""The forms in which a trained student can be used, faster or more exact than the one that it was trained in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


def _nothing() -> None:
    """What most forms need before a forward."""


@dataclass(frozen=True)
class StudentForm:
    """One of them.

    Attributes:
        name: for tables, behind "student, ".
        model: forms may share one, or its weights.
        prepare: is called before the forwards of this form, where another one may have come between.
        trained: whether it is the one that was trained.
        kept: share of the student that is kept, as "50%"; empty where nothing is cut off.
    """

    name: str
    model: nn.Module
    prepare: Callable[[], None] = _nothing
    trained: bool = False
    kept: str = ""
