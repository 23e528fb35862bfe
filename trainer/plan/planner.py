"""Before anything is bought or booked: what each phase needs and takes on N nodes of some GPU, and which settings fit.

    python trainer/run.py --recipe recipes/vmoe_base_imagenet.yaml --phase plan --nodes 4 --gpus 8 --gpu h200 \\
        --images 1281167 --classes 1000

Starts nothing, opens no data and needs no GPU. The same as a part of `bash slurm/m2mkd_vmoe.sh plan`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.config.ds_config import Settings
from trainer.config.gpus import GPUS, Gpu
from trainer.config.recipe import Recipe
from trainer.context import Run
from trainer.distributed.ranks import Dist
from trainer.plan.estimate import Estimate, estimate
from trainer.plan.traffic import Layout
from trainer.plan.work import Work
from trainer.request.graph import experts_in
from trainer.request.plan import DEFAULTS

BUSIEST: float = DEFAULTS["busiest"]  # rows of the busiest rank over the mean, where ranks share experts
BUCKET = 100_000_000  # elements, of a proposal: DeepSpeed's default of 500 million takes 2 GB and reduces no faster
MOST_NODES = 512  # that a refusal looks at
WORTH_IT = 0.99  # of the GPU-hours of something simpler
LARGEST_MICRO_BATCH = 512  # images; beyond it a GPU gains nothing


@dataclass(frozen=True)
class Plan:
    """The trainings of a recipe on some ranks under one DeepSpeed JSON."""

    ds_values: dict[str, Any]
    estimates: list[Estimate]

    @property
    def hours(self) -> float:
        """GPU-hours of all trainings."""
        return sum(each.gpu_hours for each in self.estimates)

    @property
    def peak(self) -> float:
        """Bytes on one GPU in the largest of them."""
        return max(each.memory.peak for each in self.estimates)


def plan(
    recipe: Recipe,
    works: Sequence[Work],
    ds_values: dict[str, Any],
    layouts: Mapping[str, Layout],
    gpu: Gpu,
    busiest: float = BUSIEST,
) -> Plan:
    """Every training under a DeepSpeed JSON.

    Args:
        layouts: nodes and ranks of each phase.

    Raises:
        ValueError: batches or an ep size that do not fit the ranks.
    """
    estimates = []
    for work in works:
        layout = layouts[work.phase]
        settings = settings_of(recipe, work, ds_values, layout)
        spread = replace(layout, ep_size=settings.ep_size)
        estimates.append(estimate(work, settings, spread, gpu, busiest))
    return Plan(ds_values, estimates)


def propose(
    recipe: Recipe, works: Sequence[Work], layouts: Mapping[str, Layout], gpu: Gpu, busiest: float = BUSIEST
) -> Plan:
    """The DeepSpeed JSON under which everything fits and takes the fewest GPU-hours.

    Raises:
        ValueError: nothing fits; with what would.
    """
    least = None
    # recomputing and the host's memory only cost time: what needs them is looked at where nothing else fits
    for _, alike in itertools.groupby(candidates(recipe, works, layouts), key=_costs_time):
        best = None
        for ds_values in alike:
            found = plan(recipe, works, ds_values, layouts, gpu, busiest)
            if least is None or found.peak < least.peak:
                least = found
            # a later candidate is more complicated: it has to be worth it
            if found.peak <= gpu.usable_bytes and (best is None or found.hours < WORTH_IT * best.hours):
                best = found
        if best is not None:
            return best
    raise ValueError(_refusal(recipe, works, layouts, gpu, busiest, least))


def _costs_time(ds_values: Mapping[str, Any]) -> tuple[bool, bool]:
    return "offload_optimizer" in ds_values["zero_optimization"], ds_values["trainer"]["activation_checkpointing"]


def candidates(recipe: Recipe, works: Sequence[Work], layouts: Mapping[str, Layout]) -> Iterator[dict[str, Any]]:
    """DeepSpeed JSONs to choose among, the simple ones first.

    Raises:
        ValueError: a global batch that does not divide among the ranks.
    """
    micro_batches = _micro_batches(recipe, works, layouts)
    ep_sizes = _ep_sizes(recipe, works, layouts)
    ways = itertools.product((False, True), (False, True), (1, 2), ep_sizes, micro_batches)
    for offload, recompute, stage, ep_size, micro_batch in ways:
        zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": BUCKET}
        if stage == 2:
            zero["contiguous_gradients"] = True
        if offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        yield {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": True},
            "zero_optimization": zero,
            "trainer": {"ep_size": ep_size, "activation_checkpointing": recompute},
        }


def settings_of(recipe: Recipe, work: Work, ds_values: dict[str, Any], layout: Layout) -> Settings:
    """A DeepSpeed JSON resolved for one training.

    Raises:
        ValueError: as Run.settings.
    """
    dist = Dist(0, layout.world, 0, layout.per_node, torch.device("cpu"))
    return Run(recipe, ds_values, Path(), dist, "plan").settings(work.section)


def problems(found: Plan, gpu: Gpu) -> list[str]:
    """What of a plan cannot be, a line each."""
    lines = []
    for each in found.estimates:
        if each.memory.peak > gpu.usable_bytes:
            lines.append(
                f"{each.work.name} needs {each.memory.peak / 1e9:.3g} GB per GPU, and {gpu.usable_bytes / 1e9:.3g} of "
                f"{gpu.memory_gb:g} GB can be filled"
            )
        if not each.steps:
            lines.append(
                f"{each.work.name} has no step: {each.work.images:,} images are fewer than its global batch of "
                f"{each.settings.global_batch}: set {each.work.section}.global_batch lower"
            )
    return lines


def _micro_batches(recipe: Recipe, works: Sequence[Work], layouts: Mapping[str, Layout]) -> list[int]:
    """Those that divide what every rank has of every global batch, the largest first."""
    shares = []
    for work in works:
        total, world = work.schedule.global_batch, layouts[work.phase].world
        if total is None:
            continue
        if total % world:
            limit = max(ranks for ranks in range(1, min(total, world) + 1) if total % ranks == 0)
            raise ValueError(
                f"{work.section}.global_batch={total} does not divide among {world} GPUs: take {limit} GPUs, or set "
                f"{work.section}.global_batch to a multiple of {world}"
            )
        shares.append(total // world)
    share = math.gcd(*shares) if shares else LARGEST_MICRO_BATCH
    unit = _together(recipe, works)
    fitting = [size for size in range(1, min(share, LARGEST_MICRO_BATCH) + 1) if share % size == 0 and size % unit == 0]
    if not fitting:
        raise ValueError(
            f"each GPU has {share} images of a step, and {unit} have to stay together (student.moe.images_per_group, "
            f"mixup): use fewer GPUs, or larger global batches"
        )
    return fitting[::-1]


def _together(recipe: Recipe, works: Sequence[Work]) -> int:
    """Images that a micro-batch must be a multiple of."""
    works = [work for work in works if not work.by_itself]  # whose images are routed alone and never mixed
    mixes = works and (recipe.augment.mixup or recipe.augment.cutmix)
    group = max(1, recipe.student.moe.images_per_group) if any(work.moe_layers for work in works) else 1
    return math.lcm(group, 2 if mixes else 1)


def _ep_sizes(recipe: Recipe, works: Sequence[Work], layouts: Mapping[str, Layout]) -> list[int]:
    """Ranks that may share the experts: inside a node first, none first."""
    routed = [work for work in works if work.moe_layers]
    if not routed:
        return [1]
    experts = [experts_in(recipe, work.section) for work in routed]
    if not all(experts):  # of a model that was given: each rank keeps all of them
        return [1]
    most = math.gcd(*experts, *(layouts[work.phase].world for work in routed))
    return [size for size in range(1, most + 1) if most % size == 0]


def _refusal(
    recipe: Recipe,
    works: Sequence[Work],
    layouts: Mapping[str, Layout],
    gpu: Gpu,
    busiest: float,
    least: Plan,
) -> str:
    """What does not fit, and what would."""
    largest = max(least.estimates, key=lambda each: each.memory.peak)
    parts = {name: size for name, size in largest.memory.parts().items() if size}
    shown = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in sorted(parts.items(), key=lambda kv: -kv[1])[:4])
    text = (
        f"nothing fits: {largest.work.name} needs {largest.memory.peak / 1e9:.3g} GB per GPU at least ({shown}), and "
        f"{gpu.usable_bytes / 1e9:.3g} of {gpu.memory_gb:g} GB can be filled"
    )
    would = []
    larger = [other for other in GPUS.values() if other.usable_bytes >= least.peak]
    if larger:
        smallest = min(larger, key=lambda other: other.memory_gb)
        would.append(f"--gpu {smallest.name} ({smallest.memory_gb:g} GB)")
    nodes = _nodes_that_fit(recipe, works, layouts, gpu, busiest)
    if nodes:
        would.append(f"--nodes {nodes}")
    would.append("a smaller student (student.width, student.moe.num_experts) or teacher.image_size")
    return f"{text}. What would: {'; '.join(would)}"


def _nodes_that_fit(
    recipe: Recipe, works: Sequence[Work], layouts: Mapping[str, Layout], gpu: Gpu, busiest: float
) -> int:
    """The fewest times two of today's nodes on which everything fits; 0 where that is not by nodes."""
    factor = 2
    most = max(layout.nodes for layout in layouts.values())
    while factor * most <= MOST_NODES:
        wider = {name: replace(layout, nodes=factor * layout.nodes) for name, layout in layouts.items()}
        try:
            for ds_values in candidates(recipe, works, wider):
                if not all(_costs_time(ds_values)):
                    continue  # what takes the least memory decides
                if plan(recipe, works, ds_values, wider, gpu, busiest).peak <= gpu.usable_bytes:
                    return factor * most
        except ValueError:  # the batch does not divide any more
            return 0
        factor *= 2
    return 0
