"""Training a whole model: teacher, label-only meta model, and the student end to end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.experts.guided_routing import Guide
from models.modules.meta import MetaModel
from models.moe.layer import routed_layers
from models.moe.out import Out, auxiliary_loss
from trainer.config.phases import TrainConfig
from trainer.objectives.base import Forward, Objective, Pairs, Step, label_loss, relative_mse, soft_kl
from trainer.objectives.cost import Pass, forward_only, trained


class Classify(Objective):
    """Cross-entropy with the labels, plus the balance losses of the MoE blocks: teacher, scratch, end to end.

    Args:
        module: images -> logits (B, C); one with MoE blocks takes `out` as well.
        label_smoothing: applies to class-index targets; mixup targets carry their own.
    """

    def __init__(self, module: nn.Module, tokens: int, label_smoothing: float = 0.0):
        self.module = module
        self.tokens = tokens
        self.label_smoothing = label_smoothing
        self.frozen: list[nn.Module] = []
        self.tells = bool(routed_layers(module)) or hasattr(module, "regularisers")

    def step(self, forward: Forward, images: Tensor, target: Tensor, progress: float, out: Out) -> Step:
        """See Objective.__call__; parts: label, balance. loss = CE + balance losses."""
        logits = self._run(forward, images, out)
        label = label_loss(logits.float(), target, self.label_smoothing)
        balance = auxiliary_loss(out)
        return label + balance, {"label": label.detach(), "balance": balance.detach()}

    def predict(self, images: Tensor, out: Out | None = None) -> Tensor:
        """Logits (B, C) as evaluated."""
        return self._run(self.module, images, out)

    def passes(self) -> list[Pass]:
        """The model alone."""
        return trained(self.module)

    def _run(self, forward: Forward, images: Tensor, out: Out | None, states: Collection[int] = ()) -> Tensor:
        """Logits; a model that tells nothing, as a teacher or a dense student may be timm's own, takes no `out`."""
        if states:
            return forward(images, out, states)
        if self.tells:
            return forward(images, out)
        return forward(images)


@dataclass(frozen=True)
class Borders:
    """Where the student's state is compared with the teacher's: before these blocks of the student."""

    blocks: Sequence[int]  # the first block of every student module but the first
    projections: Sequence[nn.Module]  # per border, teacher's width -> student's; see projection in models.modules.basis

    @property
    def last_blocks(self) -> list[int]:
        """The blocks that put the compared states out: the last one of every student module but the last."""
        return [block - 1 for block in self.blocks]


class LearnFromTeacher(Classify):
    """End to end with the whole teacher beside it (not in the paper).

    loss = (1 - kd_weight) CE + kd_weight kd_tau^2 KL(teacher || student) + balance losses
         + fade x the guide's loss on the routers (teacher-guided routing)
         + border_weight x fade x sum over borders of relative MSE(student's state, teacher's in the border's basis);
    fade goes linearly from 1 to 0 over `border_epochs`; once it is 0 and kd_weight is 0, the teacher is not run.
    """

    def __init__(
        self,
        module: nn.Module,
        teacher: MetaModel,
        config: TrainConfig,
        tokens: int,
        label_smoothing: float = 0.0,
        borders: Borders | None = None,
        guide: Guide | None = None,
    ):
        super().__init__(module, tokens, label_smoothing)
        self.teacher = teacher
        self.config = config
        self.borders = borders
        self.guide = guide
        self.frozen = [teacher]
        if borders is not None:
            self.frozen += borders.projections
        self.fading = 0.0  # share of the steps in which borders and guide count
        if borders is not None or guide is not None:
            self.fading = min(config.border_epochs / config.epochs, 1.0)

    def step(self, forward: Forward, images: Tensor, target: Tensor, progress: float, out: Out) -> Step:
        """See Objective.__call__; parts: label, balance, kd, routing, border."""
        config = self.config
        fade = self._fade(progress)
        guide = borders = None
        if fade:
            guide = self.guide
            borders = self.borders
        teacher_output = None
        if self.taught or fade:
            teacher_states, teacher_output, targets = self._teach(images, guide)
        compared = () if borders is None else borders.last_blocks

        output = self._run(forward, images, out, compared).float()
        loss, parts = self._output_loss(output, target, teacher_output)
        balance = auxiliary_loss(out)
        loss = loss + balance
        parts["balance"] = balance.detach()
        if guide is not None:
            # + fade x weight x mean KL(teacher's router || router)
            routing = guide.loss(out, targets)
            loss = loss + fade * routing
            parts["routing"] = routing.detach()
        if borders is not None:
            # + border_weight x fade x sum over borders of |z - U^T (h - mean)|^2 / |U^T (h - mean)|^2
            border = 0
            for z, h in self._border_states(out, teacher_states):
                border = border + relative_mse(z, h)
            loss = loss + config.border_weight * fade * border
            parts["border"] = border.detach()
        return loss, parts

    def passes(self) -> list[Pass]:
        """The student, and in a share of the steps the teacher, its routers and its states in the borders' bases."""
        teaching = 1.0 if self.taught else self.fading
        passes = super().passes() + forward_only(self.teacher, share=teaching)
        if self.guide is not None:
            passes += forward_only(self.guide.routers, share=self.fading)
        if self.borders is not None:
            passes += forward_only(*self.borders.projections, share=self.fading)
        return passes

    @property
    def taught(self) -> bool:
        """Whether the teacher's output is a target in every step."""
        return self.config.kd_weight > 0

    def _output_loss(self, logits: Tensor, target: Tensor, teacher_logits: Tensor | None) -> Step:
        """What the student's logits (B, C) cost; parts: label, kd."""
        w = self.config.kd_weight
        label = label_loss(logits, target, self.label_smoothing)
        # (1 - w) CE
        loss = (1 - w) * label
        parts = {"label": label.detach()}
        if self.taught:
            # + w tau^2 KL(teacher || student)
            kd = soft_kl(teacher_logits, logits, self.config.kd_tau)
            loss = loss + w * kd
            parts["kd"] = kd.detach()
        return loss, parts

    def _border_states(self, out: Out, teacher_states: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Per inner border the student's state and the teacher's in the border's basis, (B, T, D_s) each."""
        pairs = []
        for block, project, h in zip(self.borders.last_blocks, self.borders.projections, teacher_states):
            pairs.append((out["blocks"][str(block)]["state"], project(h)))
        return pairs

    def _fade(self, progress: float) -> float:
        """max(0, 1 - progress / fading): what borders and guide count, from 1 to 0."""
        if not self.fading:
            return 0.0
        return max(0.0, 1 - progress / self.fading)

    @torch.no_grad()
    def _teach(self, images: Tensor, guide: Guide | None) -> tuple[list[Tensor], Tensor, dict[int, Tensor]]:
        """The teacher's border states (B, T, D_t), its logits (B, C), and what it wants of the student's routers."""
        if guide is None:
            *states, logits = self.teacher.hidden_states(images)
            return states, logits, {}
        beside: Out = {}
        *states, logits = self.teacher.hidden_states(images, out=beside, states=guide.sources)
        return states, logits, guide.targets(beside)


class LearnFeatures(LearnFromTeacher):
    """End to end without classes (not in the paper): the teacher's final tokens in place of labels and logits.

    loss = relative MSE(feature head(student's normalised tokens), teacher's normalised tokens) + balance losses
         + the terms of LearnFromTeacher at routers and inner borders.
    """

    classifies = False

    def predict(self, images: Tensor, out: Out | None = None) -> Tensor:
        """The student's tokens (B, T, D_t) that learn from the teacher's final ones."""
        return self._run(self.module, images, out)

    def compare(self, images: Tensor, out: Out | None = None) -> Pairs:
        """The student beside the teacher: final tokens, and inner borders where they are in the teacher's basis."""
        if out is None:
            out = {}
        compared = () if self.borders is None else self.borders.last_blocks
        tokens = self._run(self.module, images, out, compared)
        *teacher_states, teacher_tokens = self.teacher.hidden_states(images)
        pairs = {"": (tokens, teacher_tokens)}
        if self.borders is not None:
            for border, pair in enumerate(self._border_states(out, teacher_states)):
                pairs[f"/{border}"] = pair
        return pairs | {f"/{self.teacher.num_modules - 1}": pairs[""]}

    @property
    def taught(self) -> bool:
        """Always: there is nothing else to learn from."""
        return True

    def _output_loss(self, tokens: Tensor, target: Tensor, teacher_tokens: Tensor | None) -> Step:
        """How far the student's final tokens are from the teacher's, (B, T, D_t) both; parts: tokens."""
        error = relative_mse(tokens, teacher_tokens)
        return error, {"tokens": error.detach()}

    def _run(self, forward: Forward, images: Tensor, out: Out | None, states: Collection[int] = ()) -> Tensor:
        return forward(images, out, states, as_teacher=True)
