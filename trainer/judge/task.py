"""What every evaluation has in common: a file of this folder with `prepare`, found by the name of the evaluation.

    def prepare(subject: Subject, spec: TaskSpec, bench: Bench) -> Callable[[], Measured]

`prepare` opens the images and refuses whatever cannot be measured; what it returns measures. So everything that is
asked for is checked before anything is computed. Both are collective.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trainer.config.tasks import TaskSpec
from trainer.judge.intervals import Figure
from trainer.judge.outputs import Bench
from trainer.judge.subjects import Subject

Prepare = Callable[[Subject, TaskSpec, Bench], Callable[[], "Measured"]]


@dataclass(frozen=True)
class Measured:
    """What one evaluation says of one model.

    Attributes:
        figures: by name, in the order they are shown. A name that begins with "error" or "confidence" is better low.
        images: images, or episodes, that were counted.
        what: what was counted and how, in one line for people.
        details: plain values for judged.json and the pictures.
    """

    figures: dict[str, Figure]
    images: int
    what: str
    details: dict[str, Any] = field(default_factory=dict)


def prepare_of(kind: str) -> Prepare:
    """`prepare` of an evaluation."""
    return importlib.import_module(f"trainer.judge.{kind}").prepare
