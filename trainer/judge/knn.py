"""Evaluation knn: the class that the nearest training images vote for, by features of a model without its head.

As DINO does it (Caron et al. 2021, arXiv 2104.14294): 20 neighbours by cosine, votes of exp(cosine / 0.07). The data
set need not be the one the model was trained on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainer.config.tasks import TaskSpec
from trainer.evaluation.pooled import NEIGHBOURS, TRAIN_IMAGES, nearest_classes
from trainer.judge.images import learned_and_measured
from trainer.judge.intervals import mean_with_interval
from trainer.judge.outputs import Bench
from trainer.judge.subjects import Subject, at_size
from trainer.judge.task import Measured


def prepare(subject: Subject, spec: TaskSpec, bench: Bench) -> Callable[[], Measured]:
    """Open training and validation images; see task.py."""
    subject = at_size(subject, spec.settings.image_size)
    train, val = learned_and_measured(spec, bench.data)

    def measure() -> Measured:
        learned = bench.features(subject, train.spread(TRAIN_IMAGES))
        told = bench.features(subject, val)
        predicted = nearest_classes(
            torch.from_numpy(learned.values),
            torch.from_numpy(learned.targets),
            torch.from_numpy(told.values),
            len(train.labels),
        )
        correct = (predicted.numpy() == told.targets).astype(float)
        figures = {"k-NN accuracy": mean_with_interval(correct, bench.resamples, bench.seed)}
        neighbours = min(NEIGHBOURS, len(learned.values))
        what = f"{val.name}: {len(correct):,} images by {neighbours} neighbours among {len(learned.values):,}"
        return Measured(figures, len(correct), what)

    return measure
