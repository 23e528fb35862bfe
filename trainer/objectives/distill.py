"""How a student module learns to behave like its teacher module inside the frozen meta model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.flops import forward_flops
from models.meta import MetaModel
from models.modules import Stage
from models.moe import auxiliary_loss
from trainer.objectives.base import Objective, Step, smoothing, soft_kl
from trainer.schema import DistillConfig


class Distill(Objective):
    """One pair of modules inside the frozen meta model (m2mKD, arXiv 2402.16918; facts in docs/method.md).

    h = meta.front(x); y_t = meta.back(teacher module(h)), y_s = meta.back(student module(h));
    loss = (1 - alpha) CE(y_s, labels) + alpha tau^2 KL(y_t || y_s) + balance losses of the student's MoE blocks.
    """

    def __init__(self, student: nn.Module, teacher_stage: Stage, meta: MetaModel, index: int, config: DistillConfig,
                 tokens: int, label_smoothing: float = 0.0):  # fmt: skip
        self.module, self.index, self.config, self.label_smoothing = student, index, config, label_smoothing
        self.teacher_stage, self.meta = teacher_stage, meta
        self.frozen = [teacher_stage, meta]
        cost = [forward_flops(stage, tokens) for stage in meta.stages]
        front, back = sum(cost[:index]), sum(cost[index + 1 :])
        # one frozen suffix for the teacher, and one for the student that also passes the gradient on
        self.flops_per_image = (
            front + forward_flops(teacher_stage, tokens) + 3 * back + 3 * forward_flops(student, tokens)
        )

    def __call__(self, forward, images: Tensor, target: Tensor) -> Step:
        with torch.no_grad():
            h = self.meta.front(images, self.index)
            wanted = self.meta.back(self.teacher_stage(h), self.index)
        logits = self.meta.back(forward(h), self.index).float()
        label = F.cross_entropy(logits, target, label_smoothing=smoothing(target, self.label_smoothing))
        distill = self._distill(wanted, logits)
        balance = auxiliary_loss(self.module)
        alpha = self.config.alpha  # weight of the distillation term
        loss = (1 - alpha) * label + alpha * distill + balance
        return loss, {"label": label.detach(), "distill": distill.detach(), "balance": balance.detach()}

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the hybrid: the meta model with the student module in place i."""
        return self.meta.back(self.module(self.meta.front(images, self.index)), self.index)

    def _distill(self, wanted: Tensor, logits: Tensor) -> Tensor:
        if self.config.target == "hard":
            return F.cross_entropy(logits, wanted.argmax(-1))
        kl = soft_kl(wanted, logits, self.config.tau)
        # the published code divides the sum by batch x classes, which makes the term C times weaker
        return kl / logits.shape[-1] if self.config.kl_reduction == "reference" else kl
