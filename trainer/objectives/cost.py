"""What a step costs: an objective lists what one image passes through, and this is where the list gets its price."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from models.experts.guided_routing import TeacherRouters
from models.flops import Flops, flops

GRID = 1000  # points of the schedule at which the cost of module replacing is averaged


@dataclass(frozen=True)
class Pass:
    """One image through `part` in a share of the steps, and what of the backward it takes part in."""

    part: nn.Module
    relays: bool = False  # the gradient with respect to its input, where that can take one
    learns: bool = False  # the gradient with respect to its weights
    share: float = 1.0
    tokens: int = 0  # length of the sequence it is given, where that is not the objective's


def forward_only(*parts: nn.Module, share: float = 1.0) -> list[Pass]:
    """Frozen, and no gradient comes back: the forward alone."""
    return [Pass(part, share=share) for part in parts]


def relaying(*parts: nn.Module, tokens: int = 0) -> list[Pass]:
    """Frozen behind something trained: the forward, and the gradient with respect to its input."""
    return [Pass(part, relays=True, tokens=tokens) for part in parts]


def trained(*parts: nn.Module) -> list[Pass]:
    """Forward and backward, with respect to its input and to its weights."""
    return [Pass(part, relays=True, learns=True) for part in parts]


def flops_per_image(passes: Iterable[Pass], tokens: int) -> int:
    """FLOPs of one image in a step: sum over the passes of share x (forward + what of the backward is computed).

    Args:
        tokens: length of the token sequence T, prefix tokens included.
    """
    total = 0
    for each in passes:
        assert 0 <= each.share <= 1, each
        if isinstance(each.part, TeacherRouters):
            spent = Flops(each.part.flops_per_image(tokens))
        else:
            spent = flops(each.part, each.tokens or tokens)
        of_pass = spent.forward + each.relays * spent.to_input + each.learns * spent.to_weights
        total += round(each.share * of_pass)
    return total


def replacing_flops(replace_rate: float, ours: Sequence[Flops], theirs: Sequence[Flops]) -> int:
    """Mean over a training by module replacing of the FLOPs of one image through the mixed model and back.

    Args:
        replace_rate: at the start, see rate_at.
        ours, theirs: per stage of the meta model and of the teacher.
    """
    total = 0.0
    for point in range(GRID):
        rate = rate_at((point + 0.5) / GRID, replace_rate)
        total += expected_mixed_flops(rate, ours, theirs)
    return round(total / GRID)


def rate_at(progress: float, replace_rate: float) -> float:
    """Probability of a meta stage once a share `progress` of the steps is done: r + (1 - r) min(1, 2 progress)."""
    return replace_rate + (1 - replace_rate) * min(1.0, 2 * progress)


def expected_mixed_flops(p: float, ours: Sequence[Flops], theirs: Sequence[Flops]) -> float:
    """Mean FLOPs of one image through a mixed model and back, where each stage is ours with probability p.

    Ours cost forward and backward; a frozen one costs its forward, and behind a stage of ours the gradient it passes on
    as well. When none is drawn (probability (1-p)^N), one of the N is picked.

    Args:
        ours, theirs: per stage.
    """
    stages = len(ours)
    frozen = 1 - p
    none_drawn = frozen**stages
    total = 0.0
    for i, (our_stage, their_stage) in enumerate(zip(ours, theirs)):
        # P(stage i is ours) = p + (1-p)^N / N
        is_ours = p + none_drawn / stages
        # P(frozen, and one before it is ours): drawn so, or none drawn and the pick stands before it
        relays = frozen * (1 - frozen**i) + none_drawn * i / stages
        total += our_stage.trained * is_ours + their_stage.forward * (1 - is_ours) + their_stage.to_input * relays
    return total
