"""How a module of the teacher grows in its place in the meta model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.flops import forward_flops
from models.modules.meta import MetaModel
from models.modules.stages import Stage
from trainer.objectives.base import Objective, Step, smoothing


class Incubate(Objective):
    """Teacher module i in place of stage i of the frozen meta model (Deep Incubation, arXiv 2212.04129).

    loss = CE(meta.back(module(meta.front(x))), labels); only the module is trained.
    """

    def __init__(self, module: Stage, meta: MetaModel, index: int, tokens: int, label_smoothing: float = 0.0):
        self.module, self.meta, self.index, self.label_smoothing = module, meta, index, label_smoothing
        self.frozen = [meta]
        cost = [forward_flops(stage, tokens) for stage in meta.stages]
        # the stages behind also pass the gradient on
        self.flops_per_image = sum(cost[:index]) + 3 * forward_flops(module, tokens) + 2 * sum(cost[index + 1 :])

    def __call__(self, forward, images: Tensor, target: Tensor) -> Step:
        with torch.no_grad():
            h = self.meta.front(images, self.index)
        logits = self.meta.back(forward(h), self.index).float()
        label = F.cross_entropy(logits, target, label_smoothing=smoothing(target, self.label_smoothing))
        return label, {"label": label.detach()}

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the hybrid: the meta model with the module in place i."""
        return self.meta.back(self.module(self.meta.front(images, self.index)), self.index)
