"""How a meta model learns to stand in for the teacher's modules."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.flops import flops
from models.modules.meta import MetaModel
from models.modules.stages import Stage
from models.moe.out import Out
from trainer.config.phases import MetaConfig
from trainer.objectives.base import (
    Forward,
    Objective,
    Pairs,
    Step,
    border_pairs,
    label_loss,
    relative_mse,
    soft_kl,
)
from trainer.objectives.cost import Pass, flops_per_image, forward_only, rate_at, replacing_flops, trained
from trainer.objectives.end_to_end import Classify


def meta_objective(
    meta: MetaModel, stages: list[Stage], config: MetaConfig, tokens: int, label_smoothing: float, seed: int
) -> Objective:
    """What meta.objective names; its module's state dict is the meta model's, some under "meta."."""
    if config.objective == "labels":
        return Classify(meta, tokens, label_smoothing)
    if config.objective == "theseus":
        return Theseus(meta, stages, config, tokens, label_smoothing, seed)
    return MatchTeacher(meta, stages, config, tokens, label_smoothing)


def output_error(classifies: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """(the teacher's output, another) -> how far it is: KL of logits (B, C), or relative MSE of tokens (B, T, D)."""
    if classifies:
        return soft_kl
    return lambda teacher_tokens, tokens: relative_mse(tokens, teacher_tokens)


class MatchTeacher(Objective):
    """The meta model learns the teacher's hidden states at the module borders and its logits (not in the paper).

    loss = free_weight x relative MSE at the borders of the free-running meta model
         + forced_weight x the same where each stage is fed the teacher's border state
         + kl_weight x (KL(teacher || free-running) + KL(teacher || last stage, forced)) + label_weight x CE.
    Without classes the relative MSE of the final tokens stands in for the KL, and there is no CE.
    Relative MSE = |a - b|^2 / |b|^2. Free and forced are the same at the first border, which counts once, with the
    larger weight. A weight of 0 leaves out the passes that only it needs. A hub teacher was not grown inside the meta
    model, so its modules only work there when the borders carry what it expects.
    """

    def __init__(
        self, meta: MetaModel, stages: list[Stage], config: MetaConfig, tokens: int, label_smoothing: float = 0.0
    ):
        assert len(stages) == meta.num_modules, "one stage of the teacher per stage of the meta model"
        self.module = MetaWithForcedStages(meta)
        self.teacher = MetaModel(stages)  # the teacher as a chain of its own modules
        self.classifies = self.teacher.classifies
        self.config = config
        self.tokens = tokens
        self.label_smoothing = label_smoothing
        self.frozen = [self.teacher]
        num_borders = len(stages) - 1
        free = config.free_weight
        forced = config.forced_weight
        # of the errors at the first border, at the others free, and at the others forced
        first = [max(free, forced)] * min(num_borders, 1)
        self.weights = first + [free] * (num_borders - 1) + [forced] * (num_borders - 1)
        # the teacher runs as far as somebody asks for the result
        self.teacher_runs = 0
        if config.kl_weight:
            self.teacher_runs = len(stages)
        elif any(self.weights):
            self.teacher_runs = num_borders
        # the meta stages that also run on the teacher's states
        self.forced_stages = range(1, self.teacher_runs) if forced else range(0)

    def step(self, forward: Forward, images: Tensor, target: Tensor, progress: float, out: Out) -> Step:
        """See Objective.__call__; parts: match, kl, label; or match, tokens."""
        with torch.no_grad():
            teacher_states = self.teacher.hidden_states(images, self.teacher_runs)
        free, output, forced = forward(images, teacher_states[: len(self.forced_stages)])
        num_borders = len(free)
        borders = teacher_states[:num_borders]
        teacher_output = teacher_states[num_borders:]  # none where nobody asks for it

        # sum over free and forced borders of weight |a - b|^2 / |b|^2
        errors = []
        pairs = [*zip(free, borders), *zip(forced, borders[1:])]
        for weight, (state, border) in zip(self.weights, pairs):
            if weight:
                errors.append(weight * relative_mse(state, border))
        match = sum(errors, start=output.new_zeros((), dtype=torch.float32))  # a single module has no border
        loss = match
        parts = {"match": match.detach()}
        if teacher_output:
            # + kl_weight (KL(teacher || free-running) + KL(teacher || last stage on the teacher's state))
            forced_output = forced[num_borders - 1 :]
            error = output_error(self.classifies)
            last = sum(error(teacher_output[0], each) for each in [output, *forced_output])
            loss = loss + self.config.kl_weight * last
            parts["kl" if self.classifies else "tokens"] = last.detach()
        if not self.classifies:
            return loss, parts
        # + label_weight CE
        label = label_loss(output.float(), target, self.label_smoothing)
        parts["label"] = label.detach()
        return loss + self.config.label_weight * label, parts

    def predict(self, images: Tensor, out: Out | None = None) -> Tensor:
        """Logits (B, C) of the free-running meta model, or without classes its final tokens."""
        return self.module.meta(images)

    def compare(self, images: Tensor, out: Out | None = None) -> Pairs:
        """The free-running meta model beside the teacher at every border."""
        return border_pairs(self.module.meta.hidden_states(images), self.teacher.hidden_states(images))

    def passes(self) -> list[Pass]:
        """The teacher as far as it runs, the meta model, and its forced stages once more."""
        stages = self.module.meta.stages
        forced = [stages[i] for i in self.forced_stages]
        return forward_only(*self.teacher.stages[: self.teacher_runs]) + trained(*stages, *forced)


class MetaWithForcedStages(nn.Module):
    """A meta model run twice in one forward: free from the images, and stage by stage from the teacher's borders."""

    def __init__(self, meta: MetaModel):
        super().__init__()
        self.meta = meta

    def forward(self, images: Tensor, borders: list[Tensor]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Border states (N-1) and logits of the free run; outputs of stages 1, 2, ... on as many borders as given."""
        *free, logits = self.meta.hidden_states(images)
        forced = [stage(h) for stage, h in zip(self.meta.stages[1:], borders)]
        return free, logits, forced


class Theseus(Objective):
    """Meta stages learn in the midst of the teacher's modules (BERT-of-Theseus, arXiv 2002.02925).

    In every step each stage stands in for its teacher module with probability p, which rises linearly from
    replace_rate to 1 over the first half of the steps (the paper's curriculum); elsewhere the frozen teacher module
    runs and passes the gradient on. loss = kl_weight x KL(teacher || mixed model) + label_weight x CE; the paper has
    the labels alone. Without classes: kl_weight x relative MSE of the final tokens.
    """

    def __init__(
        self,
        meta: MetaModel,
        stages: list[Stage],
        config: MetaConfig,
        tokens: int,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ):
        assert len(stages) == meta.num_modules, "one stage of the teacher per stage of the meta model"
        self.module = MixedStages(meta)
        self.teacher = MetaModel(stages)
        self.classifies = self.teacher.classifies
        self.config = config
        self.tokens = tokens
        self.label_smoothing = label_smoothing
        self.seed = seed
        self.frozen = [self.teacher]

    def step(self, forward: Forward, images: Tensor, target: Tensor, progress: float, out: Out) -> Step:
        """See Objective.__call__; parts: label, kl; or tokens."""
        stand_ins = []
        for replaced, teacher_stage in zip(self.draw(progress), self.teacher.stages):
            stand_ins.append(None if replaced else teacher_stage)
        output = forward(images, stand_ins).float()
        loss = output.new_zeros(())
        parts = {}
        if self.classifies:
            # label_weight CE
            label = label_loss(output, target, self.label_smoothing)
            loss = self.config.label_weight * label
            parts["label"] = label.detach()
        if self.config.kl_weight:
            # + kl_weight KL(teacher || mixed model)
            with torch.no_grad():
                teacher_output = self.teacher(images)
            error = output_error(self.classifies)(teacher_output, output)
            loss = loss + self.config.kl_weight * error
            parts["kl" if self.classifies else "tokens"] = error.detach()
        return loss, parts

    def replace_rate(self, progress: float) -> float:
        """Probability of a meta stage where a share `progress` of the steps is done."""
        return rate_at(progress, self.config.replace_rate)

    def draw(self, progress: float) -> list[bool]:
        """Which teacher modules are replaced in a step: the same on every rank and after a resume.

        At least one, unlike the paper's draw: a step without any would have nothing to train.
        """
        # a generator of its own: torch's is seeded anew per rank and micro-batch, and ZeRO waits for the same gradients
        # on every rank
        generator = random.Random(f"{self.seed} {progress!r}")
        rate = self.replace_rate(progress)
        replaced = [generator.random() < rate for _ in self.teacher.stages]
        pick = generator.randrange(len(replaced))
        if not any(replaced):
            replaced[pick] = True
        return replaced

    def predict(self, images: Tensor, out: Out | None = None) -> Tensor:
        """Logits (B, C) of the meta model alone, or without classes its final tokens."""
        return self.module.meta(images)

    def compare(self, images: Tensor, out: Out | None = None) -> Pairs:
        """The meta model alone beside the teacher at every border."""
        return border_pairs(self.module.meta.hidden_states(images), self.teacher.hidden_states(images))

    @functools.cached_property
    def flops_per_image(self) -> int:
        """See Objective.__call__; the mean over all draws of all steps."""
        ours = [flops(stage, self.tokens) for stage in self.module.meta.stages]
        theirs = [flops(stage, self.tokens) for stage in self.teacher.stages]
        mixed = replacing_flops(self.config.replace_rate, ours, theirs)
        return mixed + flops_per_image(self.passes(), self.tokens)

    def passes(self) -> list[Pass]:
        """What every step runs beside the mixed model: the whole teacher, where its logits count."""
        if not self.config.kl_weight:
            return []
        return forward_only(*self.teacher.stages)


class MixedStages(nn.Module):
    """A meta model in which others may stand in for its stages."""

    def __init__(self, meta: MetaModel):
        super().__init__()
        self.meta = meta

    def forward(self, x: Tensor, stand_ins: list[nn.Module | None]) -> Tensor:
        """Images (B, C, H, W) -> logits (B, C); None = the stage itself."""
        for stage, other in zip(self.meta.stages, stand_ins):
            x = stage(x) if other is None else other(x)
        return x
