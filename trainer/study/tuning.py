"""Which choice of a variant's grid is best, by the trials that plan.trials lists, and what the grid looked like.

The choice is made by the accuracy at the end of training on held-out training images, the mean over the seeds of
tuning; of equal ones the first in the grid is taken. The validation images of the study have no part in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.report.data import read_phase
from trainer.study.figures import measure
from trainer.study.plan import Cell, Study, Variant, other_recipe
from trainer.study.statistics import Summary, summary


@dataclass(frozen=True)
class Trial:
    """One choice of a grid and how well it did on the held-out images."""

    overrides: tuple[str, ...]
    accuracy: Summary  # over the seeds of tuning


@dataclass(frozen=True)
class Tuned:
    """The grid of one variant."""

    variant: str
    trials: tuple[Trial, ...]
    best: int | None  # place of the best trial; None until all are complete
    edges: tuple[str, ...]  # overrides of the best that are the least or largest of their key: better may lie beyond
    flops: float | None  # of all trials, what they share counted once and teachers not; None until all are complete

    @property
    def chosen(self) -> tuple[str, ...]:
        """Overrides of the best trial."""
        return () if self.best is None else self.trials[self.best].overrides


def tuned(study: Study, trials: Sequence[Cell]) -> list[Tuned]:
    """Read what the trials have left, in the order of the variants."""
    return [_of_variant(variant, trials) for variant in study.variants if variant.grid]


def chosen(grids: Sequence[Tuned]) -> dict[str, tuple[str, ...]]:
    """Variant -> overrides of its best choice, where that is known."""
    return {grid.variant: grid.chosen for grid in grids if grid.best is not None}


def edge_warnings(grids: Sequence[Tuned]) -> list[str]:
    """One line for every variant whose best choice lies at the edge of its grid."""
    return [
        f"{grid.variant}: the best of its grid lies at the edge, {', '.join(grid.edges)}: widen tune there"
        for grid in grids
        if grid.edges
    ]


def _of_variant(variant: Variant, trials: Sequence[Cell]) -> Tuned:
    ours = [cell for cell in trials if cell.tunes == variant.name]
    readable = [cell for cell in ours if not other_recipe(cell)]
    tried = []
    for choice in variant.grid:
        finals = [measure(cell).figures["final"] for cell in readable if cell.choice == choice]
        tried.append(Trial(choice, summary(finals)))
    best = None
    edges: tuple[str, ...] = ()
    flops = None
    if readable == ours and all(cell.complete for cell in ours):
        means = [trial.accuracy.mean for trial in tried]
        if None not in means:
            best = max(range(len(means)), key=means.__getitem__)
            edges = _edges(variant.grid, variant.grid[best])
        flops = _flops(ours)
    return Tuned(variant.name, tuple(tried), best, edges, flops)


def _edges(grid: Sequence[Sequence[str]], best: Sequence[str]) -> tuple[str, ...]:
    """The overrides of `best` whose number is the least or the largest that the grid tries of that key."""
    edges = []
    for text in best:
        key, _, value = text.partition("=")
        numbers = {number for choice in grid for name, number in _numbers(choice).items() if name == key}
        if len(numbers) > 1 and json.loads(value) in (min(numbers), max(numbers)):
            edges.append(text)
    return tuple(edges)


def _numbers(choice: Sequence[str]) -> Mapping[str, float]:
    """Key -> value of the overrides that are numbers."""
    numbers = {}
    for text in choice:
        key, _, value = text.partition("=")
        number = json.loads(value)
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            numbers[key] = number
    return numbers


def _flops(cells: Sequence[Cell]) -> float | None:
    """Of what the trials made; artifacts that several of them need were made once."""
    counted: dict[str, float | None] = {}
    for cell in cells:
        for step in cell.steps:
            if step.phase not in ("teacher", "assemble"):
                counted[cell.keys[step.name]] = read_phase(cell.folder / step.name, with_config=False).value("flops")
    if None in counted.values():
        return None
    return sum(counted.values())
