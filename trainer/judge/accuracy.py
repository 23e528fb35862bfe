"""Evaluation accuracy: classification of images whose classes are the model's, some of them, or others by a table.

ImageNet-R, -A, -V2, -Sketch and ObjectNet are such sets (Hendrycks et al. 2021, arXiv 2006.16241 and 1907.07174; Recht
et al. 2019; Wang et al. 2019; Barbu et al. 2019). As for ImageNet-R, a class is told among those of the set, by the
logits of those alone; "top-1 of all classes" is told among all the model's classes. N images, K classes of the set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import log_softmax

from trainer.config.tasks import TaskSpec
from trainer.judge.classes import Placed, place_classes
from trainer.judge.images import measured_images
from trainer.judge.intervals import BINS, Figure, bins_of, calibration_error, mean_with_interval
from trainer.judge.outputs import Bench, Outputs
from trainer.judge.subjects import Subject, at_size
from trainer.judge.task import Measured

TOP = 5


def prepare(subject: Subject, spec: TaskSpec, bench: Bench) -> Callable[[], Measured]:
    """Find the classes of the images among the model's; see task.py."""
    subject = at_size(subject, spec.settings.image_size)
    source = measured_images(spec.data(bench.data), spec.settings.split)
    placed = place_classes(subject, source, spec.settings)

    def measure() -> Measured:
        outputs = bench.logits(subject, source)
        return judged(outputs, placed, bench, source.name)

    return measure


def judged(outputs: Outputs, placed: Placed, bench: Bench, where: str) -> Measured:
    """What logits say of images.

    Raises:
        ValueError: no image is of a class that the model has.
    """
    all_logits, truth = counted(outputs, placed, where)
    images_N = np.arange(len(truth))
    logits_NR = all_logits[:, placed.rows]
    told_N = placed.told(all_logits)
    correct_N = told_N == truth
    # the probability of a class is that of all its logits together
    log_probability_NR = log_softmax(logits_NR.astype(np.float64), axis=1)
    log_probability_NK = placed.of_classes(log_probability_NR, np.logaddexp)
    confidence_N = np.exp(log_probability_NK[images_N, told_N])
    own_logit_N = placed.of_classes(logits_NR, np.maximum)[images_N, truth]

    def mean(values: np.ndarray) -> Figure:
        return mean_with_interval(values.astype(np.float64), bench.resamples, bench.seed)

    figures = {"top-1": mean(correct_N)}
    if len(placed.rows) > TOP:
        # how many classes of the model are surer than the right one, or the surest of the right ones
        figures["top-5"] = mean((logits_NR > own_logit_N[:, None]).sum(axis=1) < TOP)
    if len(placed.rows) < all_logits.shape[1]:
        class_of_all = np.full(all_logits.shape[1], -1)
        class_of_all[placed.rows] = placed.class_of
        figures["top-1 of all classes"] = mean(class_of_all[all_logits.argmax(axis=1)] == truth)
    per_class = _per_class(truth, correct_N, placed)
    figures["mean of classes"] = Figure(float(np.mean([row["accuracy"] for row in per_class if row["images"]])))
    figures["error of calibration"] = calibration_error(confidence_N, correct_N, bench.resamples, bench.seed)
    wrong_N = ~correct_N
    if wrong_N.any():
        figures["confidence of wrong answers"] = mean(confidence_N[wrong_N])
    classes = f"the logits of the {len(placed.rows)} classes of the data, of {all_logits.shape[1]}"
    if len(placed.rows) == all_logits.shape[1]:
        classes = f"the logits of all {len(placed.rows)} classes"
    if not placed.one_to_one:
        classes = (
            f"the logits of {len(placed.rows)} classes, of {all_logits.shape[1]}, that stand for the "
            f"{len(placed.names)} of the data: any of them is right"
        )
    cross_entropy = float(-log_probability_NK[images_N, truth].mean())
    details = {
        "over": classes,
        "classes": per_class,
        "reliability": _reliability(confidence_N, correct_N),
        "cross_entropy": cross_entropy,
        "images_of_other_classes": len(outputs.targets) - len(truth),
        "note": placed.note,
    }
    return Measured(figures, len(truth), f"{where}: {len(truth):,} images, over {classes}", details)


def counted(outputs: Outputs, placed: Placed, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, all classes) and places among the K classes (N,) of the images that count."""
    truth = placed.number_of[outputs.targets]
    counts = truth >= 0
    if not counts.any():
        raise ValueError(f"no image of {where} is of a class that the model has")
    return outputs.values[counts], truth[counts]


def _per_class(truth: np.ndarray, correct: np.ndarray, placed: Placed) -> list[dict[str, Any]]:
    images_K = np.bincount(truth, minlength=len(placed.names))
    correct_K = np.bincount(truth, weights=correct, minlength=len(placed.names))
    rows = []
    for name, images, right in zip(placed.names, images_K.tolist(), correct_K.tolist()):
        rows.append({"name": name, "images": images, "accuracy": right / images if images else None})
    return rows


def _reliability(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, float]]:
    """Per bin of confidence that has images: how many, their mean confidence and accuracy."""
    bins = bins_of(confidence)
    rows = []
    for number in range(BINS):
        inside = bins == number
        if inside.any():
            row = {"images": int(inside.sum()), "confidence": float(confidence[inside].mean())}
            rows.append(row | {"accuracy": float(correct[inside].mean())})
    return rows
