"""The numbers of one cell, out of its result.json and metrics.jsonl files, and of a study out of those of its cells.

Without classes the place of accuracy is taken by the explained share, 1 - relative error of the final tokens beside the
teacher's: more is better there too, 1 is the teacher itself, and 0 no better than zeros.
What a cell does not have (not run, not measured by that phase) is None. Costs are the FLOPs the phases counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from trainer.report.data import PhaseRecord, read_phase
from trainer.request.graph import artifact_name, preparation, taught_in
from trainer.study.plan import Cell, Study, Variant, other_recipe
from trainer.study.statistics import Curve, Race, Summary, at, difference, mean_curve, race, summary
from trainer.tracking.measures import ACCURACY, RELATIVE_ERROR, Measure

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
    measure: Measure = ACCURACY


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

    @property
    def explained(self) -> bool:
        """Whether some variant has no classes, so that explained shares stand in the place of its accuracies."""
        cells = [cell for of_variant in self.cells.values() for cell in of_variant.values()]
        return any(cell.measure is RELATIVE_ERROR for cell in cells)

    def curve(self, variant: str) -> list[tuple[float, Summary]]:
        """Accuracy over total cost (FLOPs)."""
        return mean_curve([cell.curve for cell in self.cells[variant].values() if cell.curve])


def collect(study: Study, cells: Sequence[Cell]) -> Results:
    """Read what the cells have left; one whose folder holds what another recipe made is missing."""
    measured: dict[str, dict[int, Measured]] = {variant.name: {} for variant in study.variants}
    others = {cell.name for cell in cells if other_recipe(cell)}
    for cell in cells:
        if cell.variant in measured and cell.name not in others:  # not a shared teacher, not a trial of tuning
            measured[cell.variant][cell.seed] = measure(cell)
    names = (cell.name for cell in cells if not cell.complete or cell.name in others)
    missing = tuple(dict.fromkeys(names))  # a shared teacher stands among the trials as well
    comparisons = []
    for variant in study.variants:
        comparisons += [_compare(measured, variant, reference) for reference in variant.references]
    return Results(study, measured, comparisons, missing)


def measure(cell: Cell) -> Measured:
    """The numbers of one cell."""
    steps = {step.name for step in cell.steps}
    train = _record(cell, artifact_name("train", start=cell.recipe.train.start))
    meta = _record(cell, "meta")
    before: dict[str, PhaseRecord] = {}
    if cell.recipe.train.start == "distilled":
        before = {name: _record(cell, name) for name in preparation(cell.recipe) if name in steps}
    measure = RELATIVE_ERROR if RELATIVE_ERROR in (meta.measure, train.measure) else ACCURACY
    key = measure.key
    hybrids = []
    if "meta" in steps:
        hybrids = [_good(measure, meta.metric(f"hybrid_{key}/{module}")) for module in range(cell.recipe.modules)]
    teaching = f"{taught_in(cell.recipe)}_"
    students = []
    for name, record in before.items():
        if name.startswith(teaching):
            students.append(_good(measure, record.metric(f"hybrid_{key}")))
    train_flops = train.value("flops")
    preparation_flops = None  # not known of weights that come from elsewhere
    if not cell.recipe.train.init:
        preparation_flops = _sum(record.value("flops") for record in before.values())
    ratio = None
    if preparation_flops is not None and train_flops:
        ratio = preparation_flops / train_flops
    half = None
    epochs = train.value("epochs")
    if epochs:
        half = at(_by_epoch(train), epochs / 2)
    records = [*before.values(), train]
    figures = {
        "teacher": _teacher(cell, meta) if measure is ACCURACY else None,
        "meta": _good(measure, meta.metric(key)),
        "hybrid_teacher_min": _least(hybrids),
        "hybrid_teacher_mean": _mean(hybrids),
        "hybrid_student_min": _least(students),
        "hybrid_student_mean": _mean(students),
        "start": _good(measure, train.metric(f"start_{key}")),
        **{f"start_{way}": _good(measure, train.metric(f"start_{key}/{way}")) for way in WAYS},
        "half": half,
        "final": _good(measure, train.metric(key)),
        "routing_change": train.metric("routing_change"),
        "expert_similarity": train.metric("expert_similarity"),
        "preparation_flops": preparation_flops,
        "train_flops": train_flops,
        "total_flops": _sum([preparation_flops, train_flops]),
        "ratio": ratio,
        "images": _sum(record.value("images_seen") for record in records),
        "seconds": _sum(record.value("seconds") for record in records),
    }
    return Measured(figures, _over_cost(train, preparation_flops), measure)


def _good(measure: Measure, value: float | None) -> float | None:
    """Accuracy as it is, a relative error as the share that is explained."""
    if value is None or measure is ACCURACY:
        return value
    return 1 - value


def _record(cell: Cell, name: str) -> PhaseRecord:
    return read_phase(cell.folder / name, with_config=False)


def _teacher(cell: Cell, meta: PhaseRecord) -> float | None:
    accuracy = None
    if cell.teacher:
        accuracy = read_phase(cell.teacher, with_config=False).metric("accuracy")
    if accuracy is None:
        accuracy = meta.metric("teacher_accuracy")
    return accuracy


def _evaluations(train: PhaseRecord) -> list[tuple[int, float, float]]:
    """(step, epochs done, accuracy) of every evaluation; of the averaged weights where those are published."""
    evaluations = []
    key = train.measure.key
    for row in train.rows:
        if row["kind"] == "eval" and row.get(key) is not None:
            value = _good(train.measure, row.get(f"{key}_ema", row[key]))
            evaluations.append((row["step"], row["epoch"], value))
    return evaluations


def _by_epoch(train: PhaseRecord) -> Curve:
    return [(epoch, accuracy) for _, epoch, accuracy in _evaluations(train)]


def _over_cost(train: PhaseRecord, preparation_flops: float | None) -> Curve:
    """(FLOPs spent so far, accuracy), only of a complete phase: its result says what a step costs."""
    flops = train.value("flops")
    steps = train.value("steps")
    if flops is None or not steps or preparation_flops is None:
        return []
    # cost after step s of S = preparation + s / S * cost of the training
    return [(preparation_flops + step * flops / steps, accuracy) for step, _, accuracy in _evaluations(train)]


def _compare(measured: Mapping[str, Mapping[int, Measured]], variant: Variant, reference: str) -> Comparison:
    ours = measured[variant.name]
    theirs = measured[reference]
    if {cell.measure for cell in [*ours.values(), *theirs.values()]} == {ACCURACY, RELATIVE_ERROR}:
        return Comparison(variant.name, reference, summary([]), summary([]), None)  # not one kind of number
    half = difference(_by_seed(ours, "half"), _by_seed(theirs, "half"))
    final = difference(_by_seed(ours, "final"), _by_seed(theirs, "final"))
    our_curves = {seed: cell.curve for seed, cell in ours.items()}
    their_curves = {seed: cell.curve for seed, cell in theirs.items()}
    return Comparison(variant.name, reference, half, final, race(our_curves, their_curves))


def _by_seed(cells: Mapping[int, Measured], key: str) -> dict[int, float | None]:
    return {seed: cell.figures[key] for seed, cell in cells.items()}


def _sum(values: Iterable[float | None]) -> float | None:
    numbers = list(values)
    if None in numbers:
        return None
    return float(math.fsum(numbers))


def _mean(values: Sequence[float | None]) -> float | None:
    if not values or None in values:
        return None
    return sum(values) / len(values)


def _least(values: Sequence[float | None]) -> float | None:
    if not values or None in values:
        return None
    return min(values)
