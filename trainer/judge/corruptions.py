"""Evaluation corruptions: classification of the same images under 15 kinds of corruption at 5 severities.

After Hendrycks and Dietterich 2019 (arXiv 1903.12261): the error of a kind is summed over its severities and divided by
that of a reference, and mCE is the mean of that over the kinds. The images are corrupted on the fly, each by draws of
its own, or read from a folder STORED/<kind>/<severity>/<class>/ as ImageNet-C has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from models.files.places import expanded
from trainer.config.data import DataConfig
from trainer.config.evaluate import ALEXNET, CORRUPTIONS, CorruptionsConfig
from trainer.config.tasks import TaskSpec
from trainer.data.base import ImageSource
from trainer.judge.accuracy import counted
from trainer.judge.classes import Placed, place_classes
from trainer.judge.corrupt import Corruption
from trainer.judge.images import measured_images
from trainer.judge.intervals import Figure, mean_with_interval
from trainer.judge.outputs import Bench, Outputs
from trainer.judge.subjects import Subject, at_size
from trainer.judge.task import Measured

# mean error of AlexNet over the 5 severities of each kind, per cent: what the published mCE is relative to (its
# authors' table, in the order of CORRUPTIONS)
ALEXNET_ERRORS = dict(
    zip(CORRUPTIONS, (88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7))
)
REFERENCE = "corruption error (mCE)"


def prepare(subject: Subject, spec: TaskSpec, bench: Bench) -> Callable[[], Measured]:
    """Find the classes, and every folder of stored images; see task.py."""
    settings: CorruptionsConfig = spec.settings
    subject = at_size(subject, settings.image_size)
    cells = open_cells(spec, bench)
    found: dict[str, Placed] = {}  # one for all cells where they share their images
    for source, _ in cells.values():
        if source.name not in found:
            found[source.name] = place_classes(subject, source, settings)
    clean = None
    if not settings.stored:
        clean = next(iter(cells.values()))[0]

    def measure() -> Measured:
        correct = {}
        for cell, (source, change) in cells.items():
            correct[cell] = _correct(bench.logits(subject, source, change), found[source.name], source.name)
        undisturbed = None
        if clean is not None:
            undisturbed = _correct(bench.logits(subject, clean), found[clean.name], clean.name)
        return _measured(correct, undisturbed, spec, bench)

    return measure


def open_cells(spec: TaskSpec, bench: Bench) -> dict[tuple[str, int], tuple[ImageSource, Corruption | None]]:
    """Images of every (kind, severity), and what is done to them.

    Raises:
        ValueError: a folder that is not there, or the package is not installed.
    """
    settings: CorruptionsConfig = spec.settings
    keys = [(kind, severity) for kind in settings.kinds for severity in settings.severities]
    if settings.stored:
        root = Path(expanded(settings.stored))
        return {(kind, severity): (_stored(root / kind / str(severity), spec), None) for kind, severity in keys}
    source = measured_images(spec.data(bench.data), settings.split)
    cells = {}
    for kind, severity in keys:
        cells[kind, severity] = source, Corruption(kind, severity, bench.seed, settings.side)
    return cells


def _stored(folder: Path, spec: TaskSpec) -> ImageSource:
    if not folder.is_dir():
        raise ValueError(
            f"stored={spec.settings.stored} has no folder {folder}, expected STORED/<kind>/<severity>/<class>/: leave "
            "out the kinds and severities that are not there"
        )
    data = spec.data(DataConfig())
    return measured_images(replace(data, source="folder", path=str(folder)))


def _correct(outputs: Outputs, placed: Placed, where: str) -> np.ndarray:
    logits, truth = counted(outputs, placed, where)
    return (placed.told(logits) == truth).astype(np.float64)


def _measured(
    correct: Mapping[tuple[str, int], np.ndarray], clean: np.ndarray | None, spec: TaskSpec, bench: Bench
) -> Measured:
    settings: CorruptionsConfig = spec.settings
    images = min(map(len, correct.values()))
    same_images = all(len(values) == images for values in correct.values())
    figures = {}
    if clean is not None:
        figures["top-1 undisturbed"] = mean_with_interval(clean, bench.resamples, bench.seed)
    if same_images:
        # an image is resampled with all its corruptions
        per_image = np.mean(list(correct.values()), axis=0)
        figures["top-1 corrupted"] = mean_with_interval(per_image, bench.resamples, bench.seed)
    else:
        figures["top-1 corrupted"] = Figure(float(np.mean([values.mean() for values in correct.values()])))
    errors = {}
    for kind in settings.kinds:
        errors[kind] = float(np.mean([1 - correct[kind, severity].mean() for severity in settings.severities]))
        figures[f"error under {kind}"] = Figure(errors[kind])
    table = {kind: {str(s): float(correct[kind, s].mean()) for s in settings.severities} for kind in settings.kinds}
    where = settings.stored or f"corrupted on the fly, seed {bench.seed}"
    severities = ", ".join(map(str, settings.severities))
    what = f"{images:,} images {where}: {len(settings.kinds)} kinds at severities {severities}"
    return Measured(figures, images, what, {"errors": errors, "accuracy": table})


def with_reference(measured: Mapping[str, Measured], reference: str) -> dict[str, Measured]:
    """The same models with their mCE, relative to one of them or to what was published.

    Args:
        measured: by the name of the model, in order.
        reference: a name of these; ALEXNET; empty = the first.
    """
    if reference == ALEXNET:
        errors = {kind: error / 100 for kind, error in ALEXNET_ERRORS.items()}
    else:
        errors = measured[reference or next(iter(measured))].details["errors"]
    done = {}
    for name, result in measured.items():
        own = result.details["errors"]
        # no error of the reference, nothing to be relative to
        ratios = [own[kind] / errors[kind] for kind in own if errors[kind]]
        figures = dict(result.figures)
        if ratios:
            figures = {REFERENCE: Figure(float(np.mean(ratios)))} | figures
        against = reference or next(iter(measured))
        done[name] = replace(result, figures=figures, details=result.details | {"reference": against})
    return done
