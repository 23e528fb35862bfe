"""Training a whole model: teacher, label-only meta model, and the student end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.experts.guided_routing import Guide
from models.flops import forward_flops
from models.modules.basis import Project
from models.modules.meta import MetaModel
from models.moe.layer import auxiliary_loss
from trainer.config.phases import TrainConfig
from trainer.objectives.base import Objective, Step, relative_mse, smoothing, soft_kl


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


@dataclass(frozen=True)
class Borders:
    """Where the student's state is compared with the teacher's: before these blocks of the student."""

    blocks: Sequence[int]  # the first block of every student module but the first
    projections: Sequence[Project]  # per border, teacher's width -> student's


class LearnFromTeacher(Classify):
    """End to end with the whole teacher beside it (not in the paper).

    loss = (1 - kd_weight) CE + kd_weight kd_tau^2 KL(teacher || student) + balance losses
         + fade x the guide's loss on the routers (teacher-guided routing)
         + border_weight x fade x sum over borders of relative MSE(student's state, teacher's in the border's basis);
    fade goes linearly from 1 to 0 over `border_epochs`; once it is 0 and kd_weight is 0, the teacher is not run.
    """

    def __init__(self, module: nn.Module, teacher: MetaModel, config: TrainConfig, tokens: int,
                 label_smoothing: float = 0.0, borders: Borders | None = None,
                 guide: Guide | None = None):  # fmt: skip
        super().__init__(module, tokens, label_smoothing)
        self.teacher, self.config, self.borders, self.guide = teacher, config, borders, guide
        self.frozen = [teacher, *(borders.projections if borders else ())]
        self.states: dict[int, Tensor] = {}
        self.keeping = False
        for number in borders.blocks if borders else ():
            module.blocks[number].register_forward_pre_hook(self._keep(number))
        fades = borders is not None or guide is not None
        self.fading = min(config.border_epochs / config.epochs, 1.0) if fades else 0.0  # share of the steps
        watched = 1.0 if config.kd_weight else self.fading  # share of the steps that run the teacher
        self.flops_per_image += round(watched * forward_flops(teacher, tokens))
        if guide is not None:
            self.flops_per_image += round(self.fading * guide.routers.flops_per_image(tokens))

    def __call__(self, forward, images: Tensor, target: Tensor) -> Step:
        config = self.config
        fade = max(0.0, 1 - self.progress / self.fading) if self.fading else 0.0
        if config.kd_weight or fade:
            with torch.no_grad(), self.guide.watching() if fade and self.guide is not None else nullcontext():
                *taught, wanted = self.teacher.hidden_states(images)
        self.keeping = fade > 0
        logits = forward(images).float()
        self.keeping = False
        label = F.cross_entropy(logits, target, label_smoothing=smoothing(target, self.label_smoothing))
        balance = auxiliary_loss(self.module)
        loss = (1 - config.kd_weight) * label + balance
        parts = {"label": label.detach(), "balance": balance.detach()}
        if config.kd_weight:
            kd = soft_kl(wanted, logits, config.kd_tau)
            loss, parts["kd"] = loss + config.kd_weight * kd, kd.detach()
        if fade and self.guide is not None:
            routing = self.guide.loss()
            loss, parts["routing"] = loss + fade * routing, routing.detach()
        if fade and self.borders is not None:
            pairs = zip(self.borders.blocks, self.borders.projections, taught)
            border = sum(relative_mse(self.states.pop(block), project(h)) for block, project, h in pairs)
            loss, parts["border"] = loss + config.border_weight * fade * border, border.detach()
        return loss, parts

    def _keep(self, block: int) -> Callable[..., None]:
        """A hook that keeps what a block is given, while a step's forward asks for it."""

        def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if self.keeping:  # not in evaluation, nor when activation checkpointing runs the forward again
                self.states[block] = given[0]

        return hook
