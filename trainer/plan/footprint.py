"""Memory of one GPU at the peak of a step, from shapes: what lies there always, and what comes and goes.

Under ZeRO-1 and 2 a rank holds all weights of what is trained (of experts its own), and its part of masters and
moments: dense ones shared out over all ranks, experts' over the ranks that hold the same experts. benchmarks/planner.py
compares the sum with what a real step allocates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from trainer.config.ds_config import Settings
from trainer.plan.traffic import FLOAT32, Layout, bytes_per_number, padded_numel
from trainer.plan.work import States, Work

BUCKET = 500_000_000  # elements: DeepSpeed's default of reduce_bucket_size
MOMENTS = {"adamw": 2, "sgd": 1}  # float32 copies of the weights that an optimiser keeps
# of a flat group in float32 while torch updates it: the gradient, and of SGD (which is not fused) that with decay
UPDATE_COPIES = {"adamw": 1, "sgd": 2}


BACKWARD = 2 / 3  # of a step's FLOPs, and of what it moves through memory


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU."""

    weights: float  # in the type of the forward pass
    masters: float  # float32, this rank's part
    moments: float
    average: float  # train.ema
    frozen: float  # teacher, meta model, predecessors
    gradients: float
    buckets: float  # that gradients are reduced in
    sent: float  # the copy of a bucket that is sent
    images: float
    activations: float  # what is trained keeps from the forward to the backward pass
    relayed: float  # what is frozen behind it keeps, which is gone before a gradient needs a bucket
    workspace: float  # of the largest layer while it runs backward
    update: float  # while the optimiser steps

    @property
    def always(self) -> float:
        """What lies there from step to step."""
        return self.weights + self.masters + self.moments + self.average + self.frozen

    @property
    def peak(self) -> float:
        """The most at one time: as the backward begins, as it ends, or as the optimiser steps."""
        begins = self.images + self.activations + max(self.relayed, self.buckets) + self.workspace
        ends = self.images + self.gradients + self.buckets + self.sent
        steps = self.images + self.gradients + self.update
        return self.always + max(begins, ends, steps)

    def parts(self) -> dict[str, float]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def footprint(work: Work, settings: Settings, layout: Layout, busiest: float = 1.0, form: str = "loop") -> Footprint:
    """Of one rank in one training.

    Args:
        busiest: see models.memory.expert_rows.
        form: of the experts' products, see models/moe/grouped.py.
    """
    number = bytes_per_number(settings)
    zero = settings.config["zero_optimization"]
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    flats = _flats_with_ranks(work, layout)
    held = sum(numel for numel, _ in flats)
    own = [padded_numel(numel, ranks) // ranks for numel, ranks in flats]
    on_gpu = 0 if offloaded else sum(own) * FLOAT32
    bucket = zero.get("reduce_bucket_size", BUCKET)
    buffers = 2 if zero.get("overlap_comm", False) else 1
    states = _states(work, settings, layout, busiest, form, largest=True)
    gradients = held if zero["stage"] == 1 else min(held, sum(own) + bucket)
    return Footprint(
        weights=held * number,
        masters=on_gpu,
        moments=MOMENTS[work.schedule.optimizer] * on_gpu,
        average=on_gpu if work.ema else 0,
        frozen=work.frozen_numbers * number,
        gradients=gradients * number,
        buckets=buffers * bucket * number,
        sent=min(bucket, held) * number,
        images=settings.micro_batch * work.image_numbers * number,
        activations=states.kept_recomputing if settings.activation_checkpointing else states.kept,
        relayed=states.relayed,
        workspace=states.widest,
        update=0 if offloaded else UPDATE_COPIES[work.schedule.optimizer] * FLOAT32 * max(own),
    )


def state_bytes(work: Work, settings: Settings, layout: Layout, busiest: float = 1.0, form: str = "loop") -> float:
    """Bytes of the states that a step passes through, whether it keeps them or not: what its memory traffic goes by.

    A part that is run forward alone counts for a third, and so does what activation checkpointing computes again.
    """
    states = _states(work, settings, layout, busiest, form)
    passed = states.both_ways + (1 - BACKWARD) * states.forward_only
    if settings.activation_checkpointing:
        passed += (1 - BACKWARD) * states.of_blocks
    return settings.accumulation * passed


def own_elements(work: Work, layout: Layout) -> int:
    """Weights that a rank updates."""
    return sum(padded_numel(numel, ranks) // ranks for numel, ranks in _flats_with_ranks(work, layout))


def _states(work: Work, settings: Settings, layout: Layout, busiest: float, form: str, largest: bool = False) -> States:
    return work.states(settings.micro_batch, bytes_per_number(settings), layout.ep_size, busiest, form, largest)


def _flats_with_ranks(work: Work, layout: Layout) -> list[tuple[int, int]]:
    """(elements, ranks that share its masters) of each flat group of a rank."""
    replicas = layout.world // layout.ep_size
    return [(numel, replicas if expert else layout.world) for numel, expert in work.flats(layout.ep_size)]
