"""How a module of the teacher grows in its place in the meta model."""

from __future__ import annotations

import torch
from torch import Tensor

from models.modules.meta import MetaModel
from models.modules.stages import Stage
from models.moe.out import Out
from trainer.objectives.base import Forward, Objective, Step, label_loss
from trainer.objectives.cost import Pass, forward_only, relaying, trained


class Incubate(Objective):
    """Teacher module i in place of stage i of the frozen meta model (Deep Incubation, arXiv 2212.04129).

    loss = CE(meta.back(module(meta.front(x))), labels); only the module is trained.
    """

    def __init__(self, module: Stage, meta: MetaModel, index: int, tokens: int, label_smoothing: float = 0.0):
        self.module = module
        self.meta = meta
        self.index = index
        self.tokens = tokens
        self.label_smoothing = label_smoothing
        self.frozen = [meta]

    def step(self, forward: Forward, images: Tensor, target: Tensor, progress: float, out: Out) -> Step:
        """See Objective.__call__; parts: label."""
        with torch.no_grad():
            h = self.meta.front(images, self.index)
        logits = self.meta.back(forward(h), self.index).float()
        label = label_loss(logits, target, self.label_smoothing)
        return label, {"label": label.detach()}

    def predict(self, images: Tensor, out: Out | None = None) -> Tensor:
        """Logits (B, C) of the hybrid: the meta model with the module in place i."""
        return self.meta.back(self.module(self.meta.front(images, self.index)), self.index)

    def passes(self) -> list[Pass]:
        """The stages in front, the module, and the stages behind, which pass the gradient on."""
        stages = self.meta.stages
        in_front = forward_only(*stages[: self.index])
        return in_front + trained(self.module) + relaying(*stages[self.index + 1 :])
