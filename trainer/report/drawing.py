"""Draws the charts of the reports with matplotlib: as inline SVG for the pages, as PNG for report.md and study.png.

An SVG is drawn 380 px wide, about the width of a phone and of a third of a desktop page, so that its text keeps its
size. Its colours become the page's CSS variables, so that it follows light and dark; its legend is HTML below it (it
wraps). A PNG has its titles and legends inside. The same chart gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from trainer.report.charts import (
    MAX_COLUMNS,
    SERIES,
    BarChart,
    Chart,
    Form,
    Line,
    LineChart,
    LoadMap,
    Matrix,
    averaged,
    thinned,
)
from trainer.report.data import END_SHARE, Loads, at_end

# The light theme of report.css: colours of the lines, then of text and rules.
COLOURS = ("#0072b2", "#d55e00", "#00875f", "#b0458a", "#b57a00", "#3b9bd6", "#6b6b6b", "#7a4fc0")
FOREGROUND = "#1b1f24"
MUTED = "#57606a"
GRID = "#e6e9ee"
CSS_VARIABLES = {colour: f"var(--s{number})" for number, colour in enumerate(COLOURS)} | {
    FOREGROUND: "var(--fg)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
}
MARKERS = "os^Dv<>P"  # tell the lines apart in grey too
assert len(COLOURS) == len(MARKERS) == SERIES
# RGB of the cells; their opacity says how strong, so that the page's own colour stands for none
ORANGE = (213, 94, 0)  # a load above an even share, a confusion
BLUE = (0, 114, 178)  # a load below an even share, what was recognised
GREY = (128, 128, 128)  # an empty cell

WIDTH, HEIGHT = 380, 250  # of an SVG, pixels
LEFT, RIGHT, TOP, BOTTOM = 50, 18, 14, 40  # margins of its plot, pixels
PIXELS_PER_INCH = 72  # what matplotlib takes the unit of an SVG for
LONG_LABEL = 40  # characters; two of them side by side are wider than a plot
DPI = 120  # of a PNG
STYLE = {
    "axes.autolimit_mode": "round_numbers",  # an axis ends on a tick
    "axes.edgecolor": MUTED,
    "axes.formatter.limits": (-3, 6),
    "axes.formatter.useoffset": False,
    "axes.labelcolor": MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": FOREGROUND,
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "font.sans-serif": ["DejaVu Sans"],
    "grid.color": GRID,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "m2mKD",  # else the ids are drawn by chance
    "text.color": FOREGROUND,
    "text.parse_math": False,  # a label may hold $
    "xtick.color": MUTED,
    "xtick.labelcolor": FOREGROUND,
    "xtick.major.size": 0,
    "ytick.labelcolor": FOREGROUND,
    "ytick.major.size": 0,
}


def svg(chart: Chart) -> str:
    """A chart as an <svg> element for a page, without title and legend."""
    width, height, box = _frame(chart)
    with matplotlib.rc_context(STYLE | {"font.size": 12.5}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's browser has its own
        figure = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH))
        axes = figure.add_axes(box)
        DRAW[type(chart)](axes, chart)
        with io.StringIO() as file:
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=nothing)
            text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'="([\d.]+)pt"', r'="\1"', text, count=2)
    # Ids of groups repeat from chart to chart, and nothing refers to them; those that are referred to have no "_".
    # Nothing lies outside its plot, and a clip path whose twin is in a closed <details> may hide what it should show.
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    text = re.sub(r' clip-path="url\(#\w+\)"|<clipPath.*?</clipPath>', "", text, flags=re.DOTALL)
    text = re.sub(r"(?<=(?:fill|roke): )#[0-9a-f]{6}", lambda match: CSS_VARIABLES.get(match[0], match[0]), text)
    attributes = f'role="img" aria-label="{escape(chart.title, quote=True)}"'
    if isinstance(chart, Matrix):
        attributes += ' class="fixed"'
    return text.replace("<svg ", f"<svg {attributes} ", 1)


def png(charts: Sequence[LineChart | BarChart]) -> bytes:
    """Charts side by side, two in a row, each with its title and legend."""
    columns = min(2, len(charts))
    rows = math.ceil(len(charts) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4 * columns, 5.2 * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, chart in zip(panels, charts):
            axes.set_title(chart.title)
            DRAW[type(chart)](axes, chart)
            axes.set_ylabel(chart.y_label)
            for bars in axes.containers:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                axes.bar_label(bars, fmt=chart.form, fontsize=9, label_type="center", bbox=box)
            longest = max(map(len, axes.get_legend_handles_labels()[1]), default=0)
            columns_of_legend = 1 if longest > LONG_LABEL else 2
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=9, frameon=False, ncols=columns_of_legend
            )
        for axes in panels[len(charts) :]:
            axes.set_visible(False)
        return _png_bytes(figure)


def expert_load_png(runs: Mapping[str, Loads]) -> bytes:
    """Per run: load of each expert at the end of training, and the extremes over training; both as share of uniform."""
    most = max(len(loads) for loads in runs.values())
    map_height = 0.32 * most + 1.6  # inches
    ends: dict[str, dict[str, list[float]]] = {}
    high = 2.0  # end of the colours
    for name, loads in runs.items():
        ends[name] = {layer: at_end(steps) for layer, steps in loads.items()}
        high = max(high, *map(max, ends[name].values()))
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=high)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(runs) + 1.4, map_height + 4.6), layout="constrained")
        axes = figure.subplots(2, len(runs), squeeze=False, height_ratios=[map_height, 3.2], sharey="row")
        figure.suptitle("Load of the experts")
        for column, (name, loads) in enumerate(runs.items()):
            image = _draw_ends(axes[0, column], ends[name], norm)
            axes[0, column].set_title(f"{name}\nmean of the last {END_SHARE:.0%} of the logged steps", fontsize=10)
            _draw_lines(axes[1, column], _extremes(loads))
            axes[1, column].set_title("extremes over all layers, each logged step", fontsize=10)
        axes[0, 0].set_ylabel("MoE layer")
        axes[1, 0].set_ylabel("load, share of uniform")
        figure.colorbar(image, ax=list(axes[0]), label="load, share of uniform\n(1 = average expert of the layer)")
        figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        return _png_bytes(figure)


def _png_bytes(figure: Figure) -> bytes:
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=DPI)
        return file.getvalue()


def _frame(chart: Chart) -> tuple[float, float, tuple[float, float, float, float]]:
    """Width and height of a chart's SVG in pixels, and its plot as shares of them: left, bottom, width, height."""
    width, height = WIDTH, HEIGHT
    left, right, top, bottom = LEFT, RIGHT, TOP, BOTTOM
    if isinstance(chart, LoadMap):
        experts = len(chart.steps[0][1])
        height = top + bottom + experts * _row_height(experts)
    if isinstance(chart, Matrix):
        left = top = 30 + 8 * max(len(_short(label)) for label in chart.labels)
        right = bottom = 4
        width = height = left + right + _cell(chart) * len(chart.labels)
    plot = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return width, height, plot


def _draw_lines(axes: Axes, chart: LineChart) -> None:
    before = chart.beginning
    if before:
        axes.axvspan(0, before.end, color=_colour(before.colour), alpha=0.15, linewidth=0, label=before.name)
    for line in chart.lines:
        if line.points:
            _draw_line(axes, thinned(line))
    _draw_levels(axes, chart.levels)
    # the least and the most that an axis has to show; its limits are the ticks around them
    axes.update_datalim([(0, 0)], updatey=chart.from_zero)
    _finish(axes, chart.x_label, chart.form)
    axes.xaxis.set_major_formatter(_thousands)


def _draw_line(axes: Axes, line: Line) -> None:
    colour = _colour(line.colour)
    xs = [x for x, _ in line.points]
    ys = [y for _, y in line.points]
    marker = None
    if line.marks or len(line.points) == 1:
        marker = MARKERS[line.colour % SERIES]
    axes.plot(xs, ys, color=colour, marker=marker, label=line.name, clip_on=False)
    if line.spread:
        low = [y - half for y, half in zip(ys, line.spread)]
        high = [y + half for y, half in zip(ys, line.spread)]
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_bars(axes: Axes, chart: BarChart) -> None:
    width = 0.8 / len(chart.names)  # a group takes 0.8 of its place
    for number, (name, colour) in enumerate(chart.names):
        offset = (number + 0.5) * width - 0.4
        xs = []
        heights = []
        for place, (_, values) in enumerate(chart.groups):
            if values[number] is not None:
                xs.append(place + offset)
                heights.append(values[number])
        axes.bar(xs, heights, 0.94 * width, color=_colour(colour), label=name)
    _draw_levels(axes, chart.levels)
    axes.update_datalim([(0, 0)], updatex=False)
    _finish(axes, chart.x_label, chart.form)
    every = math.ceil(len(chart.groups) / 10)  # at most ten names fit
    axes.set_xticks(range(0, len(chart.groups), every), [name for name, _ in chart.groups[::every]])
    axes.set_xlim(-0.5, len(chart.groups) - 0.5)


def _draw_levels(axes: Axes, levels: Sequence[tuple[str, float]]) -> None:
    for (name, value), dashes in zip(levels, ("--", ":")):
        axes.axhline(value, color=MUTED, linestyle=dashes, linewidth=1.8, label=name)


def _draw_load(axes: Axes, chart: LoadMap) -> None:
    rows = np.transpose([loads for _, loads in averaged(chart.steps, MAX_COLUMNS)])
    pixels = np.array([list(map(_load_shade, row)) for row in rows], dtype=np.uint8)
    experts = len(rows)
    first = chart.steps[0][0]
    last = chart.steps[-1][0]
    if first == last:  # a single step fills the plot
        first = 0
    last = max(last, 1)
    # expert 0 is the top row, each one unit high around its number
    axes.imshow(pixels, interpolation="none", aspect="auto", extent=(first, last, experts - 0.5, -0.5))
    _finish(axes, "optimiser step")
    axes.set_xlim(0, last)
    axes.set_ylim(experts - 0.5, -0.5)
    axes.set_ylabel("expert")
    axes.grid(visible=False)
    axes.xaxis.set_major_formatter(_thousands)
    axes.set_yticks(range(0, experts, math.ceil(16 / _row_height(experts))))


def _draw_matrix(axes: Axes, chart: Matrix) -> None:
    size = len(chart.labels)
    pixels = []
    for row, counts in enumerate(chart.counts):
        whole = max(1, sum(counts))
        pixels.append([_matrix_shade(count / whole, row == column) for column, count in enumerate(counts)])
    axes.imshow(np.array(pixels, dtype=np.uint8), interpolation="none", aspect="auto")
    names = [_short(label) for label in chart.labels]
    axes.set_xticks(range(size), names, rotation=90)
    axes.set_yticks(range(size), names)
    axes.tick_params(top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.set(xlabel="predicted", ylabel="true class")
    axes.xaxis.set_label_position("top")
    axes.spines[:].set_visible(False)
    if _cell(chart) < 30:
        return  # numbers do not fit
    for row, counts in enumerate(chart.counts):
        for column, count in enumerate(counts):
            if count:
                axes.text(column, row, str(count), ha="center", va="center")


def _draw_ends(axes: Axes, layers: Mapping[str, Sequence[float]], norm: TwoSlopeNorm):
    """Load of every expert (across) of every layer (down), with its number where there is room."""
    rows = list(layers.values())
    experts = len(rows[0])
    image = axes.imshow(rows, cmap="PuOr_r", norm=norm, aspect="auto")
    axes.set_yticks(range(len(layers)), list(layers))
    axes.set_xticks(range(0, experts, max(1, experts // 16)))
    axes.set_xlabel("expert")
    if experts <= 16:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                pale = abs(norm(value) - 0.5) < 0.3
                colour = "black" if pale else "white"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    return image


def _extremes(loads: Loads) -> LineChart:
    """The busiest and the idlest expert of all layers, by step."""
    busiest: dict[int, float] = {}
    idlest: dict[int, float] = {}
    for steps in loads.values():
        for step, load in steps:
            busiest[step] = max(busiest.get(step, load[0]), *load)
            idlest[step] = min(idlest.get(step, load[0]), *load)
    lines = [Line("busiest expert", sorted(busiest.items()), 1), Line("idlest expert", sorted(idlest.items()), 5)]
    return LineChart("", lines, "optimizer step", "load, share of uniform", levels=[("uniform", 1.0)])


def _finish(axes: Axes, x_label: str, form: Form | None = None) -> None:
    """Ticks, label and grid, the same for every kind of chart with an x axis."""
    axes.set_xlabel(x_label)
    axes.locator_params(nbins=5, steps=[1, 2, 5, 10])
    axes.autoscale_view()
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if form:
        axes.yaxis.set_major_formatter(lambda value, _: form(value))


def _thousands(value: float, _place: int) -> str:
    """20000 -> 20k."""
    if value >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}"


def _colour(number: int) -> str:
    return COLOURS[number % SERIES]


def _load_shade(load: float) -> tuple[int, int, int, int]:
    """RGBA: transparent for an even share, full blue for none, full orange for double and more."""
    colour = ORANGE if load > 1 else BLUE
    return (*colour, round(255 * min(1.0, abs(load - 1))))


def _matrix_shade(share: float, is_right: bool) -> tuple[int, int, int, int]:
    """RGBA of a cell that holds this share of the images of its row."""
    if is_right:
        return (*BLUE, round(255 * max(0.08, share)))
    if share == 0:
        return (*GREY, 26)
    return (*ORANGE, round(255 * min(1.0, 0.25 + share)))


def _row_height(experts: int) -> int:
    """Pixels of a row of a load map: all rows together about 176."""
    return max(4, min(22, 176 // experts))


def _cell(chart: Matrix) -> int:
    """Pixels of a cell of a confusion matrix."""
    return 30 if len(chart.labels) <= 12 else 22


def _short(label: str) -> str:
    return label if len(label) <= 14 else label[:13] + "…"


DRAW = {LineChart: _draw_lines, BarChart: _draw_bars, LoadMap: _draw_load, Matrix: _draw_matrix}
