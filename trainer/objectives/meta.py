"""How a meta model learns to stand in for the teacher's modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.flops import forward_flops
from models.meta import MetaModel
from models.modules import Stage
from trainer.objectives.base import Objective, Step, relative_mse, smoothing, soft_kl
from trainer.schema import MetaConfig


class MatchTeacher(Objective):
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
        label = F.cross_entropy(logits.float(), target, label_smoothing=smoothing(target, self.label_smoothing))
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
