"""Several models by several evaluations: everything is checked, then measured; plain values for JSON and pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from trainer.config.evaluate import ALEXNET
from trainer.config.knobs import close
from trainer.config.tasks import TaskSpec
from trainer.judge.corruptions import open_cells, with_reference
from trainer.judge.fewshot import draw_episodes
from trainer.judge.images import learned_and_measured, measured_images
from trainer.judge.outputs import Bench
from trainer.judge.subjects import Subject
from trainer.judge.task import Measured, prepare_of

log = logging.getLogger(__name__)
VERSION = 1  # of what `judge` gives


def judge(subjects: Sequence[Subject], specs: Sequence[TaskSpec], bench: Bench) -> dict[str, Any]:
    """What the evaluations say of the models (collective).

    Returns:
        version, seed, resamples, dtype, seconds; models: name, source, kind, classes, image_size, parameters and flops
        of each; tasks: text and kind of each, and results: by the model's name, figures ({name: {value, low, high}}),
        images, what, details.

    Raises:
        ValueError: on all ranks, before anything is measured: an evaluation that a model or its images do not fit.
    """
    started = time.perf_counter()
    ready: list[dict[str, Callable[[], Measured]]] = []
    with bench.dist.together():
        _check_references(subjects, specs)
        for spec in specs:
            ready.append({subject.name: prepare_of(spec.kind)(subject, spec, bench) for subject in subjects})
    tasks = []
    for spec, measures in zip(specs, ready):
        measured = {}
        for name, measure in measures.items():
            begun = time.perf_counter()
            measured[name] = measure()
            if bench.dist.main:
                log.info("%s: %s in %.1f s", spec.text, name, time.perf_counter() - begun)
        if spec.kind == "corruptions":
            measured = with_reference(measured, spec.settings.reference)
        results = {name: asdict(result) for name, result in measured.items()}
        tasks.append({"text": spec.text, "kind": spec.kind, "results": results})
    return {
        "version": VERSION,
        "seed": bench.seed,
        "resamples": bench.resamples,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "seconds": time.perf_counter() - started,
        "models": [_about(subject) for subject in subjects],
        "tasks": tasks,
    }


def check_images(spec: TaskSpec, bench: Bench) -> None:
    """Whether the images of an evaluation are there, and enough of them, before there is a model to judge.

    Raises:
        ValueError: they are not; or the package for corruptions is missing.
    """
    settings = spec.settings
    if spec.kind == "corruptions":
        open_cells(spec, bench)
    elif spec.kind in ("knn", "probe"):
        learned_and_measured(spec, bench.data)
    else:
        source = measured_images(spec.data(bench.data), settings.split)
        if spec.kind == "fewshot":
            draw_episodes(source, settings, bench.seed)


def _about(subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.name,
        "source": subject.source,
        "kind": subject.kind,
        "classes": subject.num_classes,
        "image_size": subject.preprocessing.image_size,
        **subject.size,
    }


def _check_references(subjects: Sequence[Subject], specs: Sequence[TaskSpec]) -> None:
    names = [subject.name for subject in subjects]
    for spec in specs:
        reference = getattr(spec.settings, "reference", "")
        if reference and reference not in (*names, ALEXNET):
            raise ValueError(
                f"evaluation {spec.text!r}: reference is {reference!r}, expected one of the models "
                f"({', '.join(names)}) or {ALEXNET}. {close(reference, (*names, ALEXNET))}"
            )
