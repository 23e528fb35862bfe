"""A section of a run's page for students that are circuits: their graph, who listens to whom, what pruning costs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from trainer.report.charts import Line, LineChart
from trainer.report.page import figure, percent, percent_tick, table

SIDE = 192  # pixels of a matrix
GAP = 16  # between two, in the picture of a card
DARK = (0, 72, 130)  # of its largest value
MATRICES = {
    "prior": "the graph asked for",
    "links": "links after training",
    "mass_before": "attention before training",
    "mass_after": "attention after training",
    "use": "mediators an image uses",
}


def circuit_section(analysis: Mapping[str, Any] | None, accuracy: float | None) -> str:
    """The circuit, and accuracy against the share of mediators kept.

    Args:
        accuracy: of the whole student.
    """
    if not analysis or "circuit" not in analysis:
        return ""
    found = analysis["circuit"]
    heads = ""
    cells = ""
    for name, title in MATRICES.items():
        heads += f"<th>{title}</th>"
        source = _pixels(found[name])
        cells += f'<td><img alt="{title}" class="pixels" width="{SIDE}" height="{SIDE}" src="{source}"></td>'
    rows = []
    for name, when in (("fit", "before training"), ("trained", "after training")):
        rows.append([when, percent(found[name]["recall"]), percent(found[name]["precision"])])
    text = (
        f"<p>The mediators start from a {escape(str(found['graph']))} graph of {found['edges']:,} edges. Dark is most. "
        "In links and attention a row is a mediator that hears, a column one that sends; attention has the input "
        "latents as its first columns, and is a mean over images, heads and propagators. In the last matrix a row is a "
        "validation image, and its dark columns are the mediators that the read-out listens to. Evaluation is "
        f"{escape(str(found['evaluation']))}.</p>"
        f'<div class="scroll"><table class="maps"><thead><tr>{heads}</tr></thead>'
        f"<tbody><tr>{cells}</tr></tbody></table></div>"
    )
    text += table(["the graph in the kernel", "edges kept", "of the links, edges"], rows)
    return text + _pruned(analysis.get("smaller", {}), accuracy)


def circuit_picture(analysis: Mapping[str, Any] | None) -> tuple[bytes, str] | None:
    """The matrices side by side as one PNG for a model card, and what they are; None where there is no circuit."""
    if not analysis or "circuit" not in analysis:
        return None
    found = analysis["circuit"]
    step = SIDE + GAP
    sheet = Image.new("RGB", (step * len(MATRICES) - GAP, SIDE), "white")
    for place, name in enumerate(MATRICES):
        sheet.paste(_drawn(found[name]).resize((SIDE, SIDE), Image.Resampling.NEAREST), (place * step, 0))
    text = (
        f"From left to right: {', '.join(MATRICES.values())}. Dark is most. The mediators started from a "
        f"{found['graph']} graph of {found['edges']:,} edges. In links and attention a row is a mediator that hears, a "
        "column one that sends; in the last matrix a row is a validation image, a column a mediator that the read-out "
        "listens to."
    )
    return _png(sheet), text


def _pruned(smaller: Mapping[str, float], accuracy: float | None) -> str:
    """Accuracies by the share of mediators kept, best connected first."""
    if not smaller or accuracy is None:
        return ""
    points = [(float(kept.removesuffix("%")), value) for kept, value in smaller.items()]
    points = sorted([*points, (100.0, accuracy)])
    line = Line("accuracy", points, 0, marks=True)
    chart = LineChart(
        "Accuracy by mediators kept",
        [line],
        "% of the mediators, best connected first",
        "accuracy",
        percent_tick,
        with_legend=False,
    )
    said = ", ".join(f"{percent(value)} with {kept:g}%" for kept, value in points)
    drawn = figure(chart, f"Without any training after the others were cut off: {said}.")
    return drawn or f"<p>Accuracy by mediators kept: {said}.</p>"


def _pixels(matrix: Sequence[Sequence[float]]) -> str:
    """A matrix as the source of an <img>."""
    return "data:image/png;base64," + base64.b64encode(_png(_drawn(matrix))).decode()


def _drawn(matrix: Sequence[Sequence[float]]) -> Image.Image:
    """A matrix as a picture of one pixel a value, white = 0, dark = its largest."""
    most = max(max(row) for row in matrix) or 1.0
    picture = Image.new("RGB", (len(matrix[0]), len(matrix)))
    values = [value / most for row in matrix for value in row]
    picture.putdata([tuple(round(255 - share * (255 - dark)) for dark in DARK) for share in values])
    return picture


def _png(picture: Image.Image) -> bytes:
    with io.BytesIO() as file:
        picture.save(file, "PNG")
        return file.getvalue()
