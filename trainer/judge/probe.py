"""Evaluation probe: a linear classifier on the features of a frozen model, for the classes of any data set.

Multinomial logistic regression, its strength chosen by cross-validation on the training images alone
(trainer/evaluation/linear.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from trainer.config.tasks import TaskSpec
from trainer.evaluation.linear import fit_linear
from trainer.evaluation.pooled import TRAIN_IMAGES
from trainer.judge.images import learned_and_measured
from trainer.judge.intervals import mean_with_interval
from trainer.judge.outputs import Bench
from trainer.judge.subjects import Subject, at_size
from trainer.judge.task import Measured


def prepare(subject: Subject, spec: TaskSpec, bench: Bench) -> Callable[[], Measured]:
    """Open training and validation images; see task.py.

    Raises:
        ValueError: no class has two training images.
    """
    subject = at_size(subject, spec.settings.image_size)
    train, val = learned_and_measured(spec, bench.data)
    if np.bincount(train.targets).max() < 2:
        raise ValueError(f"{train.name} has one image of each class: a probe needs two of one at least")

    def measure() -> Measured:
        learned = bench.features(subject, train.spread(TRAIN_IMAGES))
        told = bench.features(subject, val)
        fit = fit_linear(
            torch.from_numpy(learned.values), torch.from_numpy(learned.targets), len(train.labels), seed=bench.seed
        )
        predicted = (torch.from_numpy(told.values) @ fit.weight.T + fit.bias).argmax(1).numpy()
        correct = (predicted == told.targets).astype(float)
        figures = {"linear probe accuracy": mean_with_interval(correct, bench.resamples, bench.seed)}
        what = f"{val.name}: {len(correct):,} images by a probe of {len(learned.values):,}, L2 {fit.regularisation:g}"
        return Measured(figures, len(correct), what)

    return measure
