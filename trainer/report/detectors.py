"""What the reports show of detectors (phase detect): AP over the epochs, and what each came to. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from trainer.report.charts import Line, LineChart
from trainer.report.data import DETECTORS, RUNS, PhaseRecord, number
from trainer.report.page import figure, figures, percent, percent_tick, table
from trainer.tracking.measures import AP

# of an evaluation (trainer/evaluation/detection.py): its key -> what it is
FIGURES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP, small objects",
    "ap_medium": "AP, medium objects",
    "ap_large": "AP, large objects",
    "ar": "AR",
}
KINDS = {"": "boxes", "mask_": "masks"}  # what stands before a key -> whose figure it is
OF_CATEGORY = "ap/"
CAPTION = (
    "COCO's figures by pycocotools over all validation images. AP is the mean over IoU 0.50 to 0.95 and over the "
    "categories, AP50 and AP75 are at one IoU, AR is the mean recall of at most 100 objects an image. Compare only "
    "what was measured on the same images."
)

Detectors = Mapping[str, PhaseRecord]


def detectors_of(phases: Mapping[str, PhaseRecord]) -> dict[str, PhaseRecord]:
    """The detectors of a run that were begun: detect, detect_scratch, ..."""
    return {name: phases[name] for name in DETECTORS if name in phases and phases[name].status != "missing"}


def about(name: str, record: PhaseRecord) -> list[tuple[str, str]]:
    """What a detector is made of, in words: its backbone, what of it was trained, on what it was measured."""
    given = record.recipe("detect", "backbone")
    student = f"student, {RUNS.get(name.replace('detect', 'train', 1), name)}"
    trained = []
    if record.recipe("detect", "scratch"):
        trained.append("backbone started anew")
    trained.append("heads alone" if record.recipe("detect", "freeze") else "all of it")
    images = number(_evaluation(record).get("images"))
    return [
        ("backbone", str(given) if given else student),
        ("trained", ", ".join(trained)),
        ("validation images", "–" if images is None else f"{images:g}"),
    ]


def measured(detectors: Detectors) -> list[tuple[str, list[float | None]]]:
    """A row for each figure that any of the detectors has, boxes first: its name, and the value of each detector.

    An unfinished detector stands there with its last evaluation.
    """
    evaluations = [_evaluation(record) for record in detectors.values()]
    rows = []
    for prefix, kind in KINDS.items():
        named = {f"{prefix}{key}": f"{kind}: {name}" for key, name in FIGURES.items()}
        before = f"{prefix}{OF_CATEGORY}"
        for evaluation in evaluations:
            for key in evaluation:
                if key.startswith(before):
                    named[key] = f"{kind}: AP of {key.removeprefix(before)}"
        for key, name in named.items():
            values = [number(evaluation.get(key)) for evaluation in evaluations]
            if any(value is not None for value in values):
                rows.append((name, values))
    return rows


def detector_charts(detectors: Detectors) -> list[LineChart]:
    """AP of boxes, and where there are masks of masks, by the epochs of the detectors' training."""
    charts = []
    for prefix, kind in KINDS.items():
        lines = []
        for colour, (name, record) in enumerate(detectors.items()):
            curve = list(record.curve(f"{prefix}{AP.key}").items())
            if curve:
                lines.append(Line(name, curve, colour, marks=True))
        if lines:
            charts.append(LineChart(f"AP of {kind} by epochs", lines, "epochs", "AP", percent_tick))
    return charts


def detector_section(phases: Mapping[str, PhaseRecord]) -> str:
    """Pictures and one table, a column for each detector; empty without any."""
    detectors = detectors_of(phases)
    rows = measured(detectors)
    if not rows:
        return ""
    told = [about(name, record) for name, record in detectors.items()]
    body = [[escape(name), *map(percent, values)] for name, values in rows]
    for place, (what, _) in enumerate(told[0]):
        body.append([what, *(escape(words[place][1]) for words in told)])
    pictures = [
        figure(chart, "Of the evaluations on the way; the last one counts.") for chart in detector_charts(detectors)
    ]
    text = figures(pictures) + table(["", *map(escape, detectors)], body)
    return f'{text}<p class="muted">{CAPTION}</p>'


def detector_cards(detectors: Detectors) -> list[tuple[str, str, str]]:
    """(title, figure, what it is) of the AP of each detector that is finished."""
    cards = []
    for name, record in detectors.items():
        if record.metric(AP.key) is None:
            continue
        (_, backbone), *_ = about(name, record)
        title = "Detector" if name == DETECTORS[0] else f"Detector {name.removeprefix('detect_')}"
        cards.append((title, percent(record.metric(AP.key)), f"AP of boxes; backbone: {escape(backbone)}"))
    return cards


def detector_verdict(detectors: Detectors) -> str:
    """One sentence on a run that trained detectors alone."""
    best = best_detector(detectors)
    if best is None:
        return "No detector is trained to the end yet."
    name, reached = best
    (_, backbone), *_ = about(name, detectors[name])
    return f"A detector on <b>{escape(backbone)}</b> comes to <b>{percent(reached)}</b> AP of boxes."


def best_detector(detectors: Detectors) -> tuple[str, float] | None:
    """Name and AP of the finished detector with the highest AP."""
    reached = {name: record.metric(AP.key) for name, record in detectors.items()}
    known = {name: value for name, value in reached.items() if value is not None}
    if not known:
        return None
    name = max(known, key=lambda each: known[each])
    return name, known[name]


def detector_rows(detectors: Detectors) -> tuple[list[str], Sequence[Sequence[str]]]:
    """Head and rows of the same table as plain text; empty without anything measured."""
    rows = []
    for name, values in measured(detectors):
        rows.append([name, *("-" if value is None else f"{100 * value:.1f}" for value in values)])
    return ["detectors, in %", *detectors], rows


def _evaluation(record: PhaseRecord) -> Mapping[str, Any]:
    """What the result says, else the last evaluation on the way."""
    if record.result is not None:
        return record.result["metrics"]
    evaluations = [row for row in record.rows if row["kind"] == "eval"]
    return evaluations[-1] if evaluations else {}
