"""What evaluations say of models (trainer/judge), as text for a terminal and as sections of a page. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from trainer.report.charts import Line, LineChart
from trainer.report.page import figure, figures, page, percent_tick, table

JUDGED = "judged.json"  # in a folder of phase evaluate, or of python -m trainer.judge --out
WORST = 10  # classes shown
UNIT = 100  # figures are shares, shown per cent


def judged_text(judged: Mapping[str, Any]) -> str:
    """One table: a row for each figure of each evaluation, a column for each model."""
    names = [model["name"] for model in judged["models"]]
    rows = [["", *names]]
    for task in judged["tasks"]:
        rows.append([task["text"], *[""] * len(names)])
        for figure_name in _figure_names(task):
            cells = [_reading(result["figures"].get(figure_name)) for result in _results(task, names)]
            rows.append([f"  {figure_name}", *cells])
        for line in dict.fromkeys(result["what"] for result in _results(task, names)):
            rows.append([f"  ({line})"])
    width = max(len(row[0]) for row in rows if len(row) > 1)
    widths = [max(len(row[column]) for row in rows if len(row) > 1) for column in range(1, len(names) + 1)]
    lines = []
    for name, *cells in rows:
        text = name.ljust(width)
        for cell, size in zip(cells, widths):
            text += "  " + cell.rjust(size)
        lines.append(text.rstrip())
    return "\n".join(lines)


def judged_page(judged: Mapping[str, Any]) -> str:
    """A page of its own, models side by side."""
    rows = []
    for model in judged["models"]:
        size = f"{model['parameters'] / 1e6:.3g} M"
        cost = f"{model['flops'] / 1e9:.3g} GFLOP"
        cells = [escape(model["name"]), escape(model["kind"]), size, cost, str(model["image_size"])]
        rows.append([*cells, str(model["classes"] or "–"), escape(model["source"])])
    head = ["model", "kind", "parameters", "cost of an image", "image side", "classes", "source"]
    intro = (
        f"<p>95% intervals: bootstrap over images with {judged['resamples']} resamples (seed {judged['seed']}), or "
        f"over episodes where it says so. Computed in {escape(judged['dtype'])}.</p>"
    )
    return page("Models judged", [intro], {"Models": table(head, rows, text=[1, 6]), **judged_sections(judged)})


def judged_sections(judged: Mapping[str, Any]) -> dict[str, str]:
    """A section for each evaluation: its table, pictures, and what they were made on."""
    names = [model["name"] for model in judged["models"]]
    sections = {}
    for task in judged["tasks"]:
        results = _results(task, names)
        rows = []
        for figure_name in _figure_names(task):
            cells = [escape(_reading(result["figures"].get(figure_name))) for result in results]
            rows.append([escape(figure_name), *cells])
        text = table(["per cent", *map(escape, names)], rows)
        notes = dict.fromkeys(result["what"] for result in results)
        notes |= dict.fromkeys(note for result in results if (note := result["details"].get("note")))
        text += "".join(f'<p class="muted">{escape(note)}</p>' for note in notes)
        text += figures(_pictures(names, results)) + _worst_classes(names, results)
        sections[escape(task["text"])] = text
    return sections


def _results(task: Mapping[str, Any], names: Sequence[str]) -> list[Mapping[str, Any]]:
    return [task["results"][name] for name in names]


def _figure_names(task: Mapping[str, Any]) -> list[str]:
    """Of all models, in the order of the first one that has them."""
    names = {}
    for result in task["results"].values():
        names |= dict.fromkeys(result["figures"])
    return list(names)


def _reading(value: Mapping[str, float] | None) -> str:
    """{"value": 0.5, "low": 0.4, "high": 0.6} -> 50.0 [40.0, 60.0]."""
    if value is None:
        return "–"
    text = f"{UNIT * value['value']:.1f}"
    if value["low"] is None:
        return text
    return f"{text} [{UNIT * value['low']:.1f}, {UNIT * value['high']:.1f}]"


def _pictures(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> list[str]:
    pictures = []
    lines = []
    for number, (name, result) in enumerate(zip(names, results)):
        bins = result["details"].get("reliability")
        if bins:
            points = [(row["confidence"], row["accuracy"]) for row in bins]
            lines.append(Line(name, points, number, marks=True))
    if lines:
        lines.append(Line("as sure as right", [(0.0, 0.0), (1.0, 1.0)], len(names)))
        chart = LineChart("Reliability", lines, "confidence", "accuracy", form=percent_tick)
        pictures.append(figure(chart, "Images in 15 bins of confidence. Below the diagonal a model is too sure."))
    lines = []
    for number, (name, result) in enumerate(zip(names, results)):
        accuracy = result["details"].get("accuracy")
        if accuracy:
            severities = next(iter(accuracy.values()))
            points = []
            for severity in severities:
                of_kinds = [of_kind[severity] for of_kind in accuracy.values()]
                points.append((float(severity), sum(of_kinds) / len(of_kinds)))
            lines.append(Line(name, points, number, marks=True))
    if lines:
        chart = LineChart("Accuracy under corruption", lines, "severity", "top-1", form=percent_tick)
        pictures.append(figure(chart, "Mean over the kinds of corruption."))
    return pictures


def _worst_classes(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    """The classes that the first model tells worst, beside the other models."""
    classes = results[0]["details"].get("classes")
    if not classes:
        return ""
    worst = sorted((row for row in classes if row["images"]), key=lambda row: row["accuracy"])[:WORST]
    accuracy_of = []
    for result in results:
        accuracy_of.append({row["name"]: row["accuracy"] for row in result["details"]["classes"]})
    rows = []
    for row in worst:
        cells = [_share(of_model.get(row["name"])) for of_model in accuracy_of]
        rows.append([escape(row["name"]), str(row["images"]), *cells])
    head = ["class", "images", *map(escape, names)]
    more = f"<p>The {len(worst)} classes that {escape(names[0])} tells worst, top-1 per cent:</p>"
    return more + table(head, rows)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{UNIT * value:.1f}"
