"""How a meta model learns to stand in for the teacher's modules."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.flops import forward_flops
from models.modules.meta import MetaModel
from models.modules.stages import Stage
from trainer.config.phases import MetaConfig
from trainer.objectives.base import Objective, Step, relative_mse, smoothing, soft_kl
from trainer.objectives.end_to_end import Classify

GRID = 1000  # points of the schedule at which the cost of Theseus is averaged


def meta_objective(
    meta: MetaModel, stages: list[Stage], config: MetaConfig, tokens: int, label_smoothing: float, seed: int
) -> Objective:
    """What meta.objective names; its module's state dict is the meta model's, some under "meta."."""
    if config.objective == "labels":
        return Classify(meta, tokens, label_smoothing)
    if config.objective == "theseus":
        return Theseus(meta, stages, config, tokens, label_smoothing, seed)
    return MatchTeacher(meta, stages, config, tokens, label_smoothing)


class MatchTeacher(Objective):
    """The meta model learns the teacher's hidden states at the module borders and its logits (not in the paper).

    loss = free_weight x relative MSE at the borders of the free-running meta model
         + forced_weight x the same where each stage is fed the teacher's border state
         + kl_weight x (KL(teacher || free-running) + KL(teacher || last stage, forced)) + label_weight x CE.
    Relative MSE = |a - b|^2 / |b|^2. Free and forced are the same at the first border, which counts once, with the
    larger weight. A weight of 0 leaves out the passes that only it needs. A hub teacher was not grown inside the meta
    model, so its modules only work there when the borders carry what it expects.
    """

    def __init__(self, meta: MetaModel, stages: list[Stage], config: MetaConfig, tokens: int,
                 label_smoothing: float = 0.0):  # fmt: skip
        self.module, self.config, self.label_smoothing = MetaWithForcedStages(meta), config, label_smoothing
        self.teacher = MetaModel(stages)  # the teacher as a chain of its own modules
        self.frozen = [self.teacher]
        borders = len(stages) - 1
        free, forced = config.free_weight, config.forced_weight
        self.weights = [max(free, forced)] * min(borders, 1) + [free] * (borders - 1) + [forced] * (borders - 1)
        # how far the teacher runs, and which stages run on its states: as far as somebody asks for the result
        self.teacher_runs = len(stages) if config.kl_weight else borders if any(self.weights) else 0
        self.forced_stages = range(1, self.teacher_runs if forced else 1)
        cost = [forward_flops(stage, tokens) for stage in meta.stages]
        taught = sum(forward_flops(stage, tokens) for stage in stages[: self.teacher_runs])
        self.flops_per_image = taught + 3 * (sum(cost) + sum(cost[i] for i in self.forced_stages))

    def __call__(self, forward, images: Tensor, target: Tensor) -> Step:
        with torch.no_grad():
            states = self.teacher.hidden_states(images, self.teacher_runs)
        free, logits, forced = forward(images, states[: len(self.forced_stages)])
        borders, wanted = states[: len(free)], states[len(free) :]  # wanted: the logits, unless nobody asks for them
        pairs = [*zip(free, borders), *zip(forced, borders[1:])]
        errors = [w * relative_mse(a, b) for w, (a, b) in zip(self.weights, pairs) if w]
        match = sum(errors, start=logits.new_zeros((), dtype=torch.float32))  # a single module has no border
        loss, parts = match, {"match": match.detach()}
        if wanted:
            kl = sum(soft_kl(wanted[0], given) for given in [logits, *forced[len(free) - 1 :]])
            loss, parts["kl"] = loss + self.config.kl_weight * kl, kl.detach()
        label = F.cross_entropy(logits.float(), target, label_smoothing=smoothing(target, self.label_smoothing))
        return loss + self.config.label_weight * label, parts | {"label": label.detach()}

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the free-running meta model."""
        return self.module.meta(images)


class MetaWithForcedStages(nn.Module):
    """A meta model run twice in one forward: free from the images, and stage by stage from the teacher's borders."""

    def __init__(self, meta: MetaModel):
        super().__init__()
        self.meta = meta

    def forward(self, images: Tensor, borders: list[Tensor]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Border states (N-1) and logits of the free run; outputs of stages 1, 2, ... on as many borders as given."""
        *free, logits = self.meta.hidden_states(images)
        return free, logits, [stage(h) for stage, h in zip(self.meta.stages[1:], borders)]


class Theseus(Objective):
    """Meta stages learn in the midst of the teacher's modules (BERT-of-Theseus, arXiv 2002.02925).

    In every step each stage stands in for its teacher module with probability p, which rises linearly from
    replace_rate to 1 over the first half of the steps (the paper's curriculum); elsewhere the frozen teacher module
    runs and passes the gradient on. loss = kl_weight x KL(teacher || mixed model) + label_weight x CE; the paper has
    the labels alone.
    """

    def __init__(self, meta: MetaModel, stages: list[Stage], config: MetaConfig, tokens: int,
                 label_smoothing: float = 0.0, seed: int = 0):  # fmt: skip
        self.module, self.config, self.label_smoothing, self.seed = MixedStages(meta), config, label_smoothing, seed
        self.teacher = MetaModel(stages)
        self.frozen = [self.teacher]
        ours, theirs = ([forward_flops(stage, tokens) for stage in stages] for stages in (meta.stages, stages))
        points = [self.replace_rate((i + 0.5) / GRID) for i in range(GRID)]
        mixed = sum(expected_mixed_flops(p, ours, theirs) for p in points) / GRID
        self.flops_per_image = round(mixed) + (sum(theirs) if config.kl_weight else 0)

    def __call__(self, forward, images: Tensor, target: Tensor) -> Step:
        own = self.draw(self.progress)
        logits = forward(images, [None if mine else stage for mine, stage in zip(own, self.teacher.stages)]).float()
        label = F.cross_entropy(logits, target, label_smoothing=smoothing(target, self.label_smoothing))
        loss, parts = self.config.label_weight * label, {"label": label.detach()}
        if self.config.kl_weight:
            with torch.no_grad():
                wanted = self.teacher(images)
            kl = soft_kl(wanted, logits)
            loss, parts["kl"] = loss + self.config.kl_weight * kl, kl.detach()
        return loss, parts

    def replace_rate(self, progress: float) -> float:
        """Probability of a meta stage where a share `progress` of the steps is done."""
        start = self.config.replace_rate
        return start + (1 - start) * min(1.0, 2 * progress)

    def draw(self, progress: float) -> list[bool]:
        """Which stages the meta model runs in a step: the same on every rank and after a resume.

        At least one, unlike the paper's draw: a step without any would have nothing to train.
        """
        # a generator of its own: torch's is seeded anew per rank and micro-batch, and ZeRO waits for the same gradients
        # on every rank
        generator, p = random.Random(f"{self.seed} {progress!r}"), self.replace_rate(progress)
        own = [generator.random() < p for _ in self.teacher.stages]
        one = generator.randrange(len(own))
        return own if any(own) else [i == one for i in range(len(own))]

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the meta model alone."""
        return self.module.meta(images)


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


def expected_mixed_flops(p: float, ours: list[int], theirs: list[int]) -> float:
    """Mean FLOPs of one image through a mixed model and back, where each stage is ours with probability p.

    Ours cost three forwards; a frozen one costs one, and one more behind a stage of ours, for the gradient it passes
    on. When none is drawn (probability (1-p)^N), one of the N is picked.

    Args:
        ours, theirs: forward FLOPs per stage.
    """
    stages, other = len(ours), 1 - p
    none = other**stages
    total = 0.0
    for i, (mine, frozen) in enumerate(zip(ours, theirs)):
        trained = p + none / stages
        # frozen, and one before it trained: drawn so, or none drawn and the pick stands before it
        passes_on = other * (1 - other**i) + none * i / stages
        total += 3 * mine * trained + frozen * (1 - trained) + frozen * passes_on
    return total
