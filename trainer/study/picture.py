"""The plots of a study as one PNG: accuracy against total cost, a panel per group of variants."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from trainer.study.figures import Plot

# Okabe and Ito's colour-blind safe set; markers tell the lines apart in grey too
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#555555", "#7A4FC0")
MARKERS = "os^Dv<>P"


def draw(path: Path, plots: list[Plot], band: float) -> None:
    """Mean lines with bands of `band` standard errors."""
    columns = min(2, len(plots))
    rows = math.ceil(len(plots) / columns)
    sheet = Figure(figsize=(6.4 * columns, 5.2 * rows), layout="constrained")
    axes = list(sheet.subplots(rows, columns, squeeze=False).flat)
    for axis, plot in zip(axes, plots):
        for place, (label, curve) in enumerate(plot.curves.items()):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            xs, means = [x for x, _ in curve], [100 * point.mean for _, point in curve]
            halves = [100 * band * (point.error or 0.0) for _, point in curve]
            seeds = min(point.n for _, point in curve)
            axis.plot(xs, means, color=colour, marker=marker, markersize=4, label=f"{label} (n = {seeds})")
            low, high = ([m + sign * half for m, half in zip(means, halves)] for sign in (-1, 1))
            axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=plot.title, xlim=(0, None), ylim=(0, None), ylabel="accuracy on the validation images, %")
        axis.set_xlabel(f"total cost, {plot.unit} (teacher not counted)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[len(plots) :]:
        axis.set_visible(False)
    sheet.savefig(path, dpi=120)
