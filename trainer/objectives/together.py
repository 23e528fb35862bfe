"""How all student modules learn at once, each still from its own teacher module alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.experts.guided_routing import Guide
from models.modules.meta import MetaModel
from models.modules.stages import Stage
from models.moe.out import Out, inside
from trainer.config.phases import DistillConfig
from trainer.objectives.base import Forward, Pairs, Step, Taught, Told, border_pairs
from trainer.objectives.cost import Pass, flops_per_image, forward_only
from trainer.objectives.distill import Distill, Lesson


class Together(Taught):
    """Every pair of modules in one step: one pass of the teacher, one of the student (not in the paper).

    The loss is the sum of the pairs' own (Distill). A student module is fed what the one before it puts out at that
    step, and no gradient crosses a border, so each learns as it would in a job of its own behind predecessors that
    change as it does; only the limit on the gradient norm is one for all of them.

    Args:
        students, teacher_stages: the modules in order.
        meta: what they stand in.
        meta_is_teacher: its stages are the teacher's modules (meta.blocks_per_module=0), which then run only once.
        guides: of teacher-guided routing, one per module.
        told_share: see Taught.
    """

    def __init__(
        self,
        students: Sequence[nn.Module],
        teacher_stages: Sequence[Stage],
        meta: MetaModel,
        config: DistillConfig,
        tokens: int,
        meta_is_teacher: bool,
        label_smoothing: float = 0.0,
        guides: Sequence[Guide | None] = (),
        told_share: float = 1.0,
    ):
        assert len(students) == len(teacher_stages) == meta.num_modules, "one pair per stage of the meta model"
        self.pairs: list[Distill] = []
        self.classifies = meta.classifies
        self.teacher = None if self.classifies else MetaModel(teacher_stages)
        for i, (student, stage) in enumerate(zip(students, teacher_stages)):
            guide = guides[i] if guides else None
            of_pair = (student, stage, meta, i, config, tokens, label_smoothing, students[:i], guide, self.teacher)
            self.pairs.append(Distill(*of_pair, told_share))
        self.meta = meta
        self.meta_is_teacher = meta_is_teacher
        self.tokens = tokens
        self.told_share = told_share
        self.module = ModuleChain(students)
        self.frozen = [meta, *teacher_stages]
        self.teacher_runs = sum(pair.taught_here for pair in self.pairs)  # modules, from the first on

    @torch.no_grad()
    def tell(self, images: Tensor) -> Told:
        """The lessons of all pairs, with <module>/ before their names."""
        told = {}
        for i, lesson in enumerate(self._teach(images)):
            of_pair = self.pairs[i].needed(lesson).told()
            told |= {f"{i}/{name}": tensor for name, tensor in of_pair.items()}
        return told

    def learn(self, forward: Forward, images: Tensor, target: Tensor, told: Told, progress: float, out: Out) -> Step:
        """See Taught; the parts are those of the pairs, with /<module> behind the name."""
        outputs = forward(images, out)
        total = 0.0
        parts = {}
        for i, (pair, state) in enumerate(zip(self.pairs, outputs)):
            of_pair = {name.removeprefix(f"{i}/"): told[name] for name in told if name.startswith(f"{i}/")}
            loss, parts_of_pair = pair.loss(state, target, Lesson.of(of_pair), progress, inside(out, "chain", str(i)))
            total = total + loss
            parts |= {f"{name}/{i}": value for name, value in parts_of_pair.items()}
        return total, parts

    def predict(self, images: Tensor, out: Out | None = None) -> Tensor:
        """Logits (B, C) of the student's modules in a chain, or without classes their final tokens."""
        return self.module(images, out)[-1]

    def compare(self, images: Tensor, out: Out | None = None) -> Pairs:
        """The student's modules in a chain beside the teacher's at every border."""
        return border_pairs(self.module(images, out), self.teacher.hidden_states(images))

    def passes(self) -> list[Pass]:
        """Those of all modules."""
        passes = []
        for i in range(len(self.pairs)):
            passes += self.passes_of_module(i)
        return passes

    def passes_of_module(self, i: int) -> list[Pass]:
        """What module i adds: its pair, and in a meta model of its own the teacher's suffix and the way to the next."""
        pair = self.pairs[i]
        passes = pair.passes_of_pair()
        if self.meta_is_teacher:
            return passes
        if pair.taught:
            passes += forward_only(*self.meta.stages[i + 1 :], share=self.told_share)
        if i + 1 < self.teacher_runs:
            passes += forward_only(self.meta.stages[i], share=self.told_share)
        return passes

    @functools.cached_property
    def flops_by_module(self) -> list[int]:
        """FLOPs of one image in a step, backward included, that each module adds; see Objective.flops_per_image."""
        return [flops_per_image(self.passes_of_module(i), self.tokens) for i in range(len(self.pairs))]

    def _teach(self, images: Tensor) -> list[Lesson]:
        """What the teacher's side gives each pair that it teaches."""
        lessons: list[Lesson] = []
        h = images
        for i, pair in enumerate(self.pairs[: self.teacher_runs]):
            lesson = pair.teach(h)
            lessons.append(lesson)
            if i + 1 < self.teacher_runs:
                h = lesson.state if self.meta_is_teacher else self.meta.stages[i](h)
        for i, lesson in enumerate(lessons):
            if not self.pairs[i].taught:
                continue
            # in a meta model that is the teacher all ways lead to the same logits
            logits = lessons[-1].state if self.meta_is_teacher else self.meta.back(lesson.state, i)
            lessons[i] = replace(lesson, logits=logits)
        return lessons


class ModuleChain(nn.Module):
    """Student modules one after another, each on what the one before puts out, as a constant."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.chain = nn.ModuleList(modules)

    def forward(self, x: Tensor, out: Out | None = None) -> list[Tensor]:
        """Images (B, C, H, W) -> the output of every module: border states (B, T, D_t), then logits (B, C).

        What module i tells beside is left in out["chain"]["i"].
        """
        outputs = []
        for i, module in enumerate(self.chain):
            x = module(x.detach(), inside(out, "chain", str(i)))
            outputs.append(x)
        return outputs
