"""The one evaluation, of every validation image, each counted once, on any number of ranks: accuracy and loss, or where
there are no classes relative error and cosine beside the teacher.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.moe.layer import routed_layers
from models.moe.out import Out
from trainer.config.ds_config import Settings
from trainer.config.runtime import RunConfig
from trainer.data.loader import Batch, Data, eval_batches
from trainer.distributed.interrupt import HEARTBEAT
from trainer.distributed.ranks import Dist
from trainer.evaluation.counts import Classified, Compared
from trainer.objectives import Pairs
from trainer.tracking.measures import BESIDE

log = logging.getLogger(__name__)


def of_published(evaluation: dict[str, float]) -> dict[str, float]:
    """An evaluation whose figures are those of the average, which is published, where it has them.

    Those of the last weights are then called accuracy_raw and loss_raw.
    """
    published = dict(evaluation)
    for name in itertools.chain(*BESIDE.items()):
        if f"{name}_ema" in published:
            published[f"{name}_raw"] = published[name]
            published[name] = published.pop(f"{name}_ema")
    return published


def evaluate(
    objective: Any,
    data: Data,
    dtype: torch.dtype,
    batch: int,
    dist: Dist,
    observe: Callable[[Batch, Tensor, Out], None] | None = None,
) -> dict[str, float]:
    """Accuracy (0..1) and mean cross-entropy of objective.predict over every validation image, each counted once.

    Of an objective without classes, relative error and cosine of what objective.compare gives (counts.py).

    The same whatever the ranks and the batch are, also where experts have a capacity: what competes for it are always
    the same images (together_in), and no padding.
    An image whose loss is not finite counts as wrong, is left out of the mean loss, and is counted as
    "nonfinite_images" when there is one. Collective: the ranks share the images and every rank gets the same numbers.

    Args:
        batch: images per rank and forward; rounded up to whole groups of images that are routed together.
        observe: is shown every batch of this rank with its logits (B, classes), or final tokens (B, T, D), and what
            the forward told beside them (models/moe/out.py).

    Raises:
        NonFiniteLoss: on all ranks, no image has a finite loss.
        ValueError: on all ranks, no image could be read.
    """
    modules = [objective.module, *objective.frozen]
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    tells = observe is not None and bool(routed_layers(objective.module))  # other models need not take `out`
    counts = Classified(dist) if objective.classifies else Compared(dist)
    group = together_in(modules)
    if batch % group:
        batch = _whole_groups(batch, group, dist.main)
    batches = eval_batches(
        data.val,
        data.preprocessing,
        batch=batch,
        world=dist.world,
        rank=dist.rank,
        workers=data.workers,
        group=group,
    )
    with torch.no_grad():
        for padded in batches:
            HEARTBEAT.beat()
            b = padded.without_padding()
            images = b.images.to(dist.device, dtype)
            out: Out = {}
            told = (out,) if tells else ()
            mask = b.mask.to(dist.device)
            if objective.classifies:
                output = objective.predict(images, *told).float()
                counts.add(output, b.labels.to(dist.device), mask)
            else:
                pairs = objective.compare(images, *told)
                output = next(iter(pairs.values()))[0]
                counts.add(pairs, mask)
            if observe is not None:
                observe(b, output, out)
    for module, mode in zip(modules, modes):
        module.train(mode)
    return counts.metrics()


def together_in(modules: Sequence[nn.Module]) -> int:
    """Images that compete for the places of an expert in an evaluation; 1 where experts take whatever comes.

    They are student.moe.images_per_group consecutive images of the validation split. Where that is 0, which in training
    means the whole micro-batch, every image is routed alone.
    """
    groups = []
    for module in modules:
        for layer in routed_layers(module).values():
            if layer.config.eval_capacity_factor is not None:
                groups.append(layer.config.images_per_group or 1)
    return math.lcm(*groups)


@functools.cache  # said once, not at every evaluation
def _whole_groups(batch: int, group: int, main: bool) -> int:
    rounded = math.ceil(batch / group) * group
    if main:
        log.warning(
            "evaluation takes %d images per rank and forward in place of %d, the next multiple of "
            "student.moe.images_per_group=%d: so many images compete for the places of an expert, whatever the batch. "
            "Set run.eval_batch to a multiple of it",
            rounded,
            batch,
            group,
        )
    return rounded


def eval_batch(run: RunConfig, settings: Settings) -> int:
    """Images per rank and forward in evaluation."""
    return run.eval_batch or settings.micro_batch


@dataclass
class Predictor:
    """The part of an objective that evaluation needs, for models that are not being trained.

    `predict` takes images, and where MoE layers are observed `out` as well; so does `compare`, which is given where
    there are no classes (see Objective.compare).
    """

    module: nn.Module
    predict: Callable[..., Tensor]
    frozen: tuple[nn.Module, ...] = ()
    compare: Callable[..., Pairs] | None = None

    @property
    def classifies(self) -> bool:
        """Whether it is evaluated by its logits."""
        return self.compare is None
