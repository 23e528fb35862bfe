"""Phase distill: one student module learns to behave like the teacher module inside the frozen meta model.

`--module i` is one job of its own (Slurm runs them as an array); `--module all` runs them one after another. With
distill.level=expert the module starts from its experts, which phase expert has taught one by one.
"""

from __future__ import annotations

import torch

from models.modules.meta import MetaModel
from models.modules.stitch import StudentModule
from trainer.context import Run
from trainer.objectives import Distill
from trainer.request.graph import taught_by_expert
from trainer.teaching import experts, reuse, upcycling
from trainer.teaching.estimate import Known, Rehearsed, blank_images, of_training, with_told
from trainer.teaching.experts import Assembly, assembly_flops
from trainer.teaching.guidance import module_guide
from trainer.teaching.meta import new_meta, trained_meta
from trainer.teaching.students import start_flops, student_modules
from trainer.tracking.measures import measure_of


def run(run: Run, module: int) -> None:
    """Train OUT/distill_<module>, or take it from distill.source."""
    recipe, schedule = run.recipe, run.recipe.distill
    folder, complete = run.open("distill", module)
    if complete:
        return
    if schedule.source:
        reuse.take_module(run, module, folder)
        return
    meta, meta_result = trained_meta(run, f"--phase distill --module {module}")
    assembly = Assembly(run, module) if taught_by_expert(recipe) else None
    student = assembly.student if assembly else student_modules(run, schedule.drop_path)[module]
    settings = run.settings("distill")
    made_with = {"teacher": run.teacher_record, "meta": meta_result["files"]["model.safetensors"]}
    made_with |= upcycling.record(run)
    pair, spent = objective(run, module, student, meta, guided=schedule.epochs > 0)
    spent += upcycling.spent(run) // recipe.modules
    if schedule.epochs:
        what = f"distill {module + 1}/{recipe.modules}"
        from_experts = assembly is not None
        trained = run.train(pair, run.data, schedule, settings, folder, what, evaluate_start=from_experts)
    else:
        trained = run.left_as_it_is(pair, settings)
    outcome = trained.outcome
    measure = measure_of(outcome.evaluation).key
    metrics = outcome.evaluation | {
        f"hybrid_{measure}": outcome.evaluation[measure],
        f"teacher_hybrid_{measure}": meta_result["metrics"][f"hybrid_{measure}/{module}"],
    }
    if assembly:
        spent += assembly.flops
        metrics |= assembly.metrics(trained.weights)
        metrics[f"start_{measure}"] = (outcome.start or outcome.evaluation)[measure]
    run.finish(
        folder,
        "distill",
        module,
        trained,
        settings,
        metrics=metrics,
        weights=trained.weights,
        extra_flops=spent,
        made_with=made_with,
    )


def objective(
    run: Run, module: int, student: StudentModule, meta: MetaModel, *, guided: bool = False
) -> tuple[Distill, int]:
    """A student module beside the teacher's inside the meta model.

    Args:
        guided: make the teacher's routers that distill.routing_weight asks for; a rehearsal does without.

    Returns:
        The objective, and the FLOPs it took to make those routers.
    """
    recipe = run.recipe
    stages = run.teacher_stages()
    stage = stages[module]
    guide, spent = module_guide(run, student, stage) if guided else (None, 0)
    smoothing = recipe.augment.label_smoothing
    whole = None if run.classifies else MetaModel(stages)
    pair = (student, stage, meta, module, recipe.distill, run.tokens, smoothing)
    return Distill(*pair, guide=guide, teacher=whole, told_share=recipe.distill.told_share), spent


def check(run: Run) -> None:
    """Whether the modules of distill.source fit, and whether experts can be taught one by one."""
    reuse.check_modules(run)
    if taught_by_expert(run.recipe):
        experts.check(run)


def taught(run: Run, module: int) -> Distill:
    """What the phase trains, before any training and without a guide."""
    student = student_modules(run, run.recipe.distill.drop_path)[module]
    return objective(run, module, student, new_meta(run))[0]


def rehearse(run: Run, module: int, known: Known) -> Rehearsed:
    """One image through the hybrid, and what teaching the module will cost."""
    recipe = run.recipe
    pair = taught(run, module)
    with torch.no_grad():
        pair.predict(blank_images(run))
    extra = assembly_flops(run, pair.meta, pair.module, module) if taught_by_expert(recipe) else 0
    extra += start_flops(run) // recipe.modules
    found = of_training(run, "distill", f"distill_{module}", pair.flops_per_image, extra_flops=extra)
    if not recipe.distill.epochs:
        return Rehearsed("left as it starts: distill.epochs is 0", found.costs)
    return with_told(run, "distill", pair, found)
