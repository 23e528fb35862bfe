"""The shell of the report's pages: head and style, tables, figures, and how numbers read. Text in, text out.

A page is one file without scripts or anything from elsewhere, and forbids itself to load anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from types import ModuleType

from trainer.report.charts import SERIES, Chart, flop_unit, legend
from trainer.tracking.measures import Measure

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = Path(__file__).with_name("report.css")
NO_PICTURES = "No pictures: matplotlib is not installed (`pip install matplotlib`, then run the report again)."


def load_drawing() -> ModuleType | None:
    """trainer.report.drawing, None where matplotlib is not installed."""
    try:
        from trainer.report import drawing
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        return None
    return drawing


def page(title: str, top: Sequence[str], sections: Mapping[str, str]) -> str:
    """A self-contained page: head, what stands at the top, a table of contents, the sections that are not empty."""
    links = ""
    body = ""
    for head, text in sections.items():
        if text:
            anchor = head.lower().replace(" ", "-")
            links += f'<a href="#{anchor}">{head}</a>'
            body += f'<section><h2 id="{anchor}">{head}</h2>{text}</section>'
    note = ""
    if load_drawing() is None:
        note = f'<p class="muted">{NO_PICTURES}</p>'
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE.read_text()}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>{''.join(top)}{note}<nav>{links}</nav>{body}</main></body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    """A table that scrolls sideways on a phone; cells are HTML, columns in `text` (and the first) to the left."""
    kinds = [""] * len(head)
    for column in text:
        kinds[column] = 'class="text"'
    heads = "".join(f"<th {kind}>{cell}</th>" for cell, kind in zip(head, kinds))
    body = ""
    for row in rows:
        cells = "".join(f"<td {kind}>{cell}</td>" for cell, kind in zip(row, kinds))
        body += f"<tr>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(chart: Chart, caption: str) -> str:
    """A picture with its title, its legend and one sentence; "" where matplotlib is not installed."""
    drawing = load_drawing()
    if drawing is None:
        return ""
    items = ""
    for name, kind in legend(chart):
        style = ""
        *kinds, last = kind.split()
        if last.isdigit():
            style = f' style="--c: var(--s{int(last) % SERIES})"'
        else:
            kinds.append(last)
        items += f'<li class="{" ".join(kinds)}"{style}>{escape(name)}</li>'
    if items:
        items = f'<ul class="legend">{items}</ul>'
    picture = drawing.svg(chart)
    return f"<figure><h3>{escape(chart.title)}</h3>{picture}{items}<figcaption>{caption}</figcaption></figure>"


def figures(pictures: Sequence[str]) -> str:
    """Pictures side by side where there is room; "" when there is none."""
    drawn = "".join(pictures)
    return f'<div class="figures">{drawn}</div>' if drawn else ""


def percent(value: float | None) -> str:
    """0.125 -> 12.5%."""
    return "–" if value is None else f"{100 * value:.1f}%"


def reading(measure: Measure, value: float | None) -> str:
    """A value of a measure for people: 12.5%, or 0.0871."""
    return "–" if value is None else measure.shown(value)


def tick(measure: Measure) -> Callable[[float], str]:
    """How the values of a measure stand on an axis."""
    return percent_tick if measure.higher_is_better else "{:.3g}".format


def percent_tick(value: float) -> str:
    """0.2 -> 20%, on an axis."""
    return f"{100 * value:.3g}%"


def flops(value: float | None) -> str:
    """2.3e14 -> 230 TFLOP."""
    if value is None:
        return "–"
    size, name = flop_unit(value)
    return f"{value / size:.3g} {name}"


def duration(seconds: float | None) -> str:
    """3723 -> 1 h 2 min."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours = minutes // 60
    if hours:
        return f"{hours} h {minutes % 60} min"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{seconds:.1f} s"


def gigabytes(value: float | None) -> str:
    """Bytes as GB or MB."""
    if value is None:
        return "–"
    if value >= 1e9:
        return f"{value / 1e9:.3g} GB"
    return f"{value / 1e6:.3g} MB"
