"""Phase refine: a second round, in which every module learns on what the modules before it really send.

Modules taught apart meet inputs they have not seen when they are put together, and their errors add up. Module 0 is fed
images either way, so its second round is its first. With distill.epochs=0 there is no first round: modules are taught
here alone, with order=sequential one after another on what those before have learned, with order=together all in one
training, in which teacher and student run once for all of them. With order=fit nothing is trained: what the modules of
the first round write is fitted by least squares to what they get from those before them (models/experts/refit.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.experts.refit import refit, refit_flops
from models.modules.meta import MetaModel
from models.modules.stitch import StudentModule
from models.moe.parallel import load_full_state_dict
from trainer import artifacts
from trainer.context import Run, Trained, save_weights
from trainer.data.base import ImageSource
from trainer.distributed.interrupt import HEARTBEAT
from trainer.distributed.main_rank import on_main
from trainer.loop.fit import Outcome
from trainer.objectives import Distill, Objective, Together
from trainer.request.graph import in_one_job, trained_again
from trainer.teaching.calibration import batches, image_count
from trainer.teaching.estimate import Cost, Known, Rehearsed, blank_images, of_training, with_told
from trainer.teaching.guidance import module_guide
from trainer.teaching.meta import new_meta, trained_meta
from trainer.teaching.students import student_modules
from trainer.tracking.measures import measure_of

log = logging.getLogger(__name__)


def run(run: Run, module: int | None) -> None:
    """Train OUT/refine_<module> from OUT/distill_<module>; None = all of them at once (order=together or fit)."""
    if module is None and run.recipe.refine.order == "fit":
        _run_fit(run)
        return
    if module is None:
        _run_together(run)
        return
    recipe, schedule = run.recipe, run.recipe.refine
    folder, complete = run.open("refine", module)
    if complete:
        return
    before = "refine" if schedule.order == "sequential" else "distill"
    names = [*(f"{before}_{i}" for i in range(module)), f"distill_{module}"]
    meta, modules, made_with, first_round = _learned(run, names, f"--phase refine --module {module}")
    settings = run.settings("refine")
    again = trained_again(recipe, module)
    pair, spent = objective(run, module, modules, meta, guided=again)
    if again:
        what = f"refine {module + 1}/{recipe.modules}"
        trained = run.train(pair, run.data, schedule, settings, folder, what)
        evaluation = trained.outcome.evaluation
        metrics = _with_hybrid(evaluation)
    else:
        metrics = first_round["metrics"]
        outcome = Outcome(metrics, seconds=0.0, steps=0, images_seen=0)
        trained = Trained(outcome, modules[-1].state_dict(), epochs=0, flops_per_image=0)
    run.finish(
        folder,
        "refine",
        module,
        trained,
        settings,
        metrics=metrics,
        weights=trained.weights,
        extra_flops=spent,
        made_with=made_with,
    )


def objective(
    run: Run, module: int, modules: Sequence[StudentModule], meta: MetaModel, *, guided: bool = False
) -> tuple[Distill, int]:
    """The last of these student modules behind the others, beside the teacher's module.

    Args:
        modules: those before `module`, and itself.
        guided: make the teacher's routers that distill.routing_weight asks for; a rehearsal does without.

    Returns:
        The objective, and the FLOPs it took to make those routers.
    """
    recipe = run.recipe
    *predecessors, student = modules
    stages = run.teacher_stages()
    stage = stages[module]
    guide, spent = module_guide(run, student, stage) if guided else (None, 0)
    smoothing = recipe.augment.label_smoothing
    whole = None if run.classifies else MetaModel(stages)
    pair = (student, stage, meta, module, recipe.distill, run.tokens, smoothing)
    return Distill(*pair, predecessors, guide, whole, recipe.refine.told_share), spent


def objective_together(
    run: Run, modules: Sequence[StudentModule], meta: MetaModel, *, guided: bool = False
) -> tuple[Together, list[int]]:
    """All student modules at once; returned with the FLOPs it took to make each one's guiding routers."""
    recipe = run.recipe
    stages = run.teacher_stages()
    guides, spent = [None] * len(stages), [0] * len(stages)
    if guided:
        pairs = [module_guide(run, student, stage) for student, stage in zip(modules, stages)]
        guides = [guide for guide, _ in pairs]
        spent = [flops for _, flops in pairs]
    meta_is_teacher = recipe.meta.blocks_per_module == 0
    smoothing = recipe.augment.label_smoothing
    students = (modules, stages, meta, recipe.distill, run.tokens, meta_is_teacher, smoothing, guides)
    return Together(*students, recipe.refine.told_share), spent


def _run_together(run: Run) -> None:
    """Train OUT/refine_<i> of all modules at once.

    Checkpoints and metrics lie with the last module, whose hybrid is the whole student; its result is written last. Of
    the time every module gets its share of the FLOPs.
    """
    recipe, schedule = run.recipe, run.recipe.refine
    numbers = range(recipe.modules)
    opened = [run.open("refine", module) for module in numbers]
    if all(complete for _, complete in opened):
        return
    folders = [folder for folder, _ in opened]
    meta, modules, made_with, _ = _learned(run, [f"distill_{module}" for module in numbers], "--phase refine")
    settings = run.settings("refine")
    together, spent = objective_together(run, modules, meta, guided=True)
    flops_by_module = together.flops_by_module  # counted before the engine takes experts out of the modules
    trained = run.train(together, run.data, schedule, settings, folders[-1], f"refine all {recipe.modules}")
    seconds_per_flop = trained.outcome.seconds / sum(flops_by_module)
    for module in numbers:
        last = module == recipe.modules - 1
        outcome = trained.outcome if last else run.measure(together.pairs[module], settings)
        prefix = f"chain.{module}."
        weights = {
            name.removeprefix(prefix): tensor for name, tensor in trained.weights.items() if name.startswith(prefix)
        }
        flops = flops_by_module[module]
        share = replace(
            trained.outcome, seconds=seconds_per_flop * flops, health=trained.outcome.health if last else {}
        )
        run.finish(
            folders[module],
            "refine",
            module,
            replace(trained, outcome=share, flops_per_image=flops),
            settings,
            metrics=_with_hybrid(outcome.evaluation),
            weights=weights,
            extra_flops=spent[module],
            made_with=made_with,
        )


def _run_fit(run: Run) -> None:
    """Make OUT/refine_<i> of all modules by fitting them to each other; rank 0 does, and the others take what it wrote.

    Of the time and the FLOPs every module gets its share. What an earlier run has finished stays as it is: another
    machine rounds otherwise, and its result.json has the digests of its weights.
    """
    recipe = run.recipe
    numbers = range(recipe.modules)
    opened = [run.open("refine", module) for module in numbers]
    if all(complete for _, complete in opened):
        return
    folders = [folder for folder, _ in opened]
    missing = {module: folder for module, (folder, complete) in enumerate(opened) if not complete}
    meta, modules, made_with, _ = _learned(run, [f"distill_{module}" for module in numbers], "--phase refine")
    settings = run.settings("train")  # nothing is trained here, and section refine may leave its batch open
    begun = time.perf_counter()
    flops_by_module = refit_flops(modules, run.teacher_stages(), run.tokens)
    images = run.sources[0].spread(image_count(run, run.teacher.model, recipe.refine.fit_images))
    errors = on_main(run.dist, lambda: _fit(run, modules, images, missing))
    with run.dist.together():  # every rank sees the files, also on a file system that is slow to show them
        for module, folder in zip(modules, folders):
            load_full_state_dict(module, artifacts.load_weights(folder, module.state_dict()))
    seconds_per_flop = (time.perf_counter() - begun) / sum(flops_by_module)
    together, _ = objective_together(run, modules, meta)
    for module, folder in missing.items():
        outcome = run.measure(together.pairs[module], settings)
        seconds = outcome.seconds + seconds_per_flop * flops_by_module[module]
        fitted = replace(outcome, seconds=seconds, images_seen=len(images))
        metrics = _with_hybrid(outcome.evaluation)
        if errors:
            metrics |= {f"fit_error/{block}": error for block, error in errors[module].items()}
        run.finish(
            folder,
            "refine",
            module,
            Trained(fitted, {}, epochs=0, flops_per_image=flops_by_module[module]),
            settings,
            metrics=metrics,
            made_with=made_with,
        )


def _fit(
    run: Run, modules: Sequence[StudentModule], images: ImageSource, folders: Mapping[int, Path]
) -> list[dict[str, float]]:
    """Fit the modules, and write the weights of some to their folders; the error behind each block of each module."""
    stages = run.teacher_stages()
    log.info("fitting %d modules to each other on %d images", len(modules), len(images))
    for part in (*modules, *stages):
        part.to(run.dist.device, torch.float32)
    errors = refit(modules, stages, batches(run, images, run.teacher.preprocessing), beat=HEARTBEAT.beat)
    for module in modules:
        module.cpu()
    for number, folder in folders.items():
        save_weights(folder / "model.safetensors", modules[number].state_dict())
    shown = ", ".join(f"{error:.3f}" for of_module in errors for error in of_module.values())
    log.info("relative error of the student's states behind each block: %s", shown)
    return errors


def _with_hybrid(evaluation: dict[str, float]) -> dict[str, float]:
    """An evaluation of a hybrid, with its measure also by that name."""
    measure = measure_of(evaluation).key
    return {f"hybrid_{measure}": evaluation[measure], **evaluation}


def taught(run: Run, module: int | None) -> Objective | None:
    """What the phase trains, before any training and without guides: a module, or with None all at once.

    None for a module whose second round is its first.
    """
    if module is None:
        return objective_together(run, student_modules(run), new_meta(run))[0]
    if not trained_again(run.recipe, module):
        return None
    return objective(run, module, student_modules(run)[: module + 1], new_meta(run))[0]


def rehearse(run: Run, module: int | None, known: Known) -> Rehearsed:
    """What teaching the module behind those before it will cost; None = all at once."""
    recipe = run.recipe
    if recipe.refine.order == "fit":
        return _rehearse_fit(run)
    rehearsed = taught(run, module)
    if in_one_job(recipe, "refine"):
        with torch.no_grad():
            rehearsed.predict(blank_images(run))
        parts = [of_training(run, "refine", f"refine_{i}", flops) for i, flops in enumerate(rehearsed.flops_by_module)]
        costs = {name: cost for part in parts for name, cost in part.costs.items()}
        found = replace(parts[-1], text=f"{parts[-1].text} for all modules at once", costs=costs)
        return with_told(run, "refine", rehearsed, found)
    name = f"refine_{module}"
    if rehearsed is None:
        return Rehearsed("fed images either way, so it is taken as it is", {name: Cost(0.0, 0.0)})
    return with_told(run, "refine", rehearsed, of_training(run, "refine", name, rehearsed.flops_per_image))


def _rehearse_fit(run: Run) -> Rehearsed:
    """What fitting the modules to each other will cost."""
    images = image_count(run, run.teacher.model, run.recipe.refine.fit_images)
    flops_by_module = refit_flops(student_modules(run), run.teacher_stages(), run.tokens)
    costs = {f"refine_{i}": Cost(images, images * flops) for i, flops in enumerate(flops_by_module)}
    total = sum(cost.flops for cost in costs.values())
    return Rehearsed(f"{images:,} images, {total:.3g} FLOPs by least squares for all modules at once", costs)


def _learned(
    run: Run, names: list[str], needed_by: str
) -> tuple[MetaModel, list[StudentModule], dict[str, Any], dict[str, Any]]:
    """Meta model, the student's first modules with the weights of these artifacts, what they are made with, and the
    result of the last one."""
    meta, meta_result = trained_meta(run, needed_by)
    modules = student_modules(run, run.recipe.refine.drop_path)[: len(names)]
    for module, name in zip(modules, names):
        folder, result = artifacts.require(run.out, name, run.recipe, needed_by)
        load_full_state_dict(module, artifacts.load_weights(folder, module.state_dict()))
    made_with = {"teacher": run.teacher_record, "meta": meta_result["files"]["model.safetensors"]}
    return meta, modules, made_with, result
