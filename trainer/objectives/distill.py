"""How a student module learns to behave like its teacher module inside the frozen meta model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.experts.guided_routing import Guide
from models.modules.meta import MetaModel
from models.modules.stages import Stage
from models.moe.out import Out, auxiliary_loss
from trainer.config.phases import DistillConfig
from trainer.objectives.base import Forward, Pairs, Step, Taught, Told, label_loss, relative_mse, soft_kl
from trainer.objectives.cost import Pass, forward_only, relaying, trained

TARGET = "target/"  # begins the names of Lesson.targets


@dataclass(frozen=True)
class Lesson:
    """What the teacher's side gives a step of one pair; None or empty where nothing needs it."""

    h: Tensor | None = None  # what the teacher module is fed, (B, T, D_t), or the images for the first one
    state: Tensor | None = None  # what it puts out, (B, T, D_t), or logits for the last one where there are classes
    logits: Tensor | None = None  # (B, C), of the meta model with the teacher module in its place
    targets: Mapping[int, Tensor] = field(default_factory=dict)  # of the guide, see Guide.targets

    def told(self) -> Told:
        """The same as named tensors."""
        named = {"h": self.h, "state": self.state, "logits": self.logits}
        named |= {f"{TARGET}{block}": target for block, target in self.targets.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def of(cls, told: Mapping[str, Tensor]) -> Lesson:
        """And back."""
        targets = {int(name.removeprefix(TARGET)): told[name] for name in told if name.startswith(TARGET)}
        return cls(told.get("h"), told.get("state"), told.get("logits"), targets)


class Distill(Taught):
    """One pair of modules inside the frozen meta model (m2mKD, arXiv 2402.16918; facts in docs/method.md).

    h = meta.front(x); y_t = meta.back(teacher module(h)), y_s = meta.back(student module(h));
    loss = (1 - alpha) CE(y_s, labels) + alpha tau^2 KL(y_t || y_s) + balance losses of the student's MoE blocks.

    Not in the paper: a target at the module's own border (`config.border`), noise on h, alpha and tau that change
    linearly, `predecessors`, the student modules before this one, whose output the student is fed in place of h
    (second round), and `guide`, teacher-guided routing. With `config.logit_weight` 0 the border is the only target, and
    no suffix of the meta model is run; the last module has no border but its logits, so there they count in full.

    Without classes every module has a border, the last one the teacher's final tokens, and it is the only target
    (relative MSE, unless `config.border` says cosine).

    Args:
        teacher: without classes, the whole of it, which hybrids are compared with.
        told_share: see Taught.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher_stage: Stage,
        meta: MetaModel,
        index: int,
        config: DistillConfig,
        tokens: int,
        label_smoothing: float = 0.0,
        predecessors: Sequence[nn.Module] = (),
        guide: Guide | None = None,
        teacher: MetaModel | None = None,
        told_share: float = 1.0,
    ):
        self.module = student
        self.teacher_stage = teacher_stage
        self.meta = meta
        self.index = index
        self.config = config
        self.tokens = tokens
        self.label_smoothing = label_smoothing
        self.predecessors = predecessors
        self.guide = guide
        self.teacher = teacher
        self.told_share = told_share
        self.frozen = [teacher_stage, meta, *predecessors]
        self.classifies = meta.classifies
        self.border = config.border
        self.logit_weight = config.logit_weight
        if not self.classifies:
            assert teacher is not None, "without classes a hybrid is compared with the whole teacher"
            self.frozen.append(teacher)
            self.border = "mse" if config.border == "none" else config.border
            self.logit_weight = 0.0
        elif index == meta.num_modules - 1:
            self.border = "none"
            self.logit_weight = 1.0
        # by the teacher's logits
        self.taught = self.logit_weight > 0 and max(config.alpha, config.alpha_end or 0) > 0
        # the teacher module is run
        self.taught_here = self.taught or self.border != "none" or guide is not None

    @torch.no_grad()
    def tell(self, images: Tensor) -> Told:
        """What the student is fed, and what is wanted of it: a Lesson as named tensors."""
        if not self.taught_here:
            h = None if self.predecessors else self.meta.front(images, self.index)
            return self.needed(Lesson(h)).told()
        lesson = self.teach(self.meta.front(images, self.index))
        if self.taught:
            lesson = replace(lesson, logits=self.meta.back(lesson.state, self.index))
        return self.needed(lesson).told()

    def learn(self, forward: Forward, images: Tensor, target: Tensor, told: Told, progress: float, out: Out) -> Step:
        """See Taught and `loss`."""
        lesson = Lesson.of(told)
        with torch.no_grad():
            fed = self._fed(images, lesson.h)
        return self.loss(forward(fed, out), target, lesson, progress, out)

    def loss(self, state: Tensor, target: Tensor, lesson: Lesson, progress: float, out: Out) -> Step:
        """The step, once the student module has put out `state`; parts: balance, routing, border, label, distill.

        Args:
            state: (B, T, D_t), or logits (B, C) of the last module where there are classes.
            progress: share of the phase's steps that are done, 0..1.
            out: what the student module's forward told.
        """
        config = self.config
        balance = auxiliary_loss(out)
        loss = balance
        parts = {"balance": balance.detach()}
        if self.guide is not None:
            # + weight x mean KL(teacher's router || router)
            routing = self.guide.loss(out, lesson.targets)
            loss = loss + routing
            parts["routing"] = routing.detach()
        if self.border != "none":
            # + border_weight x distance(student's state, teacher's)
            assert lesson.state is not None, "the teacher module has not run"
            border = self.border_error(lesson.h, state, lesson.state)
            loss = loss + config.border_weight * border
            parts["border"] = border.detach()
        if self.logit_weight:
            # + logit_weight (1 - alpha) CE(y_s, labels)
            alpha = _at(progress, config.alpha, config.alpha_end)
            logits = self.meta.back(state, self.index).float()
            label = label_loss(logits, target, self.label_smoothing)
            loss = loss + self.logit_weight * (1 - alpha) * label
            parts["label"] = label.detach()
            if self.taught:
                # + logit_weight alpha tau^2 KL(y_t || y_s)
                tau = _at(progress, config.tau, config.tau_end)
                distill = self._distill(lesson.logits, logits, tau)
                loss = loss + self.logit_weight * alpha * distill
                parts["distill"] = distill.detach()
        return loss, parts

    def predict(self, images: Tensor, out: Out | None = None) -> Tensor:
        """Logits (B, C) of the hybrid: the meta model with the student module in place i (and its predecessors)."""
        fed = self._chained(images) if self.predecessors else self.meta.front(images, self.index)
        return self.meta.back(self.module(fed, out), self.index)

    def compare(self, images: Tensor, out: Out | None = None) -> Pairs:
        """The hybrid's final tokens beside the teacher's; and at its border the module beside the teacher's module."""
        h = self.meta.front(images, self.index)
        fed = self._chained(images) if self.predecessors else h
        state = self.module(fed, out)
        final = self.meta.back(state, self.index)
        return {"": (final, self.teacher(images)), f"/{self.index}": (state, self.teacher_stage(h))}

    def passes(self) -> list[Pass]:
        """The pair, what leads to its input, and the stages behind it for the teacher."""
        passes = self.passes_of_pair() + forward_only(*self.predecessors)
        if self.taught_here or not self.predecessors:
            passes += forward_only(*self.meta.stages[: self.index], share=self.told_share)
        if self.taught:
            passes += forward_only(*self._behind, share=self.told_share)
        return passes

    def passes_of_pair(self) -> list[Pass]:
        """The two modules, and the stages behind them for the student, which pass the gradient on."""
        passes = trained(self.module)
        if self.logit_weight:
            # a student module may give fewer tokens than the teacher's
            passes += relaying(*self._behind, tokens=getattr(self.module, "tokens_out", 0))
        if self.taught_here:
            passes += forward_only(self.teacher_stage, share=self.told_share)
        if self.guide is not None:
            passes += forward_only(self.guide.routers, share=self.told_share)
        return passes

    def border_error(self, h: Tensor, state: Tensor, reference: Tensor) -> Tensor:
        """How far the student module's output is from the teacher module's, both (B, T, D_t).

        Args:
            h: what the teacher module was fed, (B, T, D_t), or the images for the first one.
        """
        if self.border == "mse":
            return relative_mse(state, reference)
        return _cosine_distance(state, reference)

    def teach(self, h: Tensor) -> Lesson:
        """Run the teacher module on h, and ask it about the student's routers where there is a guide."""
        if self.guide is None:
            return Lesson(h, self.teacher_stage(h))
        beside: Out = {}
        state = self.teacher_stage(h, beside, self.guide.sources)
        return Lesson(h, state, targets=self.guide.targets(beside))

    def needed(self, lesson: Lesson) -> Lesson:
        """The lesson without what neither `learn` nor `loss` reads: images of module 0, what predecessors replace."""
        return replace(
            lesson,
            h=lesson.h if self.index and not self.predecessors else None,
            state=lesson.state if self.border != "none" else None,
        )

    @property
    def _behind(self) -> Sequence[nn.Module]:
        return self.meta.stages[self.index + 1 :]

    def _fed(self, images: Tensor, h: Tensor | None) -> Tensor:
        """What the student is fed: its predecessors' output, or h with noise of input_noise x std(h)."""
        if self.predecessors:
            return self._chained(images)
        if h is None:  # of module 0
            return images
        if self.config.input_noise and self.index:
            h = h + self.config.input_noise * h.float().std().to(h.dtype) * torch.randn_like(h)
        return h

    def _chained(self, images: Tensor) -> Tensor:
        for module in self.predecessors:
            images = module(images)
        return images

    def _distill(self, teacher_logits: Tensor, logits: Tensor, tau: float) -> Tensor:
        if self.config.target == "hard":
            return F.cross_entropy(logits, teacher_logits.argmax(-1))
        kl = soft_kl(teacher_logits, logits, tau)
        if self.config.kl_reduction == "reference":
            # the published code divides the sum by batch x classes, which makes the term C times weaker
            return kl / logits.shape[-1]
        return kl


def _at(progress: float, start: float, end: float | None) -> float:
    """A value that changes linearly from start to end over the phase."""
    if end is None:
        return start
    return start + (end - start) * progress


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

    def passes(self) -> list[Pass]:
        """As Distill; of the first module, fed pixels, the state behind the meta model's own stage is clustered."""
        passes = super().passes()
        if self.index == 0:
            passes += forward_only(self.meta.stages[0])
        return passes

    def needed(self, lesson: Lesson) -> Lesson:
        """As Distill; what the module is fed says which tokens count, of the first one the images."""
        return replace(super().needed(lesson), h=lesson.h)

    def border_error(self, h: Tensor, state: Tensor, reference: Tensor) -> Tensor:
        """As Distill, over the tokens of the cluster; 0 where the batch has none."""
        # picked by zeros rather than by an index, whose length a GPU would have to be waited for
        own_BT = self.own(h)
        if self.border == "mse":
            own_BT1 = own_BT.unsqueeze(-1)
            return relative_mse(state.where(own_BT1, 0), reference.where(own_BT1, 0))
        distance_BT = 1 - F.cosine_similarity(state.float(), reference.float(), dim=-1)
        return distance_BT.where(own_BT, 0).sum() / own_BT.sum().clamp(min=1)
