"""The shell of the report's pages: head and style, tables, figures, and how numbers read. Text in, text out.

A page is one file without scripts or anything from elsewhere, and forbids itself to load anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from trainer.report.data import FLOP_UNITS
from trainer.report.svg import SERIES

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = Path(__file__).with_name("report.css")


def page(title: str, top: Sequence[str], sections: Mapping[str, str]) -> str:
    """A self-contained page: head, what stands at the top, a table of contents, the sections that are not empty."""
    sections = {head: body for head, body in sections.items() if body}
    anchors = {head: head.lower().replace(" ", "-") for head in sections}
    links = "".join(f'<a href="#{anchor}">{head}</a>' for head, anchor in anchors.items())
    body = "".join(f'<section><h2 id="{anchors[head]}">{head}</h2>{body}</section>' for head, body in sections.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE.read_text()}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>{''.join(top)}<nav>{links}</nav>{body}</main></body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    """A table that scrolls sideways on a phone; cells are HTML, columns in `text` (and the first) to the left."""
    classes = ['class="text"' if column in text else "" for column in range(len(head))]
    heads = "".join(f"<th {kind}>{cell}</th>" for cell, kind in zip(head, classes))
    lines = ("".join(f"<td {kind}>{cell}</td>" for cell, kind in zip(row, classes)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(title: str, picture: str, caption: str, legend: Sequence[tuple[str, str]] = ()) -> str:
    """A titled picture, its legend (name, kind) and one sentence.

    The kind of a legend's entry is "3" (colour number 3), "pale 3", "dash" or "dot".
    """
    items = []
    for name, kind in legend:
        words = [word for word in kind.split() if not word.isdigit()]
        colour = "".join(f' style="--c: var(--s{int(word) % SERIES})"' for word in kind.split() if word.isdigit())
        items.append(f'<li class="{" ".join(words)}"{colour}>{escape(name)}</li>')
    listed = f'<ul class="legend">{"".join(items)}</ul>' if items else ""
    return f"<figure><h3>{escape(title)}</h3>{picture}{listed}<figcaption>{caption}</figcaption></figure>"


def figures(pictures: Sequence[str]) -> str:
    """Pictures side by side where there is room."""
    return f'<div class="figures">{"".join(pictures)}</div>' if pictures else ""


def percent(value: float | None) -> str:
    """0.125 -> 12.5%."""
    return "–" if value is None else f"{100 * value:.1f}%"


def percent_tick(value: float) -> str:
    """0.2 -> 20%, on an axis."""
    return f"{100 * value:.3g}%"


def flops(value: float | None) -> str:
    """2.3e14 -> 230 TFLOP."""
    if value is None:
        return "–"
    unit = next((unit for unit in FLOP_UNITS if unit <= value), 1.0)
    return f"{value / unit:.3g} {FLOP_UNITS[unit]}"


def duration(seconds: float | None) -> str:
    """3723 -> 1 h 2 min."""
    if seconds is None:
        return "–"
    minutes, hours = divmod(round(seconds), 60)[0], round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{seconds:.1f} s"


def gigabytes(value: float | None) -> str:
    """Bytes as GB or MB."""
    if value is None:
        return "–"
    return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"
