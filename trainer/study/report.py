"""What a study writes: study.json (numbers), study.md, study.html (one file, plots in it) and study.png."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from trainer.disk import write_json, write_text
from trainer.report.data import FLOP_UNITS
from trainer.report.page import figure, figures, page, percent_tick, table
from trainer.report.svg import Line, line_chart
from trainer.study.figures import FIGURES, Plot, Results
from trainer.study.statistics import Summary
from trainer.study.tables import Table, tables

BAND = 2  # standard errors


def write_report(results: Results, out: Path) -> list[Path]:
    """Write the files and return their paths; study.png only where matplotlib is installed."""
    shown, drawn = tables(results), plots(results)
    paths = [out / "study.json", out / "study.md", out / "study.html"]
    write_json(paths[0], _numbers(results))
    write_text(paths[1], _markdown(results, shown))
    write_text(paths[2], _page(results, shown, drawn))
    if not drawn:
        return paths
    try:
        from trainer.study.picture import draw
    except ImportError:
        return paths
    draw(out / "study.png", drawn, BAND)
    return [*paths, out / "study.png"]


def plots(results: Results) -> list[Plot]:
    """Accuracy against total cost, one plot per group of variants, with what they are compared with."""
    study, found = results.study, []
    labels = {variant.name: variant.label for variant in study.variants}
    for group in dict.fromkeys(variant.group for variant in study.variants):
        inside = [variant for variant in study.variants if variant.group == group]
        names = [variant.name for variant in inside]
        names += [name for variant in inside for name in variant.references]
        curves = {labels[name]: curve for name in dict.fromkeys(names) if (curve := results.curve(name))}
        if curves:
            most = max(curve[-1][0] for curve in curves.values())
            size = next(size for size in FLOP_UNITS if size <= most or size == 1.0)
            curves = {label: [(x / size, point) for x, point in curve] for label, curve in curves.items()}
            title = "Accuracy against total cost" + (f": {group}" if group else "")
            found.append(Plot(title, FLOP_UNITS[size], curves))
    return found


def _numbers(results: Results) -> dict[str, Any]:
    return {
        "title": results.study.title,
        "seeds": list(results.study.seeds),
        "missing": list(results.missing),
        "variants": {
            variant.name: {
                "label": variant.label,
                "group": variant.group,
                "overrides": list(variant.overrides),
                "figures": {key: _spread(results.of(variant.name, key)) for key in FIGURES},
                "seeds": {
                    seed: {"figures": dict(cell.figures), "curve": [list(point) for point in cell.curve]}
                    for seed, cell in results.cells[variant.name].items()
                },
            }
            for variant in results.study.variants
        },
        "comparisons": [
            {
                "variant": c.variant,
                "reference": c.reference,
                "half": _spread(c.half),
                "final": _spread(c.final),
                "equal_cost": c.race and {
                    "end_flops": c.race.end,
                    "ahead": c.race.ahead,
                    "crossings_flops": list(c.race.crossings),
                    "points": [[x, _spread(point)] for x, point in c.race.points],
                },
            }
            for c in results.comparisons
        ],
    }  # fmt: skip


def _spread(value: Summary) -> dict[str, Any]:
    return {"n": value.n, "mean": value.mean, "std": value.std, "error": value.error}


def _markdown(results: Results, shown: list[Table]) -> str:
    parts = [f"# Study: {results.study.title}", _about(results)]
    for one in shown:
        lines = ["| " + " | ".join(one.head) + " |", "|---" * len(one.head) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in one.rows]
        parts += [f"## {one.title}", one.caption, "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _page(results: Results, shown: list[Table], drawn: list[Plot]) -> str:
    cells = {
        one.title: f'<p class="muted">{escape(one.caption)}</p>'
        + table([escape(cell) for cell in one.head], [[escape(cell) for cell in row] for row in one.rows], text=(0,))
        for one in shown
    }
    cells["Plots"] = figures([_figure(plot) for plot in drawn])
    return page(f"Study: {results.study.title}", [f"<p>{escape(_about(results))}</p>"], cells)


def _figure(plot: Plot) -> str:
    lines, legend = [], []
    for colour, (label, curve) in enumerate(plot.curves.items()):
        spread = [BAND * (point.error or 0.0) for _, point in curve]
        lines.append(Line(label, [(x, point.mean) for x, point in curve], colour, marks=True, spread=spread))
        legend.append((f"{label} (n = {min(point.n for _, point in curve)})", str(colour)))
    axis = f"total cost, {plot.unit} (teacher not counted)"
    chart = line_chart(lines, axis, "accuracy on the validation images, %", form=percent_tick)
    caption = f"Accuracy on the validation images. Mean over the seeds; band: {BAND} standard errors."
    return figure(plot.title, chart, caption, legend)


def _about(results: Results) -> str:
    study = results.study
    seeds = ", ".join(map(str, study.seeds))
    text = f"{len(study.variants)} variants of {study.base.name}, seeds {seeds}."
    if results.missing:
        text += f" Not complete: {', '.join(results.missing)}."
    return text
