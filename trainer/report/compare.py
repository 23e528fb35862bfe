"""The page that puts several runs side by side: key figures, curves, and where their recipes differ."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.report.charts import BarChart, Line, LineChart, in_flop_units
from trainer.report.data import (
    RUNS,
    PhaseRecord,
    cost_curve,
    hybrids,
    peak_memory,
    read_analysis,
    read_phases,
    speed,
    student_accuracy,
    teacher_accuracy,
    total,
)
from trainer.report.page import duration, figure, figures, flops, gigabytes, page, percent, percent_tick, table
from trainer.report.warnings import expected, warnings

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
    accuracies = {name: student_accuracy(phases) for name, phases in runs.items()}
    known = [(accuracy, name) for name, accuracy in accuracies.items() if accuracy is not None]
    ranked = sorted(known, reverse=True)
    if not ranked:
        return "No student is trained to the end yet."
    best, best_name = ranked[0]
    text = f"The best student is that of <b>{escape(best_name)}</b> with {percent(best)}"
    if len(ranked) == 1:
        return f"{text}."
    second, _ = ranked[1]
    return f"{text}, {100 * (best - second):.1f} points above the next."


def _figures(runs: Mapping[str, Phases]) -> str:
    columns = list(runs.values())
    rows = [
        ["student's accuracy", *(percent(student_accuracy(phases)) for phases in columns)],
        ["teacher's accuracy", *(percent(teacher_accuracy(phases)) for phases in columns)],
        ["meta model's accuracy", *(percent(phases["meta"].metric("accuracy")) for phases in columns)],
    ]
    for run, name in RUNS.items():
        records = [phases.get(run) for phases in columns]
        if run != "train" and any(records):
            accuracies = [record and record.metric("accuracy") for record in records]
            rows.append([f"student from {name}", *map(percent, accuracies)])
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


def _ranks(end: PhaseRecord) -> str:
    return f"{_shown(end.value('world_size'))} ({_shown(end.value('ep_size'))})"


def _complete(phases: Phases) -> str:
    names = expected(phases)
    done = sum(phases[name].status == "done" for name in names)
    return f"{done} of {len(names)}"


def _curves(runs: Mapping[str, Phases]) -> str:
    """Of the runs whose student has an accuracy; a run keeps its colour in every picture."""
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
        chart = LineChart("Student's accuracy by epochs", by_epochs, "epochs", "accuracy", percent_tick)
        pictures.append(figure(chart, "End-to-end training of the m2mKD student of each run."))
    if by_cost:
        lines, _, unit = in_flop_units(by_cost)
        chart = LineChart("Student's accuracy by total cost", lines, unit, "accuracy", percent_tick)
        pictures.append(figure(chart, "Meta model and modules count; the teacher's own training does not."))
    if any(line.points for line in losses):
        chart = LineChart("Training loss", losses, "optimiser step", "loss", from_zero=False)
        pictures.append(figure(chart, "Comparable only where the recipes agree on labels and mixing."))
    return figures(pictures)


def _modules(runs: Mapping[str, Phases]) -> str:
    accuracies_of: list[list[float | None]] = []  # run -> module -> its student's
    for phases in runs.values():
        accuracies_of.append([student for _, _, student in hybrids(phases)])
    # a run of fewer modules has no bars further on
    by_module = itertools.zip_longest(*accuracies_of)
    groups = [(str(module), accuracies) for module, accuracies in enumerate(by_module)]
    if all(accuracy is None for _, accuracies in groups for accuracy in accuracies):
        return ""
    names = [(name, colour) for colour, name in enumerate(runs)]
    chart = BarChart("Student modules inside their meta model", groups, names, "module", "accuracy", percent_tick)
    return figures([figure(chart, "Accuracy of the meta model with one module replaced by the student's.")])


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
