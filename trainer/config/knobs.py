"""What a knob of a recipe is: a dataclass field with its one line of help, its range, and the check of its value.

Every knob that is a number says its range where it is declared; the check, `--help`, docs/reference.md and the sweep of
the tests read it there.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Limits that stop no work anybody does: what lies beyond is a slip of the keyboard, and would end in an overflow.
MANY = 1_000_000_000  # steps, images, rows
STRONG = 1e6  # weights of a loss, factors, strengths
SEEDS = 2**31 - 1  # numpy takes 32 bits, and the draws of a rank are counted on from the seed


@dataclass(frozen=True)
class Range:
    """The values a number may have; of a list, each of its numbers."""

    least: float
    most: float
    open_least: bool = False  # whether the limit itself is outside
    open_most: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value lies inside."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        high_enough = value > self.least if self.open_least else value >= self.least
        low_enough = value < self.most if self.open_most else value <= self.most
        return high_enough and low_enough

    def __str__(self) -> str:
        """As in messages and help: 0 to 1, above 0 and at most 1, 0 to below 1."""
        most = f"below {_number(self.most)}" if self.open_most else _number(self.most)
        if not self.open_least:
            return f"{_number(self.least)} to {most}"
        return f"above {_number(self.least)} and {'' if self.open_most else 'at most '}{most}"


SHARE = Range(0, 1)
WEIGHT = Range(0, STRONG)


def knob(default: Any, help: str, range: Range | None = None) -> Any:
    """A dataclass field with its one line of documentation (what it is, and its unit) and, of a number, its range."""
    return field(default=default, metadata={"help": help, "range": range})


def section(cls: type) -> Any:
    """A nested dataclass built from its own defaults."""
    return field(default_factory=cls)


def require(good: bool, name: str, value: Any, expected: str) -> None:
    """Raise a ValueError that names the key, its value and what was expected, unless `good`."""
    if not good:
        raise ValueError(f"{name} is {shown(value)}, expected {expected}")


def check_ranges(config: Any, where: str) -> None:
    """Check each number of a section against the range of its knob; null is no number, and in no range.

    Args:
        where: the section's name with a dot behind it, as in data.fractals.

    Raises:
        ValueError: a value outside; key, value and range are named.
    """
    for item in dataclasses.fields(config):
        limits = item.metadata.get("range")
        value = getattr(config, item.name)
        if limits is None or value is None:
            continue
        if not isinstance(value, tuple):
            require(limits.holds(value), where + item.name, value, str(limits))
            continue
        for i, number in enumerate(value):
            require(limits.holds(number), f"{where}{item.name}[{i}]", number, str(limits))


def check_heads(section: str, width: int, heads: int) -> None:
    """Attention shares a width out evenly. Raises ValueError when these heads do not divide it."""
    require(width % heads == 0, f"{section}.heads", heads, f"a divisor of {section}.width={width}")


def shown(value: Any) -> str:
    """A value in an error message, cut to a line however large it is."""
    return _SHORT.repr(value)


def close(word: str, known: Sequence[str], otherwise: str = "", most: int = 3) -> str:
    """The end of a message about an unknown word.

    Returns:
        "Did you mean ...?" with `most` close ones at most, else `otherwise`, by default all that are known.
    """
    near = difflib.get_close_matches(word, known, n=most)
    if near:
        return f"Did you mean {', '.join(near)}?"
    return otherwise or f"Known: {', '.join(known)}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = 100
_SHORT.maxother = 100
_SHORT.maxlevel = 1  # a few lines of YAML with aliases make lists whose plain repr would fill the memory


def _number(limit: float) -> str:
    """1,000,000 and 0.5, as people write them."""
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:,g}"
