"""What a knob of a recipe is: a dataclass field with its one line of help, and the check of its value."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def knob(default: Any, help: str) -> Any:
    """A dataclass field with its one line of documentation (what it is, and its unit)."""
    return field(default=default, metadata={"help": help})


def section(cls: type) -> Any:
    """A nested dataclass built from its own defaults."""
    return field(default_factory=cls)


def require(good: bool, name: str, value: Any, expected: str) -> None:
    """Raise a ValueError that names the key, its value and what was expected, unless `good`."""
    if not good:
        raise ValueError(f"{name} is {value!r}, expected {expected}")
