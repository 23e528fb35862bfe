"""The page that puts several runs side by side: key figures, curves, and where their recipes differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.report.data import (
    FLOP_UNITS,
    RUNS,
    PhaseRecord,
    distills,
    hybrids,
    peak_memory,
    preparation,
    read_analysis,
    read_phases,
    speed,
    student_accuracy,
    teacher_accuracy,
    total,
)
from trainer.report.page import duration, figure, figures, flops, gigabytes, page, percent, percent_tick, table
from trainer.report.svg import Line, bar_chart, line_chart
from trainer.report.warnings import expected, warnings

Phases = Mapping[str, PhaseRecord]


def comparison_page(folders: Sequence[Path]) -> str:
    """The page of several run folders, in the order given.

    Raises:
        ValueError: when one of the folders holds no phase.
    """
    runs = dict(zip(_names(folders), (read_phases(folder) for folder in folders)))
    ranked = sorted(((a, n) for n, p in runs.items() if (a := student_accuracy(p)) is not None), reverse=True)
    text = "No student is trained to the end yet."
    if ranked:
        text = f"The best student is that of <b>{escape(ranked[0][1])}</b> with {percent(ranked[0][0])}"
        text += f", {100 * (ranked[0][0] - ranked[1][0]):.1f} points above the next." if len(ranked) > 1 else "."
    sections = {"Key figures": _figures(runs), "Learning curves": _curves(runs), "Modules": _modules(runs),
                "Differences of the recipes": _differences(runs)}  # fmt: skip
    return page(f"{len(runs)} runs compared", [f'<p class="verdict">{text}</p>'], sections)


def _names(folders: Sequence[Path]) -> list[str]:
    """A short name per run folder, with as much of its path as tells it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    names: list[str] = []
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same folder is given twice: {', '.join(map(str, folders))}")


def _figures(runs: Mapping[str, Phases]) -> str:
    rows = [["student's accuracy", *(percent(student_accuracy(p)) for p in runs.values())],
            ["teacher's accuracy", *(percent(teacher_accuracy(p)) for p in runs.values())],
            ["meta model's accuracy", *(percent(p["meta"].metric("accuracy")) for p in runs.values())]]  # fmt: skip
    for run, name in list(RUNS.items())[1:]:
        if any(run in p for p in runs.values()):
            shown = (percent(p[run].metric("accuracy") if run in p else None) for p in runs.values())
            rows.append([f"student from {name}", *shown])
    ends = [p["train"] for p in runs.values()]
    rows += [
        ["epochs end to end", *(_shown(end.value("epochs")) for end in ends)],
        ["global batch", *(_shown(end.value("global_batch")) for end in ends)],
        ["ranks (expert parallel)", *(f"{_shown(e.value('world_size'))} ({_shown(e.value('ep_size'))})" for e in ends)],
        ["FLOPs, all of m2mKD", *(flops(total(p, "train", "flops")) for p in runs.values())],
        ["time, all of m2mKD", *(duration(total(p, "train", "seconds")) for p in runs.values())],
        ["images/s end to end", *(_shown(speed(end)) for end in ends)],
        ["peak memory of a rank", *(gigabytes(peak_memory(end)) for end in ends)],
        ["phases complete", *(f"{sum(p[n].status == 'done' for n in expected(p))} of {len(expected(p))}"
                              for p in runs.values())],
        ["warnings", *(str(len(warnings(p, read_analysis(p)))) for p in runs.values())],
    ]  # fmt: skip
    return table(["", *map(escape, runs)], rows)


def _curves(runs: Mapping[str, Phases]) -> str:
    trained = [(place, name, p) for place, (name, p) in enumerate(runs.items()) if p["train"].curve()]
    if not trained:
        return ""
    legend = [(name, str(place)) for place, name, _ in trained]
    lines = [Line(name, list(p["train"].curve().items()), place, marks=True) for place, name, p in trained]
    pictures = [figure("Student's accuracy by epochs", line_chart(lines, "epochs", "accuracy", percent_tick),
                       "End-to-end training of the m2mKD student of each run.", legend)]  # fmt: skip
    priced = []
    for place, name, phases in trained:
        before, end = preparation(phases, "train", "flops"), phases["train"]
        if before is not None and end.value("flops") and end.value("epochs"):
            per_epoch = end.value("flops") / end.value("epochs")
            priced.append(Line(name, [(before + per_epoch * e, a) for e, a in end.curve().items()], place, marks=True))
    if priced:
        most = max(x for line in priced for x, _ in line.points)
        unit = next((unit for unit in FLOP_UNITS if unit <= most), 1.0)
        lines = [Line(p.name, [(x / unit, y) for x, y in p.points], p.colour, marks=True) for p in priced]
        pictures.append(figure(
            "Student's accuracy by total cost", line_chart(lines, FLOP_UNITS[unit], "accuracy", percent_tick),
            "Meta model and modules count; the teacher's own training does not.", legend,
        ))  # fmt: skip
    losses = [Line(name, p["train"].series("loss"), place) for place, name, p in trained]
    if any(line.points for line in losses):
        pictures.append(figure(
            "Training loss", line_chart(losses, "optimiser step", "loss", from_zero=False),
            "Comparable only where the recipes agree on labels and mixing.", legend,
        ))  # fmt: skip
    return figures(pictures)


def _modules(runs: Mapping[str, Phases]) -> str:
    found = {name: [student for *_, student in hybrids(phases)] for name, phases in runs.items()}
    most = max(len(distills(phases)) for phases in runs.values())
    if not any(value is not None for values in found.values() for value in values):
        return ""
    groups = [(str(i), [values[i] if i < len(values) else None for values in found.values()]) for i in range(most)]
    picture = bar_chart(groups, [(name, place) for place, name in enumerate(found)], "module", "accuracy", percent_tick)
    return figures([figure(
        "Student modules inside their meta model", picture,
        "Accuracy of the meta model with one module replaced by the student's.",
        [(name, str(place)) for place, name in enumerate(found)],
    )])  # fmt: skip


def _differences(runs: Mapping[str, Phases]) -> str:
    recipes = [dict(_flat(_recipe(phases), "")) for phases in runs.values()]
    keys = [key for key in dict.fromkeys(key for recipe in recipes for key in recipe)
            if len({str(recipe.get(key, "–")) for recipe in recipes}) > 1]  # fmt: skip
    if not keys:
        return "<p>The recipes agree on every key.</p>"
    rows = [
        [
            f"<code>{escape(key).replace('.', '.<wbr>')}</code>",
            *(escape(str(recipe.get(key, "–"))) for recipe in recipes),
        ]
        for key in keys
    ]
    return table(["key", *map(escape, runs)], rows)


def _recipe(phases: Phases) -> Mapping[str, Any]:
    """As the last phase of the run used it."""
    found = [record.config["recipe"] for record in phases.values() if isinstance(record.config.get("recipe"), dict)]
    return found[-1] if found else {}


def _flat(values: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
