"""Phase refine: a second round, in which every module learns on what the modules before it really send.

Modules taught apart meet inputs they have not seen when they are put together, and their errors add up. Module 0 is fed
images either way, so its second round is its first. With distill.epochs=0 there is no first round: modules are taught
here alone, with order=sequential one after another on what those before have learned.
"""

from __future__ import annotations

from models.moe import load_full_state_dict
from trainer import artifacts
from trainer.context import Run, save_weights
from trainer.guidance import module_guide
from trainer.loop import Outcome
from trainer.objectives import Distill


def run(run: Run, module: int) -> None:
    """Train OUT/refine_<module> from OUT/distill_<module>."""
    recipe, schedule = run.recipe, run.recipe.refine
    if not schedule.epochs:
        raise ValueError("refine.epochs is 0, so there is no second round: set it, or go on with --phase train")
    folder, done = run.open("refine", module)
    if done:
        return
    needed_by = f"--phase refine --module {module}"
    meta, meta_result = run.trained_meta(needed_by)
    modules = run.student_modules(schedule.drop_path)
    before = "refine" if schedule.order == "sequential" else "distill"
    names = [*(f"{before}_{i}" for i in range(module)), f"distill_{module}"]
    for own, name in zip(modules, names):
        found, result = artifacts.require(run.out, name, recipe, needed_by)
        load_full_state_dict(own, artifacts.load_weights(found, own.state_dict()))
    *predecessors, student = modules[: module + 1]
    settings = run.settings("refine", schedule, recipe.student.moe.num_experts)
    made_with = {"teacher": run.teacher_record, "meta": meta_result["files"]["model.safetensors"]}
    trained = artifacts.trained_again(recipe, module)
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
