"""What it costs to teach every module one batch: as independent jobs, one module after another behind the student
modules before it, and all together in one step (refine.order); and the same where the teacher does not run, because
what it told is read (stored_epochs), here from files that the system has just written. Forward, backward and AdamW on
plain torch, in turn in one run; beside each ratio that of the FLOPs (models/flops.py).

    python benchmarks/teaching_order.py
    python benchmarks/teaching_order.py modules=2 distill.logit_weight=1
    python benchmarks/teaching_order.py --rounds 7 teacher.width=384 teacher.depth=12 teacher.heads=6 \
        teacher.mlp_dim=1536 teacher.image_size=224 teacher.patch_size=16 student.width=192 student.depth=6 \
        student.heads=3 student.mlp_dim=768 'student.init=""' student.patch_size=16  # ViT-S/16 to a V-MoE of half of it
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch
import torch

from benchmarks import timing
from models.teacher.load import load_teacher, save_teacher
from trainer.config.load import load_recipe
from trainer.context import Run
from trainer.distributed.ranks import Dist
from trainer.loop.lessons import Lessons
from trainer.objectives.base import Taught
from trainer.phases import distill, refine
from trainer.teaching.meta import new_meta
from trainer.teaching.students import student_modules
from trainer.teaching.teachers import new_teacher_of, trained_preprocessing

READ = ", read"  # ends the names of orders in which the teacher does not run
ORDERS = ("parallel", "sequential", "together", f"parallel{READ}", f"together{READ}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/study_base.yaml", help="one without teacher.source")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="file to keep the results in")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    recipe = load_recipe(Path(options.recipe), ["data.source=digits", 'data.path=""', *options.overrides])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = timing.machine(device)
    print(timing.describe(facts))
    run = Run(recipe, {}, Path(), Dist(0, 1, 0, 1, device), "benchmark")
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(new_teacher_of(recipe.teacher, run.labels), folder, trained_preprocessing(recipe.teacher))
        run = run.with_teacher(load_teacher(folder))
        objectives = {order: _objectives(run, order) for order in ORDERS}
        kinds = {order: _kind(run, order, taught, Path(folder)) for order, taught in objectives.items()}
        seconds = timing.in_turn(kinds, options.rounds, device)
    flops = {order: _flops(taught) for order, taught in objectives.items()}
    print(f"{recipe.modules} modules, {_batch(run)} images, {device.type}, medians of {options.rounds} rounds")
    ratios = {}
    for order, times in seconds.items():
        ratio = timing.ratio(seconds, order, "together")
        of_flops = flops[order] / flops["together"]
        print(f"{order:14} {statistics.median(times) * 1e3:8.1f} ms  {ratio:5.2f} x together  (FLOPs {of_flops:.2f} x)")
        ratios[f"{order} / together: time"] = ratio
        ratios[f"{order} / together: FLOPs"] = of_flops
    timing.write(options.json, ratios, machine=facts, seconds=seconds, flops=flops)


def _batch(run: Run) -> int:
    return run.recipe.refine.global_batch or 16


def _kind(run: Run, order: str, objectives: Sequence[Taught], folder: Path) -> Callable[[], None]:
    """One batch taught to all modules."""
    seen, device = run.teacher.preprocessing, run.dist.device
    optimizers = [torch.optim.AdamW(objective.module.parameters()) for objective in objectives]
    images = torch.randn(_batch(run), seen.in_chans, seen.image_size, seen.image_size, device=device)
    target = torch.randint(len(run.labels), (len(images),), device=device)
    lessons = None
    if order.endswith(READ):
        lessons = Lessons(folder / order, len(objectives), 0, torch.float32, run.dist)
    return functools.partial(_teach, objectives, optimizers, images, target, lessons)


def _objectives(run: Run, order: str) -> list[Taught]:
    """What is trained of all modules, one optimiser each."""
    meta, modules = new_meta(run), student_modules(run)
    numbers = range(run.recipe.modules)
    if order.startswith("together"):
        objectives = [refine.objective_together(run, modules, meta)[0]]
    elif order == "sequential":
        objectives = [refine.objective(run, i, modules[: i + 1], meta)[0] for i in numbers]
    else:
        objectives = [distill.objective(run, i, modules[i], meta)[0] for i in numbers]
    for objective in objectives:
        for part in (*objective.frozen, objective.module):
            part.to(run.dist.device)
        for each in (objective, *getattr(objective, "pairs", ())):
            each.told_share = 0.0 if order.endswith(READ) else 1.0
    return objectives


def _teach(
    objectives: Sequence[Taught],
    optimizers: Sequence[torch.optim.Optimizer],
    images: torch.Tensor,
    target: torch.Tensor,
    lessons: Lessons | None,
) -> None:
    """One step of every optimiser."""
    for number, (objective, optimizer) in enumerate(zip(objectives, optimizers)):
        for part in objective.frozen:
            part.requires_grad_(False).eval()
        objective.module.requires_grad_(True).train()
        if lessons is None:
            loss, _ = objective(objective.module, images, target)
        else:
            told = lessons.told(objective, images, shown=number, place=0)
            loss, _ = objective.learn(objective.module, images, target, told, 0.0, {})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _flops(objectives: Sequence[Taught]) -> int:
    """Of one image taught to all modules."""
    return sum(objective.flops_per_image for objective in objectives)


if __name__ == "__main__":
    main()
