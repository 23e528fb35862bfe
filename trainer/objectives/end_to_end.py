"""Training a whole model: teacher, label-only meta model, and the student end to end."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.flops import forward_flops
from models.moe import auxiliary_loss
from trainer.objectives.base import Objective, Step, smoothing


class Classify(Objective):
    """Cross-entropy with the labels, plus the balance losses of the MoE blocks: teacher, scratch, end to end.

    Args:
        module: images -> logits (B, C).
        label_smoothing: applies to class-index targets; mixup targets carry their own.
    """

    def __init__(self, module: nn.Module, tokens: int, label_smoothing: float = 0.0):
        self.module, self.label_smoothing = module, label_smoothing
        self.frozen: list[nn.Module] = []
        self.flops_per_image = 3 * forward_flops(module, tokens)

    def __call__(self, forward, images: Tensor, target: Tensor) -> Step:
        logits = forward(images).float()
        label = F.cross_entropy(logits, target, label_smoothing=smoothing(target, self.label_smoothing))
        balance = auxiliary_loss(self.module)
        return label + balance, {"label": label.detach(), "balance": balance.detach()}

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, C) as evaluated."""
        return self.module(images)
