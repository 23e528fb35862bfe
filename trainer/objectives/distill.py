"""How a student module learns to behave like its teacher module inside the frozen meta model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.experts.guided_routing import Guide
from models.flops import forward_flops
from models.modules.meta import MetaModel
from models.modules.stages import Stage
from models.moe.layer import auxiliary_loss
from trainer.config.phases import DistillConfig
from trainer.objectives.base import Objective, Step, relative_mse, smoothing, soft_kl


class Distill(Objective):
    """One pair of modules inside the frozen meta model (m2mKD, arXiv 2402.16918; facts in docs/method.md).

    h = meta.front(x); y_t = meta.back(teacher module(h)), y_s = meta.back(student module(h));
    loss = (1 - alpha) CE(y_s, labels) + alpha tau^2 KL(y_t || y_s) + balance losses of the student's MoE blocks.

    Not in the paper: a target at the module's own border (`config.border`), noise on h, alpha and tau that change
    linearly, `predecessors`, the student modules before this one, whose output the student is fed in place of h
    (second round), and `guide`, teacher-guided routing. With `config.logit_weight` 0 the border is the only target, and
    no suffix of the meta model is run; the last module has no border but its logits, so there they count in full.
    """

    def __init__(self, student: nn.Module, teacher_stage: Stage, meta: MetaModel, index: int, config: DistillConfig,
                 tokens: int, label_smoothing: float = 0.0, predecessors: Sequence[nn.Module] = (),
                 guide: Guide | None = None):  # fmt: skip
        self.module, self.index, self.config, self.label_smoothing = student, index, config, label_smoothing
        self.teacher_stage, self.meta, self.predecessors, self.guide = teacher_stage, meta, predecessors, guide
        self.frozen = [teacher_stage, meta, *predecessors]
        last = index == meta.num_modules - 1
        self.border = "none" if last else config.border
        self.logit_weight = 1.0 if last else config.logit_weight
        self.taught = self.logit_weight > 0 and max(config.alpha, config.alpha_end or 0) > 0  # by the teacher's logits
        self.taught_here = self.taught or self.border != "none" or guide is not None  # the teacher module is run
        cost = [forward_flops(stage, tokens) for stage in meta.stages]
        front, self.back_flops = sum(cost[:index]), sum(cost[index + 1 :])
        # of the pair itself; the student's suffix also passes the gradient on
        self.flops_of_pair = 3 * forward_flops(student, tokens) + (2 * self.back_flops if self.logit_weight else 0)
        self.flops_of_pair += forward_flops(teacher_stage, tokens) if self.taught_here else 0
        self.flops_of_pair += guide.routers.flops_per_image(tokens) if guide is not None else 0
        # with what leads to its input, and the suffix for the teacher
        self.flops_per_image = self.flops_of_pair + sum(forward_flops(module, tokens) for module in predecessors)
        self.flops_per_image += front if self.taught_here or not predecessors else 0
        self.flops_per_image += self.back_flops if self.taught else 0

    def __call__(self, forward, images: Tensor, target: Tensor) -> Step:
        with torch.no_grad():
            h, taught, wanted = self._teach(images)
            given = self._given(images, h)
        return self.loss(forward(given), target, h, taught, wanted)

    def loss(
        self, mine: Tensor, target: Tensor, h: Tensor | None, taught: Tensor | None, wanted: Tensor | None
    ) -> Step:
        """The step, once the student module has put out `mine`.

        Args:
            h, taught: input and output of the teacher module; None where nothing needs them.
            wanted: the teacher's logits (B, C), likewise.
        """
        config, progress = self.config, self.progress
        alpha, tau = _at(progress, config.alpha, config.alpha_end), _at(progress, config.tau, config.tau_end)
        balance = auxiliary_loss(self.module)
        loss, parts = balance, {"balance": balance.detach()}
        if self.guide is not None:
            routing = self.guide.loss()
            loss, parts["routing"] = loss + routing, routing.detach()
        if self.border != "none":
            border = self.border_error(h, mine, taught)
            loss, parts["border"] = loss + config.border_weight * border, border.detach()
        if self.logit_weight:
            logits = self.meta.back(mine, self.index).float()
            label = F.cross_entropy(logits, target, label_smoothing=smoothing(target, self.label_smoothing))
            loss, parts["label"] = loss + self.logit_weight * (1 - alpha) * label, label.detach()
            if self.taught:
                distill = self._distill(wanted, logits, tau)
                loss, parts["distill"] = loss + self.logit_weight * alpha * distill, distill.detach()
        return loss, parts

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the hybrid: the meta model with the student module in place i (and its predecessors)."""
        given = self._chained(images) if self.predecessors else self.meta.front(images, self.index)
        return self.meta.back(self.module(given), self.index)

    def border_error(self, h: Tensor, given: Tensor, wanted: Tensor) -> Tensor:
        """How far the student module's output is from the teacher module's, both (B, T, D_t).

        Args:
            h: what the teacher module was fed, (B, T, D_t), or the images for the first one.
        """
        return relative_mse(given, wanted) if self.border == "mse" else _cosine_distance(given, wanted)

    def _teach(self, images: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Input and output of the teacher module, and the teacher's logits; None where nothing needs them."""
        if not self.taught_here:
            return None, None, None
        h = self.meta.front(images, self.index)
        taught = self.teach(h)
        return h, taught, self.meta.back(taught, self.index) if self.taught else None

    def teach(self, h: Tensor) -> Tensor:
        """Output of the teacher module, watched by the guide if there is one."""
        with self.guide.watching() if self.guide is not None else nullcontext():
            return self.teacher_stage(h)

    def _given(self, images: Tensor, h: Tensor | None) -> Tensor:
        """What the student is fed."""
        if self.predecessors:
            return self._chained(images)
        h = self.meta.front(images, self.index) if h is None else h
        if self.config.input_noise and self.index:
            h = h + self.config.input_noise * h.float().std().to(h.dtype) * torch.randn_like(h)
        return h

    def _chained(self, images: Tensor) -> Tensor:
        for module in self.predecessors:
            images = module(images)
        return images

    def _distill(self, wanted: Tensor, logits: Tensor, tau: float) -> Tensor:
        if self.config.target == "hard":
            return F.cross_entropy(logits, wanted.argmax(-1))
        kl = soft_kl(wanted, logits, tau)
        # the published code divides the sum by batch x classes, which makes the term C times weaker
        return kl / logits.shape[-1] if self.config.kl_reduction == "reference" else kl


def _at(progress: float, start: float, end: float | None) -> float:
    """A value that changes linearly from start to end over the phase."""
    return start if end is None else start + (end - start) * progress


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine of the angle between two states of each token, mean over batch and tokens."""
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=-1).mean()


class DistillTokens(Distill):
    """Distill with a border target that counts the tokens of one cluster only; the logits' terms stay as they are.

    Args:
        own: what the module is fed, images or (B, T, D) -> whether a token belongs to the expert, bool (B, T).
        tokens: length of the token sequence; this and everything else as in Distill.
    """

    def __init__(self, own: Callable[[Tensor], Tensor], *arguments: Any, tokens: int, **options: Any):
        super().__init__(*arguments, tokens=tokens, **options)
        self.own = own
        if self.index == 0:  # its input is pixels: the state behind the meta model's own stage is clustered
            self.flops_per_image += forward_flops(self.meta.stages[0], tokens)

    def border_error(self, h: Tensor, given: Tensor, wanted: Tensor) -> Tensor:
        own_BT = self.own(h)
        if not own_BT.any():
            return 0.0 * given.float().sum()  # no token of the cluster in this batch; the graph stays whole
        return super().border_error(h, given[own_BT], wanted[own_BT])
