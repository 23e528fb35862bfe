"""How long a step takes: FLOPs at a stated share of the peak, and the communication that does not run beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from models.memory import expert_rows
from trainer.config.ds_config import Settings
from trainer.config.gpus import Gpu
from trainer.plan.footprint import BACKWARD, Footprint, footprint, own_elements, state_bytes
from trainer.plan.traffic import Collective, Layout, collectives, wire_bytes
from trainer.plan.work import Work

HOST_GB_S = 20.0  # of the host's memory for each GPU, where the optimiser is there: an assumption


@dataclass(frozen=True)
class Seconds:
    """Of one optimiser step, on one GPU."""

    compute: float
    exchange: float  # all-to-all, which nothing hides
    gradients: float  # what of their reduction does not run beside the backward pass
    weights: float  # all-gather of what each rank has updated
    update: float  # the optimiser's reads and writes
    small: float  # norms and counts: single numbers that ranks wait for

    @property
    def total(self) -> float:
        """One after another."""
        return self.compute + self.communication + self.update

    @property
    def communication(self) -> float:
        """All that the ranks wait for."""
        return self.exchange + self.gradients + self.weights + self.small


@dataclass(frozen=True)
class Estimate:
    """One training on some ranks: what it needs and takes."""

    work: Work
    settings: Settings
    layout: Layout
    memory: Footprint
    moved: list[Collective]
    seconds: Seconds

    @property
    def steps(self) -> int:
        """From its start to its end."""
        return self.work.steps(self.settings.global_batch)

    @property
    def hours(self) -> float:
        """Wall-clock of one job."""
        return self.steps * self.seconds.total / 3600

    @property
    def gpu_hours(self) -> float:
        """Of all its jobs."""
        return self.hours * self.layout.world * self.work.jobs

    def wire(self, *kinds: str) -> tuple[float, float]:
        """(bytes inside the node, bytes between nodes) that a GPU sends in a step, of what moves these."""
        pairs = [wire_bytes(each, self.layout) for each in self.moved if each.what in kinds]
        return sum(inside for inside, _ in pairs), sum(between for _, between in pairs)


EXCHANGED = ("tokens to experts and back",)
GRADIENTS = ("gradients", "gradients of experts")
WEIGHTS = ("weights", "weights of experts")


def estimate(work: Work, settings: Settings, layout: Layout, gpu: Gpu, busiest: float) -> Estimate:
    """Memory, traffic and time of one training.

    Args:
        layout: with the ep_size of `settings`.
        busiest: see models.memory.expert_rows.
    """
    moved = collectives(work, settings, layout, busiest)
    memory = footprint(work, settings, layout, busiest, gpu.form)
    seconds = _seconds(work, settings, layout, gpu, busiest, moved)
    return Estimate(work, settings, layout, memory, moved, seconds)


def step_flops(work: Work, settings: Settings, layout: Layout, busiest: float) -> float:
    """FLOPs of the busiest GPU in a step: counted ones, what checkpointing computes again, more rows than the mean."""
    per_image = work.objective.flops_per_image
    if settings.activation_checkpointing:
        per_image += work.recomputed_flops
    images = settings.micro_batch * settings.accumulation
    if layout.ep_size == 1:
        busiest = 1.0
    return images * per_image + settings.accumulation * _further_flops(work, settings.micro_batch, busiest)


def _seconds(
    work: Work,
    settings: Settings,
    layout: Layout,
    gpu: Gpu,
    busiest: float,
    moved: Sequence[Collective],
) -> Seconds:
    # FLOPs at the rate counted on, and what the layers between the products move through memory
    compute = step_flops(work, settings, layout, busiest) / gpu.flops_per_second
    compute += gpu.touched * state_bytes(work, settings, layout, busiest, gpu.form) / (gpu.memory_gb_s * 1e9)
    times = dict.fromkeys(("exchange", "gradients", "weights", "small"), 0.0)
    for each in moved:
        times[_kind(each)] += _time(each, layout, gpu)
    if settings.config["zero_optimization"].get("overlap_comm", False):
        # ZeRO-1 reduces in the backward of the last micro-batch, ZeRO-2 in all of them
        passes = settings.accumulation if settings.config["zero_optimization"]["stage"] == 2 else 1
        beside = gpu.overlap * BACKWARD * compute * passes / settings.accumulation
        times["gradients"] = max(0.0, times["gradients"] - beside)
    return Seconds(compute, update=_update(work, settings, layout, gpu), **times)


def _kind(collective: Collective) -> str:
    if collective.what in EXCHANGED:
        return "exchange"
    if collective.what in GRADIENTS:
        return "gradients"
    return "weights" if collective.what in WEIGHTS else "small"


def _time(collective: Collective, layout: Layout, gpu: Gpu) -> float:
    """bytes / bandwidth inside the node and between nodes, and the latency of every call."""
    if collective.size < 2:
        return 0.0
    inside, between = wire_bytes(collective, layout)
    latency = collective.calls * gpu.latency_us * 1e-6 * math.log2(collective.size)
    return inside / (gpu.node_gb_s * 1e9) + between / (gpu.network_gb_s * 1e9) + latency


def _update(work: Work, settings: Settings, layout: Layout, gpu: Gpu) -> float:
    offloaded = settings.config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    speed = HOST_GB_S if offloaded else gpu.memory_gb_s
    return own_elements(work, layout) * gpu.updated_bytes / (speed * 1e9)


def _further_flops(work: Work, images: int, busiest: float) -> float:
    """FLOPs of rows beyond the mean, forward and backward; below 0 where tokens are dropped."""
    total = 0.0
    for layer, of_image in zip(work.moe_layers, work.expert_flops):
        taken = images * work.tokens * layer.config.k
        rows = expert_rows(layer.config, images, work.tokens, busiest)
        total += images * of_image * (rows - taken) / taken
    return total
