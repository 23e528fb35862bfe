"""What it costs to teach every module one batch: as independent jobs, one module after another behind the student
modules before it, and all together in one step (refine.order). Forward, backward and AdamW on plain torch, in turn in
one run; beside each ratio that of the FLOPs (models/flops.py).

    python benchmarks/teaching_order.py
    python benchmarks/teaching_order.py modules=2 distill.logit_weight=1
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch
import torch

from models.teacher.load import load_teacher, save_teacher
from trainer.config.load import load_recipe
from trainer.context import Run
from trainer.distributed.ranks import Dist
from trainer.objectives import Objective
from trainer.phases import distill, refine
from trainer.teaching.meta import new_meta
from trainer.teaching.students import student_modules
from trainer.teaching.teachers import new_teacher_of, trained_preprocessing

ORDERS = ("parallel", "sequential", "together")
WARM_UP = 2  # rounds that are not counted


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/study_base.yaml", help="one without teacher.source")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    recipe = load_recipe(Path(options.recipe), ["data.source=digits", 'data.path=""', *options.overrides])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(recipe, {}, Path(), Dist(0, 1, 0, 1, device), "benchmark")
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(new_teacher_of(recipe.teacher, run.labels), folder, trained_preprocessing(recipe.teacher))
        run = run.with_teacher(load_teacher(folder))
    preprocessing = run.teacher.preprocessing
    batch = recipe.refine.global_batch or 16
    size = preprocessing.image_size
    objectives: dict[str, list[Objective]] = {}
    optimizers: dict[str, list[torch.optim.Optimizer]] = {}
    for order in ORDERS:
        objectives[order] = _objectives(run, order)
        optimizers[order] = [torch.optim.AdamW(objective.module.parameters()) for objective in objectives[order]]
    images = torch.randn(batch, preprocessing.in_chans, size, size, device=device)
    target = torch.randint(len(run.labels), (batch,), device=device)
    seconds: dict[str, list[float]] = {order: [] for order in ORDERS}
    for number in range(options.rounds + WARM_UP):
        for order in ORDERS:
            taken = _teach(objectives[order], optimizers[order], images, target)
            if number >= WARM_UP:
                seconds[order].append(taken)
    flops = {order: _flops(objectives[order]) for order in ORDERS}
    print(f"{recipe.modules} modules, {batch} images, {device.type}, medians of {options.rounds} rounds")
    for order, times in seconds.items():
        # round by round, so that a busy minute meets both sides of a ratio
        ratio = statistics.median(time / together for time, together in zip(times, seconds["together"]))
        print(
            f"{order:10} {statistics.median(times) * 1e3:8.1f} ms  {ratio:5.2f} x together"
            f"  (FLOPs {flops[order] / flops['together']:.2f} x)"
        )


def _objectives(run: Run, order: str) -> list[Objective]:
    """What is trained of all modules, one optimiser each."""
    meta, modules = new_meta(run), student_modules(run)
    numbers = range(run.recipe.modules)
    if order == "together":
        objectives = [refine.objective_together(run, modules, meta)[0]]
    elif order == "sequential":
        objectives = [refine.objective(run, i, modules[: i + 1], meta)[0] for i in numbers]
    else:
        objectives = [distill.objective(run, i, modules[i], meta)[0] for i in numbers]
    for objective in objectives:
        for part in (*objective.frozen, objective.module):
            part.to(run.dist.device)
    return objectives


def _teach(
    objectives: Sequence[Objective],
    optimizers: Sequence[torch.optim.Optimizer],
    images: torch.Tensor,
    target: torch.Tensor,
) -> float:
    """One step of every optimiser; seconds."""
    started = time.perf_counter()
    for objective, optimizer in zip(objectives, optimizers):
        for part in objective.frozen:
            part.requires_grad_(False).eval()
        objective.module.requires_grad_(True).train()
        loss, _ = objective(objective.module, images, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _flops(objectives: Sequence[Objective]) -> int:
    """Of one image taught to all modules."""
    return sum(objective.flops_per_image for objective in objectives)


if __name__ == "__main__":
    main()
