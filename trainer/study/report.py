"""What a study writes: study.json (numbers), study.md, study.html (one file, plots in it) and study.png."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.disk import write_json, write_text
from trainer.report.charts import Line, LineChart, in_flop_units
from trainer.report.page import figure, figures, load_drawing, page, percent_tick, table
from trainer.study.figures import FIGURES, Comparison, Results, collect
from trainer.study.plan import Cell, Study
from trainer.study.statistics import Summary
from trainer.study.tables import Table, tables
from trainer.study.tuning import Tuned, tuned

BAND = 2  # standard errors
MISSING_SHOWN = 5  # cells that are named


def report(study: Study, cells: Sequence[Cell], out: Path) -> list[Path]:
    """Write the files from what these cells have left, trials of tuning among them; returns the paths."""
    return write_report(collect(study, cells), out, tuned(study, cells))


def write_report(results: Results, out: Path, grids: Sequence[Tuned] = ()) -> list[Path]:
    """Write the files and return their paths; study.png only where matplotlib is installed.

    Args:
        grids: what tuning tried and chose.
    """
    shown = tables(results, grids)
    charts = accuracy_charts(results)
    paths = [out / "study.json", out / "study.md", out / "study.html"]
    write_json(paths[0], _numbers(results) | {"tuning": _tuning(grids)})
    write_text(paths[1], _markdown(results, shown))
    write_text(paths[2], _page(results, shown, charts))
    drawing = load_drawing()
    if drawing and charts:
        paths.append(out / "study.png")
        paths[-1].write_bytes(drawing.png(charts))
    return paths


def accuracy_charts(results: Results) -> list[LineChart]:
    """Accuracy against total cost, one chart per group of variants, with what they are compared with."""
    labels = {variant.name: variant.label for variant in results.study.variants}
    groups: dict[str, list[str]] = {}
    for variant in results.study.variants:
        groups.setdefault(variant.group, []).append(variant.name)
    for variant in results.study.variants:
        groups[variant.group] += variant.references
    charts = []
    for group, names in groups.items():
        curves = {labels[name]: results.curve(name) for name in dict.fromkeys(names)}
        curves = {label: curve for label, curve in curves.items() if curve}
        if not curves:
            continue
        lines = []
        for colour, (label, curve) in enumerate(curves.items()):
            # at a point of the axes the title says already where
            lines.append(_line(label.removesuffix(f", {group}"), curve, colour))
        lines, _, unit = in_flop_units(lines)
        title = "Accuracy against total cost"
        if group:
            title += f": {group}"
        x_label = f"total cost, {unit} (teacher not counted)"
        charts.append(LineChart(title, lines, x_label, "accuracy on the validation images", percent_tick))
    return charts


def _line(label: str, curve: Sequence[tuple[float, Summary]], colour: int) -> Line:
    """The mean over the seeds with a band of BAND standard errors."""
    seeds = min(point.n for _, point in curve)
    points = [(cost, point.mean) for cost, point in curve]
    spread = [BAND * (point.error or 0.0) for _, point in curve]
    return Line(f"{label} (n = {seeds})", points, colour, marks=True, spread=spread)


def _numbers(results: Results) -> dict[str, Any]:
    """What study.json holds."""
    variants = {}
    for variant in results.study.variants:
        seeds = {}
        for seed, cell in results.cells[variant.name].items():
            seeds[seed] = {"figures": dict(cell.figures), "curve": [list(point) for point in cell.curve]}
        variants[variant.name] = {
            "label": variant.label,
            "group": variant.group,
            "overrides": list(variant.overrides),
            "figures": {key: _spread(results.of(variant.name, key)) for key in FIGURES},
            "seeds": seeds,
        }
    return {
        "title": results.study.title,
        "seeds": list(results.study.seeds),
        "missing": list(results.missing),
        "variants": variants,
        "comparisons": [_comparison(comparison) for comparison in results.comparisons],
    }


def _tuning(grids: Sequence[Tuned]) -> dict[str, Any]:
    """Variant -> what was tried, what was chosen, and what it cost."""
    numbers = {}
    for grid in grids:
        tried = [{"overrides": list(trial.overrides), **_spread(trial.accuracy)} for trial in grid.trials]
        chosen = None if grid.best is None else list(grid.chosen)
        numbers[grid.variant] = {"trials": tried, "chosen": chosen, "at_edge": list(grid.edges), "flops": grid.flops}
    return numbers


def _comparison(comparison: Comparison) -> dict[str, Any]:
    equal_cost = None
    if comparison.race:
        equal_cost = {
            "end_flops": comparison.race.end,
            "ahead": comparison.race.ahead,
            "crossings_flops": list(comparison.race.crossings),
            "points": [[cost, _spread(difference)] for cost, difference in comparison.race.points],
        }
    return {
        "variant": comparison.variant,
        "reference": comparison.reference,
        "half": _spread(comparison.half),
        "final": _spread(comparison.final),
        "equal_cost": equal_cost,
    }


def _spread(value: Summary) -> dict[str, Any]:
    return {"n": value.n, "mean": value.mean, "std": value.std, "error": value.error}


def _markdown(results: Results, shown: list[Table]) -> str:
    parts = [f"# Study: {results.study.title}", _about(results)]
    for one in shown:
        lines = ["| " + " | ".join(one.head) + " |", "|---" * len(one.head) + "|"]
        for row in one.rows:
            cells = [cell.replace("|", "\\|") for cell in row]
            lines.append("| " + " | ".join(cells) + " |")
        parts += [f"## {one.title}", one.caption, "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _page(results: Results, shown: list[Table], charts: list[LineChart]) -> str:
    sections = {}
    for one in shown:
        head = [escape(cell) for cell in one.head]
        rows = [[escape(cell) for cell in row] for row in one.rows]
        sections[one.title] = f'<p class="muted">{escape(one.caption)}</p>' + table(head, rows, text=(0,))
    caption = f"Accuracy on the validation images. Mean over the seeds; band: {BAND} standard errors."
    sections["Plots"] = figures([figure(chart, caption) for chart in charts])
    return page(f"Study: {results.study.title}", [f"<p>{escape(_about(results))}</p>"], sections)


def _about(results: Results) -> str:
    study = results.study
    seeds = ", ".join(map(str, study.seeds))
    text = f"{len(study.variants)} variants of {study.base.name}, seeds {seeds}."
    if results.missing:
        more = len(results.missing) - MISSING_SHOWN
        tail = f" and {more} more, which study.json lists" if more > 0 else ""
        text += f" Not complete: {', '.join(results.missing[:MISSING_SHOWN])}{tail}."
    return text
