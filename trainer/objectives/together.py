"""How all student modules learn at once, each still from its own teacher module alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.experts.guided_routing import Guide
from models.flops import forward_flops
from models.modules.meta import MetaModel
from models.modules.stages import Stage
from trainer.config.phases import DistillConfig
from trainer.objectives.base import Objective, Step
from trainer.objectives.distill import Distill


class Together(Objective):
    """Every pair of modules in one step: one pass of the teacher, one of the student (not in the paper).

    The loss is the sum of the pairs' own (Distill). A student module is fed what the one before it puts out at that
    step, and no gradient crosses a border, so each learns as it would in a job of its own behind predecessors that
    change as it does; only the limit on the gradient norm is one for all of them.

    Args:
        students, teacher_stages: the modules in order.
        meta: what they stand in.
        meta_is_teacher: its stages are the teacher's modules (meta.blocks_per_module=0), which then run only once.
        guides: of teacher-guided routing, one per module.
    """

    def __init__(self, students: Sequence[nn.Module], teacher_stages: Sequence[Stage], meta: MetaModel,
                 config: DistillConfig, tokens: int, meta_is_teacher: bool, label_smoothing: float = 0.0,
                 guides: Sequence[Guide | None] = ()):  # fmt: skip
        self.pairs = pairs = [
            Distill(
                student, stage, meta, i, config, tokens, label_smoothing, students[:i], guides[i] if guides else None
            )
            for i, (student, stage) in enumerate(zip(students, teacher_stages))
        ]
        self.meta, self.meta_is_teacher = meta, meta_is_teacher
        self.module = ModuleChain(students)
        self.frozen = [meta, *teacher_stages]
        self.teacher_runs = sum(pair.taught_here for pair in pairs)  # modules, from the first on
        self.flops_by_module = [pair.flops_of_pair for pair in pairs]  # per image
        if not meta_is_teacher:
            for i, pair in enumerate(pairs):
                self.flops_by_module[i] += pair.back_flops if pair.taught else 0
                self.flops_by_module[i] += forward_flops(meta.stages[i], tokens) if i + 1 < self.teacher_runs else 0

    @property
    def flops_per_image(self) -> int:
        """Of all modules together."""
        return sum(self.flops_by_module)

    def __call__(self, forward, images: Tensor, target: Tensor) -> Step:
        with torch.no_grad():
            taught = self._teach(images)
        total, parts = 0.0, {}
        for i, (pair, mine, given) in enumerate(zip(self.pairs, forward(images), taught)):
            pair.progress = self.progress
            loss, own = pair.loss(mine, target, *given)
            total = total + loss
            parts |= {f"{name}/{i}": value for name, value in own.items()}
        return total, parts

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the student's modules in a chain."""
        return self.module(images)[-1]

    def _teach(self, images: Tensor) -> list[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Per module: input and output of the teacher module, and the teacher's logits; None where not needed."""
        h, states = images, []
        for i, pair in enumerate(self.pairs[: self.teacher_runs]):
            taught = pair.teach(h)
            states.append((h, taught))
            if i + 1 < self.teacher_runs:
                h = taught if self.meta_is_teacher else self.meta.stages[i](h)
        found = []
        for i, (pair, (h, taught)) in enumerate(zip(self.pairs, states)):
            wanted = None
            if pair.taught:  # in a meta model that is the teacher all ways lead to the same logits
                wanted = states[-1][1] if self.meta_is_teacher else self.meta.back(taught, i)
            found.append((h, taught, wanted))
        return found + [(None, None, None)] * (len(self.pairs) - len(found))


class ModuleChain(nn.Module):
    """Student modules one after another, each on what the one before puts out, as a constant."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.chain = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> the output of every module: border states (B, T, D_t), then logits (B, C)."""
        outputs = []
        for module in self.chain:
            x = module(x.detach())
            outputs.append(x)
        return outputs
