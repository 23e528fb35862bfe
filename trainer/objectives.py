"""One object per kind of training step: what is trained, what is frozen, and how the losses are computed.

`objective(forward, images, target)` returns (loss, parts): `forward` is the engine in a run and the bare
`objective.module` in a unit test, so that losses are tested without DeepSpeed. `target` is a class index (B,) or, with
mixup, a distribution (B, C). `parts` are detached losses for the log.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.flops import forward_flops
from models.meta import MetaModel
from models.modules import Stage
from models.moe import auxiliary_loss
from trainer.schema import DistillConfig, MetaConfig

Step = tuple[Tensor, dict[str, Tensor]]


class Classify:
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
        label = F.cross_entropy(logits, target, label_smoothing=_smoothing(target, self.label_smoothing))
        balance = auxiliary_loss(self.module)
        return label + balance, {"label": label.detach(), "balance": balance.detach()}

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, C) as evaluated."""
        return self.module(images)


class MatchTeacher:
    """The meta model learns the teacher's hidden states at the module borders and its logits (not in the paper).

    loss = sum over borders of relative MSE (free-running) + the same (teacher-forced) + KL(teacher || meta)
         + KL(teacher || teacher-forced last stage) + label_weight x CE.
    Relative MSE = |a - b|^2 / |b|^2. A hub teacher was not grown inside the meta model, so its modules only work there
    when the borders carry what it expects.
    """

    def __init__(self, meta: MetaModel, teacher: nn.Module, stages: list[Stage], config: MetaConfig, tokens: int,
                 label_smoothing: float = 0.0):  # fmt: skip
        self.module, self.config, self.label_smoothing = MetaWithForcedStages(meta), config, label_smoothing
        self.teacher = MetaModel(stages)  # the teacher as a chain of its own modules
        self.frozen = [self.teacher]
        once = forward_flops(meta, tokens)
        forced = once - forward_flops(meta.stages[0], tokens)
        self.flops_per_image = forward_flops(teacher, tokens) + 3 * (once + forced)

    def __call__(self, forward, images: Tensor, target: Tensor) -> Step:
        with torch.no_grad():
            *borders, wanted = self.teacher.hidden_states(images)
        free, logits, forced, forced_logits = forward(images, borders)
        errors = [relative_mse(a, b) for a, b in zip(free + forced, borders + borders[1:])]
        match = sum(errors, start=logits.new_zeros((), dtype=torch.float32))  # a single module has no border
        kl = soft_kl(wanted, logits) + soft_kl(wanted, forced_logits)
        label = F.cross_entropy(logits.float(), target, label_smoothing=_smoothing(target, self.label_smoothing))
        loss = match + kl + self.config.label_weight * label
        return loss, {"match": match.detach(), "kl": kl.detach(), "label": label.detach()}

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the free-running meta model."""
        return self.module.meta(images)


class MetaWithForcedStages(nn.Module):
    """A meta model run twice in one forward: free from the images, and stage by stage from the teacher's borders."""

    def __init__(self, meta: MetaModel):
        super().__init__()
        self.meta = meta

    def forward(self, images: Tensor, borders: list[Tensor]) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
        """Border states and logits, free (N-1 borders) and forced (borders 1..N-2, their input being the teacher's)."""
        *free, logits = self.meta.hidden_states(images)
        forced = [stage(h) for stage, h in zip(self.meta.stages[1:], borders)]
        return free, logits, forced[:-1], forced[-1] if forced else logits


class Distill:
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
        label = F.cross_entropy(logits, target, label_smoothing=_smoothing(target, self.label_smoothing))
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


def soft_kl(wanted: Tensor, logits: Tensor, tau: float = 1.0) -> Tensor:
    """tau^2 KL(softmax(wanted / tau) || softmax(logits / tau)), mean over the batch (Hinton et al. 2015)."""
    p, q = F.log_softmax(wanted.float() / tau, -1), F.log_softmax(logits.float() / tau, -1)
    return tau * tau * F.kl_div(q, p, log_target=True, reduction="batchmean")


def relative_mse(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 / |b|^2 over the batch; 0 when equal, 1 when a is 0."""
    a, b = a.float(), b.float()
    return (a - b).square().sum() / b.square().sum().clamp_min(1e-12)


def _smoothing(target: Tensor, label_smoothing: float) -> float:
    return label_smoothing if target.ndim == 1 else 0.0
