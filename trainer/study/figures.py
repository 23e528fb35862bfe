"""The numbers of one cell, out of its result.json and metrics.jsonl files, and of a study out of those of its cells.

What a cell does not have (not run, not measured by that phase) is None. Costs are the FLOPs the phases counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.report.data import PhaseRecord, read_phase
from trainer.request.graph import artifact_name, preparation, taught_in
from trainer.study.plan import Cell, Study, Variant
from trainer.study.statistics import Curve, Race, Summary, at, difference, mean_curve, race, summary

WAYS = ("drop", "keep", "fold")  # to assemble the student; phase train measures each
FIGURES = {
    "teacher": "teacher",
    "meta": "meta model",
    "hybrid_teacher_min": "teacher hybrids, min",
    "hybrid_teacher_mean": "teacher hybrids, mean",
    "hybrid_student_min": "student hybrids, min",
    "hybrid_student_mean": "student hybrids, mean",
    "start": "assembled",
    **{f"start_{way}": f"assembled, {way}" for way in WAYS},
    "half": "50% of the epochs",
    "final": "100% of the epochs",
    "routing_change": "tokens that change their expert between the last two evaluations",
    "expert_similarity": "similarity of the experts",
    "preparation_flops": "preparation",
    "train_flops": "end to end",
    "total_flops": "together",
    "ratio": "preparation / end to end",
    "images": "images seen",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Measured:
    """One finished or half-finished cell: figures by the keys of FIGURES, and accuracy over total cost (FLOPs)."""

    figures: Mapping[str, float | None]
    curve: Curve = ()


@dataclass(frozen=True)
class Comparison:
    """A variant against a reference, seed by seed: half-way and at the end of the epochs, and at equal total cost."""

    variant: str
    reference: str
    half: Summary
    final: Summary
    race: Race | None


@dataclass(frozen=True)
class Results:
    """Everything the tables and plots of a study show."""

    study: Study
    cells: Mapping[str, Mapping[int, Measured]]  # variant -> seed -> its numbers
    comparisons: Sequence[Comparison]
    missing: Sequence[str] = field(default_factory=tuple)  # cells that are not complete

    def of(self, variant: str, key: str) -> Summary:
        """A figure over the seeds."""
        return summary([cell.figures[key] for cell in self.cells[variant].values()])

    def curve(self, variant: str) -> list[tuple[float, Summary]]:
        """Accuracy over total cost (FLOPs)."""
        return mean_curve([cell.curve for cell in self.cells[variant].values() if cell.curve])


def collect(study: Study, cells: Sequence[Cell]) -> Results:
    """Read what the cells have left."""
    found: dict[str, dict[int, Measured]] = {variant.name: {} for variant in study.variants}
    for cell in cells:
        if cell.variant in found:
            found[cell.variant][cell.seed] = measure(cell)
    missing = tuple(cell.name for cell in cells if not cell.complete)
    comparisons = [
        _compare(found, variant, reference) for variant in study.variants for reference in variant.references
    ]
    return Results(study, found, comparisons, missing)


def measure(cell: Cell) -> Measured:
    """The numbers of one cell."""
    made = {step.name for step in cell.steps}
    train_name = artifact_name("train", start=cell.recipe.train.start)
    train, meta = _record(cell, train_name), _record(cell, "meta")
    names = (
        [name for name in preparation(cell.recipe) if name in made] if cell.recipe.train.start == "distilled" else []
    )
    before = [_record(cell, name) for name in names]
    hybrids = [meta.metric(f"hybrid_accuracy/{i}") for i in range(cell.recipe.modules)] if "meta" in made else []
    taught = taught_in(cell.recipe)
    students = [
        record.metric("hybrid_accuracy") for name, record in zip(names, before) if name.startswith(taught + "_")
    ]
    own = train.value("flops")
    spent = None if cell.recipe.train.init else _sum(record.value("flops") for record in before)
    curve, epochs = _by_epoch(train), train.value("epochs")
    figures = {
        "teacher": _teacher(cell, meta),
        "meta": meta.metric("accuracy"),
        "hybrid_teacher_min": _least(hybrids),
        "hybrid_teacher_mean": _mean(hybrids),
        "hybrid_student_min": _least(students),
        "hybrid_student_mean": _mean(students),
        "start": train.metric("start_accuracy"),
        **{f"start_{way}": train.metric(f"start_accuracy/{way}") for way in WAYS},
        "half": at(curve, epochs / 2) if epochs else None,
        "final": train.metric("accuracy"),
        "routing_change": train.metric("routing_change"),
        "expert_similarity": train.metric("expert_similarity"),
        "preparation_flops": spent,
        "train_flops": own,
        "total_flops": _sum([spent, own]),
        "ratio": spent / own if spent is not None and own else None,
        "images": _sum(record.value("images_seen") for record in (*before, train)),
        "seconds": _sum(record.value("seconds") for record in (*before, train)),
    }
    return Measured(figures, _over_cost(train, spent))


def _record(cell: Cell, name: str) -> PhaseRecord:
    return read_phase(cell.folder / name, with_config=False)


def _teacher(cell: Cell, meta: PhaseRecord) -> float | None:
    own = read_phase(cell.teacher, with_config=False).metric("accuracy") if cell.teacher else None
    return meta.metric("teacher_accuracy") if own is None else own


def _evaluations(train: PhaseRecord) -> list[tuple[int, float, float]]:
    """(step, epochs done, accuracy) of every evaluation; of the averaged weights where those are published."""
    return [
        (row["step"], row["epoch"], row.get("accuracy_ema", row["accuracy"]))
        for row in train.rows
        if row["kind"] == "eval" and row.get("accuracy") is not None
    ]


def _by_epoch(train: PhaseRecord) -> Curve:
    return [(epoch, accuracy) for _, epoch, accuracy in _evaluations(train)]


def _over_cost(train: PhaseRecord, spent: float | None) -> Curve:
    """Only of a complete phase: its result says what a step costs."""
    flops, steps = train.value("flops"), train.value("steps")
    if flops is None or not steps or spent is None:
        return []
    return [(spent + step * flops / steps, accuracy) for step, _, accuracy in _evaluations(train)]


def _compare(found: Mapping[str, Mapping[int, Measured]], variant: Variant, reference: str) -> Comparison:
    ours, theirs = found[variant.name], found[reference]
    half, final = (
        difference({s: c.figures[key] for s, c in ours.items()}, {s: c.figures[key] for s, c in theirs.items()})
        for key in ("half", "final")
    )
    curves = ({seed: cell.curve for seed, cell in side.items()} for side in (ours, theirs))
    return Comparison(variant.name, reference, half, final, race(*curves))


def _sum(values: Any) -> float | None:
    there = list(values)
    return None if None in there else float(math.fsum(there))


def _mean(values: Sequence[float | None]) -> float | None:
    return None if not values or None in values else sum(values) / len(values)


def _least(values: Sequence[float | None]) -> float | None:
    return None if not values or None in values else min(values)


@dataclasses.dataclass(frozen=True)
class Plot:
    """Curves that share axes: label -> points (cost in `unit` FLOPs, accuracy over the seeds)."""

    title: str
    unit: str
    curves: dict[str, list[tuple[float, Summary]]]
