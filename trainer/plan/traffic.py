"""What one optimiser step moves between ranks: the collectives it asks of torch.distributed, and the bytes on the wire.

The collectives are those of DeepSpeed 0.19.8 with ZeRO-1 or 2 and of our MoE layer, call by call;
tests/integration/test_planned_traffic.py compares them with what a real step asks for. Not in them: the row of metrics
every run.log_every steps, and 24 bytes a second by which ranks agree to go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from models.memory import expert_rows
from models.moe.layer import MoE
from trainer.config.ds_config import Settings
from trainer.plan.work import Work

ALIGNED = 2  # elements: DeepSpeed pads each flat group to a multiple of this times the ranks
EXCHANGES = 4  # all-to-alls of an MoE layer's rows: to the experts and back, and both again for the gradient
RECOMPUTED_EXCHANGES = 2  # more where activation checkpointing runs the forward of the layer again
FLOAT32 = 4  # bytes
INT64 = 8
Kind = Literal["all_reduce", "reduce", "all_gather", "all_to_all"]


@dataclass(frozen=True)
class Layout:
    """The ranks of a job and how they share the experts.

    Ranks are numbered node by node. DeepSpeed gives the experts of a layer to `ep_size` ranks that follow one another;
    the ranks with the same experts stand `ep_size` apart.
    """

    nodes: int
    per_node: int
    ep_size: int = 1

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.nodes * self.per_node

    def group(self, name: str) -> list[int]:
        """The ranks of rank 0's group: "world", "experts" (which share a layer), or "replicas" (of one expert)."""
        if name == "world":
            return list(range(self.world))
        if name == "experts":
            return list(range(self.ep_size))
        return list(range(0, self.world, self.ep_size))

    def split(self, name: str) -> tuple[int, int]:
        """(nodes a group lies on, its ranks on each)."""
        ranks = self.group(name)
        nodes = len({rank // self.per_node for rank in ranks})
        return nodes, math.ceil(len(ranks) / nodes)


@dataclass(frozen=True)
class Collective:
    """One kind of call of a step.

    Attributes:
        what: it moves, for people.
        kind: of call.
        group: see Layout.group.
        size: ranks of the group.
        calls: of it in a step.
        bytes: of the tensors handed over in all calls together; of all_gather and all_to_all, of what comes.
    """

    what: str
    kind: Kind
    group: str
    size: int
    calls: int
    bytes: int


def collectives(work: Work, settings: Settings, layout: Layout, busiest: float = 1.0) -> list[Collective]:
    """All that one optimiser step of a rank asks for.

    Args:
        busiest: rows of the busiest rank over the mean, see models.memory.expert_rows; 1: mean over the ranks.
    """
    number = bytes_per_number(settings)
    flats = work.flats(layout.ep_size)
    zero = settings.config["zero_optimization"]
    found = _exchanges(work, settings, layout, busiest)
    # ZeRO-2 reduces the gradients of every micro-batch, ZeRO-1 their sum
    times = settings.accumulation if zero["stage"] == 2 else 1
    kind: Kind = "all_reduce" if zero.get("use_multi_rank_bucket_allreduce", True) else "reduce"
    for group in ("world", "replicas"):
        size = len(layout.group(group))
        elements = sum(numel for numel, of_experts in flats if of_experts == (group == "replicas"))
        if elements:
            buckets = max(1, math.ceil(elements / zero.get("reduce_bucket_size", 5e8)))
            what = "gradients of experts" if group == "replicas" else "gradients"
            found.append(Collective(what, kind, group, size, times * buckets, times * elements * number))
    if work.by_itself:  # how many objects there are on all ranks, which the loss is divided by
        times = settings.accumulation
        found.append(Collective("objects", "all_reduce", "world", layout.world, times, FLOAT32 * times))
    if settings.bf16:  # whether a gradient is not finite
        found.append(Collective("overflow", "all_reduce", "world", layout.world, 1, 1))
    # the norm of each flat group, and the mean of an expert's norm over its replicas
    found.append(Collective("norms", "all_reduce", "world", layout.world, len(flats), FLOAT32 * len(flats)))
    of_experts = sum(expert for _, expert in flats)
    if of_experts:
        size = len(layout.group("replicas"))
        found.append(Collective("norms of experts", "all_reduce", "replicas", size, of_experts, FLOAT32 * of_experts))
    for group in ("world", "replicas"):
        size = len(layout.group(group))
        gathered = [numel for numel, of_experts in flats if of_experts == (group == "replicas")]
        if gathered and size > 1:
            padded = sum(padded_numel(numel, size) for numel in gathered)
            what = "weights of experts" if group == "replicas" else "weights"
            found.append(Collective(what, "all_gather", group, size, len(gathered), padded * number))
    return found


def exchanged_bytes(
    layer: MoE, images: int, tokens: int, number: int, busiest: float = 1.0, recomputed: bool = False
) -> int:
    """Bytes that a rank is given by all all-to-alls of an MoE layer in a micro-batch, where nothing is dropped.

    This is the form of models/moe/deepspeed_layer.py: exactly the rows that ranks have for each other, D numbers each.
    Out come those for this rank's experts, and on the way back its own; in backward the same, in the other order.
    """
    own = expert_rows(layer.config, images, tokens)
    for_experts_here = expert_rows(layer.config, images, tokens, busiest)
    times = (EXCHANGES + RECOMPUTED_EXCHANGES * recomputed) // 2
    return times * (own + for_experts_here) * layer.dim * number


def wire_bytes(collective: Collective, layout: Layout) -> tuple[float, float]:
    """(bytes inside the node, bytes between nodes) that one GPU sends in a step for a collective.

    An all-reduce of n bytes over p ranks sends 2 n (p-1)/p, a gather, a reduce or an all-to-all n (p-1)/p. A group on
    several nodes reduces inside the node first and between nodes then, each GPU its share, as NCCL does; an all-to-all
    sends to every rank alike.
    """
    nodes, local = layout.split(collective.group)
    if collective.size < 2:
        return 0.0, 0.0
    if collective.kind == "all_to_all":
        share = collective.bytes / collective.size
        return share * (local - 1), share * (collective.size - local)
    times = 2 if collective.kind == "all_reduce" else 1
    inside = times * collective.bytes * (local - 1) / local
    between = times * collective.bytes / local * (nodes - 1) / nodes
    return inside, between


def bytes_per_number(settings: Settings) -> int:
    """Of weights, gradients and activations."""
    return 2 if settings.bf16 else FLOAT32


def padded_numel(numel: int, ranks: int) -> int:
    """Elements of a flat group that ZeRO shares out among so many ranks."""
    aligned = ALIGNED * ranks
    return math.ceil(numel / aligned) * aligned


def _exchanges(work: Work, settings: Settings, layout: Layout, busiest: float) -> list[Collective]:
    """What the MoE layers ask for in the micro-batches of a step."""
    layers = work.moe_layers
    size = layout.ep_size
    if size == 1 or not layers:
        return []
    recomputed = settings.activation_checkpointing
    number = bytes_per_number(settings)
    moved = 0
    for layer in layers:
        moved += exchanged_bytes(layer, settings.micro_batch, work.tokens, number, busiest, recomputed)
    calls = (EXCHANGES + RECOMPUTED_EXCHANGES * recomputed) * len(layers)
    times = settings.accumulation
    if work.by_itself:  # images of any sizes pass alone
        calls *= settings.micro_batch
    found = [Collective("tokens to experts and back", "all_to_all", "experts", size, times * calls, times * moved)]
    # how many rows that will be, which no block asks again, and what dropout draws
    forwards = times * settings.micro_batch if work.by_itself else times
    experts = sum(layer.config.num_experts for layer in layers)
    found.append(Collective("rows", "all_to_all", "experts", size, forwards * len(layers), INT64 * forwards * experts))
    drawing = (1 + recomputed) * forwards * sum(layer.config.dropout > 0 for layer in layers)
    if drawing:
        found.append(Collective("draws", "all_gather", "experts", size, drawing, INT64 * size * drawing))
    return found
