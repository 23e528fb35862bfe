"""Charts as text: inline SVG whose colours are the page's CSS variables, so that they follow light and dark.

Every chart is drawn for a width of 380 px, about that of a phone and of a third of a desktop page, so that its text
keeps its size. Legends are HTML below the picture (they wrap), values are tooltips (<title>).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 18, 10, 40  # margins of the plot, pixels
SERIES = 8  # colours --s0 .. --s7 of the style sheet
MAX_POINTS = 240  # of one line; more are averaged
BUSY, IDLE = (213, 94, 0), (0, 114, 178)  # colours of a load above and below an even share
Scale = Callable[[float], float]  # value -> pixel


@dataclass(frozen=True)
class Line:
    """One line of a chart: points (x, y) in order of x; `colour` numbers the palette; dashed for a reference."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    marks: bool = False  # a dot per point, with its value as tooltip
    spread: Sequence[float] = ()  # half the height of a shaded band around each point


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    form: Callable[[float], str] | None = None,
    levels: Sequence[tuple[str, float]] = (),
    band: tuple[float, int] | None = None,
    from_zero: bool = True,
) -> str:
    """Lines over a common x axis that starts at 0.

    Args:
        form: how a y value reads, on the axis and in tooltips; by default with the digits that tell ticks apart.
        levels: named horizontal lines, the first dashed, the second dotted.
        band: shade from 0 to this x in the colour of this number: what came before a line starts.
        from_zero: whether the y axis starts at 0.
    """
    lines = [line if len(line.points) <= MAX_POINTS else _thinned(line) for line in lines if line.points]
    values = [value for line in lines for value in _reach(line)] + [value for _, value in levels]
    xs = [x for line in lines for x, _ in line.points] + ([band[0]] if band else [])
    x_ticks, y_ticks = _ticks(0, max(xs)), _ticks(0 if from_zero else min(values), max(values))
    form = form or _plain(y_ticks[1] - y_ticks[0])
    x_at = _scale(0, max(x_ticks[-1], max(xs)), LEFT, WIDTH - RIGHT)
    y_at = _scale(min(y_ticks[0], *values), max(y_ticks[-1], *values), HEIGHT - BOTTOM, TOP)
    parts = []
    if band:
        parts.append(
            f'<rect x="{LEFT}" y="{TOP}" width="{x_at(band[0]) - LEFT:.1f}" height="{HEIGHT - BOTTOM - TOP}" '
            f'class="band" fill="var(--s{band[1] % SERIES})"/>'
        )
    parts += [_axes(x_ticks, y_ticks, x_at, y_at, form, x_label, HEIGHT), *_levels(levels, y_at, form)]
    for line in lines:
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in line.points)
        colour = f"var(--s{line.colour % SERIES})"
        if line.spread:
            rim = [(x, y + half) for (x, y), half in zip(line.points, line.spread)]
            rim += [(x, y - half) for (x, y), half in reversed(list(zip(line.points, line.spread)))]
            around = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in rim)
            parts.append(f'<polygon points="{around}" class="band" fill="{colour}"/>')
        parts.append(
            f'<polyline points="{path}" class="line" stroke="{colour}"><title>{escape(line.name)}</title></polyline>'
        )
        if line.marks or len(line.points) == 1:
            parts += [
                f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5" fill="{colour}"><title>{escape(line.name)}, '
                f"{escape(x_label)} {x:g}: {form(y)}</title></circle>"
                for x, y in line.points
            ]
    return _svg(parts, HEIGHT, f"{y_label} against {x_label}")


def bar_chart(
    groups: Sequence[tuple[str, Sequence[float | None]]],
    names: Sequence[tuple[str, int]],
    x_label: str,
    y_label: str,
    form: Callable[[float], str],
    levels: Sequence[tuple[str, float]] = (),
) -> str:
    """Groups of bars from 0, one bar per (name, number of its colour)."""
    values = [value for _, row in groups for value in row if value is not None] + [value for _, value in levels]
    ticks = _ticks(0, max(values))
    y_at = _scale(0, max(ticks[-1], max(values)), HEIGHT - BOTTOM, TOP)
    step = (WIDTH - RIGHT - LEFT) / len(groups)
    width = min(34.0, step * 0.8 / len(names))
    parts = [_axes([], ticks, lambda x: x, y_at, form, x_label, HEIGHT)]
    every = math.ceil(len(groups) / 10)
    for place, (group, row) in enumerate(groups):
        middle = LEFT + (place + 0.5) * step
        for number, value in enumerate(row):
            if value is None:
                continue
            (name, colour), x, y = names[number], middle + (number - len(names) / 2) * width, y_at(value)
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{HEIGHT - BOTTOM - y:.1f}" '
                f'fill="var(--s{colour % SERIES})"><title>{escape(group)}, {escape(name)}: {form(value)}</title></rect>'
            )
        if place % every == 0:
            parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 16}" class="x">{escape(group)}</text>')
    return _svg([*parts, *_levels(levels, y_at, form)], HEIGHT, f"{y_label} by {x_label}")


def load_map(steps: Sequence[tuple[int, Sequence[float]]]) -> str:
    """Heat map of one layer: experts down, training steps across, colour = load as share of an even one."""
    columns = [row for _, row in _binned(steps, 90)]
    experts = len(columns[0])
    row_height = max(4, min(22, 176 // experts))
    height = TOP + row_height * experts + BOTTOM
    heat = Image.new("RGBA", (len(columns), experts))
    heat.putdata([_shade(column[expert]) for expert in range(experts) for column in columns])
    last = steps[-1][0]
    x_at = _scale(0, last, LEFT, WIDTH - RIGHT)
    first = x_at(steps[0][0]) if len(steps) > 1 else LEFT
    parts = [
        f'<image x="{first:.1f}" y="{TOP}" width="{WIDTH - RIGHT - first:.1f}" height="{row_height * experts}" '
        f'preserveAspectRatio="none" class="pixels" href="{png_uri(heat)}"/>',
        _axes([tick for tick in _ticks(0, last) if tick <= last], [], x_at, lambda y: y, str, "optimiser step", height),
    ]
    every = math.ceil(16 / row_height)
    parts += [
        f'<text x="{LEFT - 6}" y="{TOP + (expert + 0.5) * row_height + 4:.1f}" class="y">{expert}</text>'
        for expert in range(0, experts, every)
    ]
    middle = TOP + row_height * experts / 2
    parts.append(f'<text transform="translate(13 {middle:.1f}) rotate(-90)" class="x">expert</text>')
    return _svg(parts, height, "load of every expert over training")


def matrix(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """Confusion matrix at its natural size: rows are the truth, columns the prediction, counts where they fit."""
    cell = 30 if len(labels) <= 12 else 22
    names = [label if len(label) <= 14 else label[:13] + "…" for label in labels]
    margin = 30 + 8 * max(map(len, names))
    size = margin + cell * len(labels) + 4
    parts = [
        f'<text x="{margin + cell * len(labels) / 2}" y="14" class="x">predicted</text>',
        f'<text transform="translate(14 {margin + cell * len(labels) / 2}) rotate(-90)" class="x">true class</text>',
    ]
    for row, line in enumerate(counts):
        y, whole = margin + row * cell, max(1, sum(line))
        parts.append(f'<text x="{margin - 6}" y="{y + cell / 2 + 4}" class="y">{escape(names[row])}</text>')
        parts.append(
            f'<text transform="translate({margin + (row + 0.5) * cell + 4} {margin - 6}) rotate(-90)" class="up">'
            f"{escape(names[row])}</text>"
        )
        for column, count in enumerate(line):
            colour = f'"var(--right)" opacity="{max(0.08, count / whole):.2f}"'
            if row != column:
                colour = f'"var(--wrong)" opacity="{min(1, 0.25 + count / whole):.2f}"' if count else '"var(--empty)"'
            x = margin + column * cell
            parts.append(
                f'<rect x="{x + 0.5}" y="{y + 0.5}" width="{cell - 1}" height="{cell - 1}" fill={colour}>'
                f"<title>{count} of {sum(line)} {escape(labels[row])} taken for {escape(labels[column])}</title></rect>"
            )
            if count and cell >= 30:
                parts.append(f'<text x="{x + cell / 2}" y="{y + cell / 2 + 4}" class="x count">{count}</text>')
    return (
        f'<svg viewBox="0 0 {size} {size}" width="{size}" height="{size}" class="fixed" role="img" '
        f'aria-label="confusion matrix">{"".join(parts)}</svg>'
    )


def png_uri(picture: Image.Image) -> str:
    """A picture as a data URI."""
    with io.BytesIO() as file:
        picture.save(file, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _shade(load: float) -> tuple[int, int, int, int]:
    """Transparent for an even share, full blue for none, full orange for double and more."""
    return (*(BUSY if load > 1 else IDLE), round(255 * min(1.0, abs(load - 1))))


def _svg(parts: Sequence[str], height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


def _levels(levels: Sequence[tuple[str, float]], y_at: Scale, form: Callable[[float], str]) -> Iterator[str]:
    for place, (name, value) in enumerate(levels):
        yield (
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(value):.1f}" y2="{y_at(value):.1f}" '
            f'class="level{" dotted" * (place > 0)}"><title>{escape(name)}: {form(value)}</title></line>'
        )


def _axes(
    x_ticks: Sequence[float], y_ticks: Sequence[float], x_at: Scale, y_at: Scale, form: Callable[[float], str],
    x_label: str, height: float,
) -> str:  # fmt: skip
    floor = height - BOTTOM
    parts = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}" class="axis"/>']
    for tick in y_ticks:
        y = y_at(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="y">{form(tick)}</text>')
    for tick in x_ticks:
        shown = f"{tick / 1000:g}k" if tick >= 10_000 else f"{tick:g}"
        parts.append(f'<text x="{x_at(tick):.1f}" y="{floor + 16}" class="x">{shown}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 6}" class="x label">{escape(x_label)}</text>')
    return "".join(parts)


def _plain(step: float) -> Callable[[float], str]:
    """How numbers read that lie `step` apart: 2.305, or 4.0e-4."""
    if step < 1e-3:
        return lambda value: f"{value:.1e}".replace("e-0", "e-") if value else "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return lambda value: f"{value:.{decimals}f}"


def _scale(low: float, high: float, start: float, stop: float) -> Scale:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that span low..high."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, max(last, first + 1) + 1)]


def _reach(line: Line) -> list[float]:
    """The y values a line needs room for."""
    halves = line.spread or [0.0] * len(line.points)
    return [y + sign * half for (_, y), half in zip(line.points, halves) for sign in (-1, 1)]


def _thinned(line: Line) -> Line:
    points = [(step, row[0]) for step, row in _binned([(x, [y]) for x, y in line.points], MAX_POINTS)]
    return Line(line.name, points, line.colour)


def _binned(rows: Sequence[tuple[float, Sequence[float]]], most: int) -> list[tuple[float, list[float]]]:
    """At most `most` rows, each the mean of its neighbours, under the last x of them."""
    size = math.ceil(len(rows) / most)
    groups = (rows[start : start + size] for start in range(0, len(rows), size))
    return [(group[-1][0], [sum(v) / len(group) for v in zip(*(row for _, row in group))]) for group in groups]
