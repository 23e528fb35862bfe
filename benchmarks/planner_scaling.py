"""The tables of docs/scaling.md, "How far it scales": V-MoE-B end to end on 8 to 4,096 GPUs, with 8 to 512 experts.

    python benchmarks/planner_scaling.py [--gpu h200,share=0.4] [--images-per-gpu 64]

Nothing is measured: every figure is the planner's, by the DeepSpeed JSON it proposes for that cell.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch

from trainer.config.gpus import Gpu, parse
from trainer.config.load import load_recipe
from trainer.config.recipe import Recipe
from trainer.plan.estimate import Estimate
from trainer.plan.planner import BUSIEST, propose
from trainer.plan.stand_ins import planned_run
from trainer.plan.traffic import Layout
from trainer.plan.work import Work, works

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes/vmoe_base_imagenet.yaml"
EXPERTS = (8, 32, 128, 512)
GPUS = (8, 64, 512, 4096)
FEWER_GPUS = (8, 32, 64, 128, 256, 512)  # 1,024 have one image each, which mixup cannot pair
PER_NODE = 8
IMAGES, CLASSES = 1_281_167, 1000


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--images-per-gpu", type=int, default=64)
    options = parser.parse_args()
    gpu = parse(options.gpu)
    print(f"{gpu}\n")
    trainings = {experts: end_to_end(experts) for experts in EXPERTS}
    own_batch = trainings[EXPERTS[0]][1].schedule.global_batch
    print(f"{options.images_per_gpu} images per GPU, so that the global batch grows with the GPUs:\n")
    table(trainings, gpu, {world: options.images_per_gpu * world for world in GPUS})
    print(f"\nthe recipe's global batch of {own_batch}, shared out:\n")
    table(trainings, gpu, dict.fromkeys(FEWER_GPUS, own_batch))


def end_to_end(experts: int) -> tuple[Recipe, Work]:
    """Phase train of the recipe with so many experts, on the meta device."""
    recipe = load_recipe(RECIPE, [f"student.moe.num_experts={experts}"])
    run = planned_run(recipe, {}, ROOT / "unused", 1, PER_NODE, IMAGES, CLASSES)
    return recipe, works(run, ["train"])[0]


def table(trainings: Mapping[int, tuple[Recipe, Work]], gpu: Gpu, batches: Mapping[int, int]) -> None:
    """GPUs down, experts across: ms of a step, share of it that ranks wait for each other, GB, and how it is spread.

    Args:
        batches: number of GPUs -> global batch.
    """
    _row(["GPUs", *(f"{experts} experts" for experts in trainings)])
    _row(["---:"] * (1 + len(trainings)))
    for world, global_batch in batches.items():
        cells = []
        for recipe, work in trainings.values():
            schedule = replace(work.schedule, global_batch=global_batch)
            batched = replace(recipe, train=schedule)
            try:
                found = propose(
                    batched,
                    [replace(work, schedule=schedule)],
                    {"train": Layout(world // PER_NODE, PER_NODE)},
                    gpu,
                    BUSIEST,
                )
                cells.append(_cell(found.estimates[0]))
            except ValueError as error:
                cells.append(str(error).partition(":")[0])
        _row([f"{world:,}", *cells])


def _cell(found: Estimate) -> str:
    seconds, settings = found.seconds, found.settings
    recomputing = " r" if settings.activation_checkpointing else ""
    spread = f"ep {settings.ep_size} z{settings.config['zero_optimization']['stage']}{recomputing}"
    waiting = seconds.communication / seconds.total
    return f"{1e3 * seconds.total:.0f} ms, {waiting:.0%}, {found.memory.peak / 1e9:.0f} GB, {spread}"


def _row(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
