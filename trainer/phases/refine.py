"""Phase refine: a second round, in which every module learns on what the modules before it really send.

Modules taught apart meet inputs they have not seen when they are put together, and their errors add up. Module 0 is fed
images either way, so its second round is its first. With distill.epochs=0 there is no first round: modules are taught
here alone, with order=sequential one after another on what those before have learned, with order=together all in one
training, in which teacher and student run once for all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from models.modules.meta import MetaModel
from models.modules.stitch import StudentModule
from models.moe.parallel import load_full_state_dict
from trainer import artifacts
from trainer.context import Run, save_weights
from trainer.loop.fit import Outcome
from trainer.objectives import Distill, Together
from trainer.request import graph
from trainer.teaching.guidance import module_guide
from trainer.teaching.meta import trained_meta
from trainer.teaching.students import student_modules


def run(run: Run, module: int) -> None:
    """Train OUT/refine_<module> from OUT/distill_<module>."""
    recipe, schedule = run.recipe, run.recipe.refine
    _check(run)
    folder, done = run.open("refine", module)
    if done:
        return
    before = "refine" if schedule.order == "sequential" else "distill"
    names = [*(f"{before}_{i}" for i in range(module)), f"distill_{module}"]
    meta, modules, made_with, result = _load(run, names, f"--phase refine --module {module}")
    *predecessors, student = modules
    settings = run.settings("refine", schedule, recipe.student.moe.num_experts)
    trained = graph.trained_again(recipe, module)
    stage = run.teacher_stages()[module]
    guide, guide_flops = module_guide(run, student, stage) if trained else (None, 0)
    objective = Distill(student, stage, meta, module, recipe.distill, run.tokens,
                        recipe.augment.label_smoothing, predecessors, guide)  # fmt: skip
    if trained:
        outcome, state, engine = run.train(
            objective, run.data, schedule, settings, folder, f"refine {module + 1}/{recipe.modules}"
        )
        engine.close()
        metrics = {"hybrid_accuracy": outcome.evaluation["accuracy"], **outcome.evaluation}
    else:
        metrics, state = result["metrics"], student.state_dict()
        outcome = Outcome(metrics, seconds=0.0, steps=0, images_seen=0)
    if run.dist.main:
        save_weights(folder / "model.safetensors", state)
    run.finish(
        folder, "refine", module, outcome, settings,
        epochs=schedule.epochs if trained else 0, flops_per_image=objective.flops_per_image,
        extra_flops=guide_flops, metrics=metrics, made_with=made_with,
    )  # fmt: skip


def run_together(run: Run) -> None:
    """Train OUT/refine_<i> of all modules at once (refine.order=together).

    Checkpoints and metrics lie with the last module, whose hybrid is the whole student; its result is written last. Of
    the time every module gets its share of the FLOPs.
    """
    recipe, schedule = run.recipe, run.recipe.refine
    _check(run)
    modules = range(recipe.modules)
    opened = [run.open("refine", module) for module in modules]
    if all(done for _, done in opened):
        return
    meta, students, made_with, _ = _load(run, [f"distill_{module}" for module in modules], "--phase refine")
    settings = run.settings("refine", schedule, recipe.student.moe.num_experts)
    stages = run.teacher_stages()
    guides, guide_flops = zip(*(module_guide(run, student, stage) for student, stage in zip(students, stages)))
    objective = Together(students, stages, meta, recipe.distill, run.tokens, recipe.meta.blocks_per_module == 0,
                         recipe.augment.label_smoothing, guides)  # fmt: skip
    outcome, state, engine = run.train(
        objective, run.data, schedule, settings, opened[-1][0], f"refine all {recipe.modules}"
    )
    engine.close()
    share = outcome.seconds / sum(objective.flops_by_module)
    for module, (folder, _), pair, flops in zip(modules, opened, objective.pairs, objective.flops_by_module):
        last = module == recipe.modules - 1
        measured = outcome if last else run.measure(pair, settings)
        if run.dist.main:
            own = f"chain.{module}."
            weights = {name.removeprefix(own): value for name, value in state.items() if name.startswith(own)}
            save_weights(folder / "model.safetensors", weights)
        run.finish(
            folder, "refine", module,
            replace(outcome, seconds=share * flops, health=outcome.health if last else {}), settings,
            epochs=schedule.epochs, flops_per_image=flops, extra_flops=guide_flops[module],
            metrics={"hybrid_accuracy": measured.evaluation["accuracy"], **measured.evaluation}, made_with=made_with,
        )  # fmt: skip


def _check(run: Run) -> None:
    if not run.recipe.refine.epochs:
        raise ValueError("refine.epochs is 0, so there is no second round: set it, or go on with --phase train")


def _load(
    run: Run, names: list[str], needed_by: str
) -> tuple[MetaModel, list[StudentModule], dict[str, Any], dict[str, Any]]:
    """Meta model, the student's first modules with the weights of these artifacts, what they are made with, and the
    result of the last one."""
    meta, meta_result = trained_meta(run, needed_by)
    modules = student_modules(run, run.recipe.refine.drop_path)[: len(names)]
    for own, name in zip(modules, names):
        found, result = artifacts.require(run.out, name, run.recipe, needed_by)
        load_full_state_dict(own, artifacts.load_weights(found, own.state_dict()))
    made_with = {"teacher": run.teacher_record, "meta": meta_result["files"]["model.safetensors"]}
    return meta, modules, made_with, result
