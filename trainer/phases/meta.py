"""Phase meta: train the meta model, then measure every teacher module inside it (hybrid accuracy)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from models.modules.meta import MetaModel
from trainer.context import Run
from trainer.distributed.engine import working_type
from trainer.evaluation.accuracy import Predictor
from trainer.objectives import meta_objective
from trainer.teaching import bases, comparison, hybrids, reuse
from trainer.teaching.estimate import Cost, Known, Rehearsed, blank_images, of_training
from trainer.teaching.meta import new_meta
from trainer.teaching.students import new_student
from trainer.teaching.teachers import with_seedling


def run(run: Run) -> None:
    """Make OUT/meta, and what the student starts from where that takes images: jobs of an array find both."""
    _make(run)
    if run.recipe.student.init and not run.recipe.teacher.grown:
        new_student(run)


def _make(run: Run) -> None:
    """Train OUT/meta, take it from meta.source, or let the teacher be it (meta.blocks_per_module=0)."""
    recipe, schedule = run.recipe, run.recipe.meta
    folder, complete = run.open("meta")
    if complete:
        return
    if schedule.source:
        reuse.take_meta(run, folder)
        return
    grown = recipe.teacher.grown
    if grown:
        run = with_seedling(run)
    made_with = {} if grown else {"teacher": run.teacher_record}
    settings = run.settings("meta")
    meta, stages = new_meta(run), run.teacher_stages()
    if schedule.blocks_per_module:
        checked = None if grown else hybrids.check_teacher(run, settings)
        trained = run.train(objective(run, meta, stages), run.data, schedule, settings, folder, "meta")
    else:  # the meta model is the teacher: its weights are kept before the check may round them
        alone = Predictor(meta, meta) if run.classifies else comparison.predictor(meta, MetaModel(stages))
        trained = run.left_as_it_is(alone, settings)
        checked = hybrids.check_teacher(run, settings)
    metrics = dict(trained.outcome.evaluation)
    if checked is not None:  # else the teacher is not there yet: phase assemble measures its hybrids
        metrics |= hybrids.measure(run, meta, stages, settings, checked.accuracy)
        if checked.doubt:
            health = trained.outcome.health | {"teacher_at_chance": checked.doubt}
            trained = replace(trained, outcome=replace(trained.outcome, health=health))
    border_bases = bases.measure(meta, run.data, working_type(settings), run.eval_batch(settings), run.dist)
    if run.dist.main:
        bases.save(folder, border_bases)
        if not grown:
            hybrids.report(metrics, recipe.modules)
    weights = {name.removeprefix("meta."): tensor for name, tensor in trained.weights.items()}
    run.finish(folder, "meta", None, trained, settings, metrics=metrics, weights=weights, made_with=made_with)


def objective(run: Run, meta: MetaModel, stages: list[Any]) -> Any:
    """What meta.objective names, for a meta model beside the teacher's modules."""
    recipe = run.recipe
    return meta_objective(meta, stages, recipe.meta, run.tokens, recipe.augment.label_smoothing, recipe.seed)


def check(run: Run) -> None:
    """Whether the meta model of meta.source fits."""
    reuse.check_meta(run)


def taught(run: Run, module: int | None) -> Any:
    """What the phase trains, before any training; None where the teacher is its own meta model or one is given."""
    if run.recipe.meta.source or not run.recipe.meta.blocks_per_module:
        return None
    return objective(run, new_meta(run), run.teacher_stages())


def rehearse(run: Run, module: int | None, known: Known) -> Rehearsed:
    """One image through a new meta model, and what training it will cost."""
    meta = new_meta(run)
    with torch.no_grad():
        meta(blank_images(run))
    if not run.recipe.meta.blocks_per_module:
        return Rehearsed("the teacher itself, which is not trained again", {"meta": Cost(0.0, 0.0)})
    return of_training(run, "meta", "meta", objective(run, meta, run.teacher_stages()).flops_per_image)
