"""What an evaluation is judged by: accuracy; where there are no classes how far the final tokens are from the
teacher's; of a detector COCO's AP. The one place that knows which of them a result has. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A figure of an evaluation, which others are named after: hybrid_<key>, start_<key>, <key>_ema.

    Attributes:
        key: in metrics.jsonl and result.json.
        name: for people.
        higher_is_better: whether a model with more of it is the better one.
    """

    key: str
    name: str
    higher_is_better: bool

    def shown(self, value: float) -> str:
        """A value for people: 91.3% or 0.0871."""
        return f"{value:.1%}" if self.higher_is_better else f"{value:.3g}"

    def score(self, value: float) -> float:
        """A number of which more is better."""
        return value if self.higher_is_better else -value


ACCURACY = Measure("accuracy", "accuracy", higher_is_better=True)
RELATIVE_ERROR = Measure("relative_error", "relative error", higher_is_better=False)
AP = Measure("ap", "AP", higher_is_better=True)  # COCO's, of boxes at IoU 0.50:0.95
BESIDE = {"accuracy": "loss", "relative_error": "cosine", "ap": "ap50"}  # what every evaluation has beside its measure


def measure_of(metrics: Mapping[str, Any]) -> Measure:
    """The measure of an evaluation, a metrics row or the metrics of a result."""
    for measure in (RELATIVE_ERROR, AP):
        if measure.key in metrics:
            return measure
    return ACCURACY


def score_of(evaluation: Mapping[str, float]) -> float:
    """What checkpoints are compared by: more is better."""
    measure = measure_of(evaluation)
    return measure.score(evaluation[measure.key])


def headline(evaluation: Mapping[str, Any]) -> str:
    """An evaluation in a few words: "accuracy 91.3%", or "relative error 0.0871, cosine 0.956"."""
    measure = measure_of(evaluation)
    text = f"{measure.name} {measure.shown(evaluation[measure.key])}"
    if measure is RELATIVE_ERROR:
        text += f", cosine {evaluation['cosine']:.3f}"
    if measure is AP:
        text += f", AP50 {evaluation['ap50']:.1%}"
    return text
