"""What the pictures of the reports show, as plain data: lines, bars, the load of experts, a confusion matrix.

trainer/report/drawing.py draws them with matplotlib, for the pages as SVG and for report.md and study.png as PNG.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from trainer.report.data import FLOP_UNITS

SERIES = 8  # colours of the palette: --s0 .. --s7 of report.css
MAX_POINTS = 240  # of one line; more are averaged
MAX_COLUMNS = 90  # of a load map; more are averaged
Form = Callable[[float], str]  # how a value reads
Steps = Sequence[tuple[int, Sequence[float]]]  # (step, load per expert as share of an even one)


@dataclass(frozen=True)
class Line:
    """One line of a chart: points (x, y) in order of x; `colour` numbers the palette."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    marks: bool = False  # a mark on every point
    spread: Sequence[float] = ()  # half the height of a shaded band around each point


@dataclass(frozen=True)
class Beginning:
    """The part of the x axis from 0 to `end` that came before a line starts, shaded in its colour."""

    name: str
    end: float
    colour: int


@dataclass(frozen=True)
class LineChart:
    """Lines over a common x axis that starts at 0.

    Attributes:
        form: how a y value reads on the axis; by default with the digits that tell ticks apart.
        levels: named horizontal lines, the first dashed, the second dotted.
        from_zero: whether the y axis starts at 0.
        with_legend: whether a legend names the lines.
    """

    title: str
    lines: Sequence[Line]
    x_label: str
    y_label: str
    form: Form | None = None
    levels: Sequence[tuple[str, float]] = ()
    beginning: Beginning | None = None
    from_zero: bool = True
    with_legend: bool = True


@dataclass(frozen=True)
class BarChart:
    """Groups of bars from 0: (name, value of each bar), None = no bar.

    Attributes:
        names: (name, number of its colour) of each bar of a group.
        levels: named horizontal lines, the first dashed, the second dotted.
    """

    title: str
    groups: Sequence[tuple[str, Sequence[float | None]]]
    names: Sequence[tuple[str, int]]
    x_label: str
    y_label: str
    form: Form
    levels: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class LoadMap:
    """One layer: experts down, training steps across, colour = load as share of an even one."""

    title: str
    steps: Steps


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix: rows are the truth, columns the prediction, both in the order of `labels`."""

    title: str
    counts: Sequence[Sequence[int]]
    labels: Sequence[str]


Chart = LineChart | BarChart | LoadMap | Matrix


def legend(chart: Chart) -> list[tuple[str, str]]:
    """(name, kind) of what a chart shows; the kind is "3" (colour number 3), "pale 3", "dash" or "dot"."""
    entries: list[tuple[str, str]] = []
    if isinstance(chart, LineChart) and chart.with_legend:
        entries += [(line.name, str(line.colour)) for line in chart.lines]
    if isinstance(chart, BarChart):
        entries += [(name, str(colour)) for name, colour in chart.names]
    if isinstance(chart, LineChart | BarChart):
        entries += [(name, kind) for (name, _), kind in zip(chart.levels, ("dash", "dot"))]
    if isinstance(chart, LineChart) and chart.beginning:
        entries.append((chart.beginning.name, f"pale {chart.beginning.colour}"))
    return entries


def in_flop_units(lines: Sequence[Line]) -> tuple[list[Line], float, str]:
    """Lines whose x are FLOPs, in the largest unit they reach; the size of that unit and its name."""
    most = max(x for line in lines for x, _ in line.points)
    size, name = flop_unit(most)
    scaled = []
    for line in lines:
        points = [(x / size, y) for x, y in line.points]
        scaled.append(replace(line, points=points))
    return scaled, size, name


def flop_unit(most: float) -> tuple[float, str]:
    """The largest unit of FLOPs that `most` reaches, and its name: 2.3e14 -> (1e12, "TFLOP")."""
    size = next((size for size in FLOP_UNITS if size <= most), 1.0)
    return size, FLOP_UNITS[size]


def thinned(line: Line) -> Line:
    """A line of more than MAX_POINTS points as that many means, without marks and band; another as it is."""
    if len(line.points) <= MAX_POINTS:
        return line
    rows = averaged([(x, [y]) for x, y in line.points], MAX_POINTS)
    return Line(line.name, [(x, values[0]) for x, values in rows], line.colour)


def averaged(rows: Sequence[tuple[float, Sequence[float]]], most: int) -> list[tuple[float, list[float]]]:
    """At most `most` rows (x, values), each the mean of its neighbours under the last x of them."""
    size = math.ceil(len(rows) / most)
    means = []
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        columns = zip(*(values for _, values in group))
        means.append((group[-1][0], [sum(column) / len(group) for column in columns]))
    return means
