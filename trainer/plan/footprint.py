"""Memory of one GPU at the peak of a step, from shapes: what lies there always, and what comes and goes.

Under ZeRO-1 and 2 a rank holds all weights of what is trained (of experts its own), and of masters and moments its part:
dense ones shared out over all ranks, experts' over the ranks that hold the same experts. benchmarks/planner.py compares
the sum with what a real step allocates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from models.memory import kept_bytes, widest_bytes
from trainer.config.ds_config import Settings
from trainer.plan.traffic import FLOAT32, Layout, bytes_per_number, padded_numel
from trainer.plan.work import Work, flat_groups, kept_by

BUCKET = 500_000_000  # elements: DeepSpeed's default of reduce_bucket_size
MOMENTS = {"adamw": 2, "sgd": 1}  # float32 copies of the weights that an optimiser keeps
# of a flat group's part in float32 while torch updates it: the gradient, and of AdamW the root and the divisor
UPDATE_COPIES = {"adamw": 3, "sgd": 1}


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


def footprint(work: Work, settings: Settings, layout: Layout, busiest: float = 1.0) -> Footprint:
    """Of one rank in one training.

    Args:
        busiest: see models.memory.expert_rows.
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
    experts = {"ep_size": layout.ep_size, "busiest": busiest}
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
        activations=_activations(work, settings, number, experts),
        relayed=kept_by(work.relaying_parts, False, settings.micro_batch, work.tokens, number, **experts),
        workspace=_workspace(work, settings, number, busiest),
        update=0 if offloaded else UPDATE_COPIES[work.schedule.optimizer] * FLOAT32 * max(own),
    )


def _flats_with_ranks(work: Work, layout: Layout) -> list[tuple[int, int]]:
    """(elements, ranks that share its masters) of each flat group of a rank."""
    layers = work.moe_layers
    local = layers[0].config.num_experts // layout.ep_size if layers else 0
    replicas = layout.world // layout.ep_size
    return [(numel, replicas if expert else layout.world) for numel, expert in flat_groups(work.groups, local)]


def _activations(work: Work, settings: Settings, number: int, experts: dict) -> float:
    images, tokens = settings.micro_batch, work.tokens
    everything = kept_by(work.trained_parts, True, images, tokens, number, **experts)
    if not settings.activation_checkpointing:
        return everything
    # each block's input, and all that one block keeps while it is computed again
    inside = [kept_bytes(block, images, tokens, number, **experts) for block in work.blocks]
    inputs = work.block_numbers() * images * number
    return everything - sum(inside) + inputs + max(inside, default=0)


def _workspace(work: Work, settings: Settings, number: int, busiest: float) -> float:
    images, tokens = settings.micro_batch, work.tokens
    return max((widest_bytes(block, images, tokens, number, busiest) for block in work.blocks), default=0)
