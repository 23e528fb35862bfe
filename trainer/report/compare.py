"""The page that puts several runs side by side: key figures, curves, and where their recipes differ."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.report.charts import BarChart, Line, LineChart, in_flop_units
from trainer.report.data import (
    DETECTORS,
    RUNS,
    PhaseRecord,
    cost_curve,
    hybrids,
    peak_memory,
    read_analysis,
    read_phases,
    run_measure,
    speed,
    student_reached,
    teacher_accuracy,
    total,
)
from trainer.report.detectors import best_detector, detectors_of
from trainer.report.page import duration, figure, figures, flops, gigabytes, page, percent, reading, table, tick
from trainer.report.warnings import expected, warnings
from trainer.tracking.measures import ACCURACY, Measure

Phases = Mapping[str, PhaseRecord]


def comparison_page(folders: Sequence[Path]) -> str:
    """The page of several run folders, in the order given.

    Raises:
        ValueError: when one of the folders holds no phase, or one is given twice.
    """
    runs = dict(zip(_names(folders), (read_phases(folder) for folder in folders)))
    sections = {
        "Key figures": _figures(runs),
        "Learning curves": _curves(runs),
        "Modules": _modules(runs),
        "Differences of the recipes": _differences(runs),
    }
    return page(f"{len(runs)} runs compared", [f'<p class="verdict">{_verdict(runs)}</p>'], sections)


def _names(folders: Sequence[Path]) -> list[str]:
    """A short name per run folder, with as much of its path as tells it from the others."""
    paths = [folder.resolve().parts for folder in folders]
    longest = max(len(parts) for parts in paths)
    for length in range(1, longest + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same folder is given twice: {', '.join(map(str, folders))}")


def _verdict(runs: Mapping[str, Phases]) -> str:
    measure = _common_measure(runs)
    if measure is None:
        return "Some students tell classes and others give features: no one measure says which is best."
    reached = {name: student_reached(phases) for name, phases in runs.items()}
    known = [(measure.score(value), name) for name, value in reached.items() if value is not None]
    ranked = sorted(known, reverse=True)
    if not ranked:
        return _verdict_on_detectors(runs)
    best, best_name = ranked[0]
    text = f"The best student is that of <b>{escape(best_name)}</b> with {measure.shown(reached[best_name])}"
    if len(ranked) == 1:
        return f"{text}."
    second, _ = ranked[1]
    if measure is ACCURACY:
        return f"{text}, {100 * (best - second):.1f} points above the next."
    return f"{text} relative error, {best - second:.3g} below the next."


def _verdict_on_detectors(runs: Mapping[str, Phases]) -> str:
    """Of runs without a finished student."""
    best = {name: best_detector(detectors_of(phases)) for name, phases in runs.items()}
    known = [(found[1], name) for name, found in best.items() if found is not None]
    if not known:
        return "No student is trained to the end yet."
    reached, name = max(known)
    return f"The best detector is that of <b>{escape(name)}</b> with {percent(reached)} AP of boxes."


def _common_measure(runs: Mapping[str, Phases]) -> Measure | None:
    """What all of these runs are judged by; None where they differ."""
    measures = {run_measure(phases) for phases in runs.values()}
    return measures.pop() if len(measures) == 1 else None


def _figures(runs: Mapping[str, Phases]) -> str:
    columns = list(runs.values())
    measure = _common_measure(runs)
    what = measure.name if measure else "accuracy or relative error"
    rows = [
        [f"student's {what}", *(reading(run_measure(phases), student_reached(phases)) for phases in columns)],
        ["teacher's accuracy", *(percent(teacher_accuracy(phases)) for phases in columns)],
        [f"meta model's {what}", *(_record_reading(phases["meta"]) for phases in columns)],
    ]
    for run, name in RUNS.items():
        records = [phases.get(run) for phases in columns]
        if run != "train" and any(records):
            rows.append([f"student from {name}", *map(_record_reading, records)])
    for name in DETECTORS:
        records = [phases.get(name) for phases in columns]
        if any(records):
            rows.append([f"AP of {name}", *map(_record_reading, records)])
    ends = [phases["train"] for phases in columns]
    rows.append(["epochs end to end", *(_shown(end.value("epochs")) for end in ends)])
    rows.append(["global batch", *(_shown(end.value("global_batch")) for end in ends)])
    rows.append(["ranks (expert parallel)", *map(_ranks, ends)])
    rows.append(["FLOPs, all of m2mKD", *(flops(total(phases, "train", "flops")) for phases in columns)])
    rows.append(["time, all of m2mKD", *(duration(total(phases, "train", "seconds")) for phases in columns)])
    rows.append(["images/s end to end", *(_shown(speed(end)) for end in ends)])
    rows.append(["peak memory of a rank", *(gigabytes(peak_memory(end)) for end in ends)])
    rows.append(["phases complete", *map(_complete, columns)])
    counts = [len(warnings(phases, read_analysis(phases))) for phases in columns]
    rows.append(["warnings", *map(str, counts)])
    return table(["", *map(escape, runs)], rows)


def _record_reading(record: PhaseRecord | None) -> str:
    return "–" if record is None else reading(record.measure, record.reached)


def _ranks(end: PhaseRecord) -> str:
    return f"{_shown(end.value('world_size'))} ({_shown(end.value('ep_size'))})"


def _complete(phases: Phases) -> str:
    names = expected(phases)
    done = sum(phases[name].status == "done" for name in names)
    return f"{done} of {len(names)}"


def _curves(runs: Mapping[str, Phases]) -> str:
    """Of the runs whose student is measured; a run keeps its colour in every picture."""
    measure = _common_measure(runs)
    if measure is None:
        return ""
    by_epochs = []
    by_cost = []
    losses = []
    for colour, (name, phases) in enumerate(runs.items()):
        end = phases["train"]
        curve = list(end.curve().items())
        if not curve:
            continue
        by_epochs.append(Line(name, curve, colour, marks=True))
        losses.append(Line(name, end.series("loss"), colour))
        priced = cost_curve(phases, "train")
        if priced:
            by_cost.append(Line(name, priced, colour, marks=True))
    pictures = []
    if by_epochs:
        chart = LineChart(f"Student's {measure.name} by epochs", by_epochs, "epochs", measure.name, tick(measure))
        pictures.append(figure(chart, "End-to-end training of the m2mKD student of each run."))
    if by_cost:
        lines, _, unit = in_flop_units(by_cost)
        chart = LineChart(f"Student's {measure.name} by total cost", lines, unit, measure.name, tick(measure))
        pictures.append(figure(chart, "Meta model and modules count; the teacher's own training does not."))
    if any(line.points for line in losses):
        chart = LineChart("Training loss", losses, "optimiser step", "loss", from_zero=False)
        pictures.append(figure(chart, "Comparable only where the recipes agree on labels and mixing."))
    return figures(pictures)


def _modules(runs: Mapping[str, Phases]) -> str:
    measure = _common_measure(runs)
    if measure is None:
        return ""
    accuracies_of: list[list[float | None]] = []  # run -> module -> its student's
    for phases in runs.values():
        accuracies_of.append([student for _, _, student in hybrids(phases)])
    # a run of fewer modules has no bars further on
    by_module = itertools.zip_longest(*accuracies_of)
    groups = [(str(module), accuracies) for module, accuracies in enumerate(by_module)]
    if all(accuracy is None for _, accuracies in groups for accuracy in accuracies):
        return ""
    names = [(name, colour) for colour, name in enumerate(runs)]
    title = "Student modules inside their meta model"
    chart = BarChart(title, groups, names, "module", measure.name, tick(measure))
    caption = f"{measure.name.capitalize()} of the meta model with one module replaced by the student's."
    return figures([figure(chart, caption)])


def _differences(runs: Mapping[str, Phases]) -> str:
    recipes = [dict(_flat(_recipe(phases), "")) for phases in runs.values()]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = []
    for key in keys:
        values = [str(recipe.get(key, "–")) for recipe in recipes]
        if len(set(values)) > 1:
            breakable = escape(key).replace(".", ".<wbr>")
            rows.append([f"<code>{breakable}</code>", *map(escape, values)])
    if not rows:
        return "<p>The recipes agree on every key.</p>"
    return table(["key", *map(escape, runs)], rows)


def _recipe(phases: Phases) -> Mapping[str, Any]:
    """As the last phase of the run used it."""
    recipes = [record.config.get("recipe") for record in phases.values()]
    return next((recipe for recipe in reversed(recipes) if isinstance(recipe, dict)), {})


def _flat(values: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
