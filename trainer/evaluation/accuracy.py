"""The one evaluation: accuracy and loss over every validation image, each counted once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.ds_config import Settings
from trainer.config.runtime import RunConfig
from trainer.data.loader import Batch, Data, eval_batches
from trainer.distributed.interrupt import HEARTBEAT
from trainer.distributed.ranks import Dist
from trainer.tracking.health import NonFiniteLoss


def of_published(evaluation: dict[str, float]) -> dict[str, float]:
    """An evaluation whose accuracy and loss are those of the average, which is published, where it has them.

    Those of the last weights are then called accuracy_raw and loss_raw.
    """
    found = dict(evaluation)
    for name in ("accuracy", "loss"):
        if f"{name}_ema" in found:
            found[f"{name}_raw"], found[name] = found[name], found.pop(f"{name}_ema")
    return found


def evaluate(
    objective: Any, data: Data, dtype: torch.dtype, batch: int, dist: Dist,
    observe: Callable[[Batch, Tensor], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Accuracy (0..1) and mean cross-entropy of objective.predict over every validation image, each counted once.

    `observe` is shown every batch of this rank with its logits (B, classes), right after its forward.
    An image whose loss is not finite counts as wrong, is left out of the mean loss, and is counted as
    "nonfinite_images" when there is one. Collective: the ranks share the images and every rank gets the same numbers.

    Raises:
        NonFiniteLoss: on all ranks, no image has a finite loss.
        ValueError: on all ranks, no image could be read.
    """
    modules = [objective.module, *objective.frozen]
    training = [m.training for m in modules]
    for m in modules:
        m.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=dist.device)
    with torch.no_grad():
        for b in eval_batches(
            data.val, data.preprocessing, batch=batch, world=dist.world, rank=dist.rank, workers=data.workers
        ):
            HEARTBEAT.beat()
            logits = objective.predict(b.images.to(dist.device, dtype)).float()
            if observe is not None:
                observe(b, logits)
            labels, mask = b.labels.to(dist.device), b.mask.to(dist.device)
            loss = F.cross_entropy(logits, labels, reduction="none")
            finite = mask & torch.isfinite(loss)
            correct = (logits.argmax(-1) == labels) & finite
            totals += torch.stack([correct.sum(), loss[finite].sum(), finite.sum(), mask.sum()]).to(totals.dtype)
    for m, mode in zip(modules, training):
        m.train(mode)
    correct, loss, finite, images = dist.sum(totals).tolist()
    if not images:
        raise ValueError("none of the validation images could be read: check data.path and data.val_split")
    if not finite:
        raise NonFiniteLoss(f"the model's output is not finite on any of the {int(images)} validation images")
    found = {"accuracy": correct / images, "loss": loss / finite, "images": int(images)}
    return found | ({"nonfinite_images": int(images - finite)} if finite < images else {})


def eval_batch(run: RunConfig, settings: Settings) -> int:
    """Images per rank and forward in evaluation."""
    return run.eval_batch or settings.micro_batch


@dataclass
class Predictor:
    """The part of an objective that evaluation needs, for models that are not being trained."""

    module: nn.Module
    predict: Callable[[Tensor], Tensor]
    frozen: tuple[nn.Module, ...] = ()
