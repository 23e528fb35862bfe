"""Phase distill: one student module learns to behave like the teacher module inside the frozen meta model.

`--module i` is one job of its own (Slurm runs them as an array); `--module all` runs them one after another.
"""

from __future__ import annotations

from trainer import reuse
from trainer.context import Run, save_weights
from trainer.objectives import Distill


def run(run: Run, module: int) -> None:
    """Train OUT/distill_<module>, or take it from distill.source."""
    recipe, d = run.recipe, run.recipe.distill
    folder, done = run.open("distill", module)
    if done:
        return
    if d.source:
        reuse.take_module(run, module, folder)
        return
    meta, meta_result = run.trained_meta(f"--phase distill --module {module}")
    student = run.student_modules(d.drop_path)[module]
    settings = run.settings("distill", d, recipe.student.moe.num_experts)
    stage = run.teacher_stages()[module]
    objective = Distill(student, stage, meta, module, d, run.tokens, recipe.augment.label_smoothing)
    made_with = {"teacher": run.teacher_record, "meta": meta_result["files"]["model.safetensors"]}
    outcome, state, engine = run.train(
        objective, run.data, d, settings, folder, f"distill {module + 1}/{recipe.modules}"
    )
    engine.close()
    if run.dist.main:
        save_weights(folder / "model.safetensors", state)
    metrics = {
        "accuracy": outcome.evaluation["accuracy"],
        "loss": outcome.evaluation["loss"],
        "hybrid_accuracy": outcome.evaluation["accuracy"],
        "teacher_hybrid_accuracy": meta_result["metrics"][f"hybrid_accuracy/{module}"],
    }
    run.finish(
        folder, "distill", module, outcome, settings,
        epochs=d.epochs, flops_per_image=objective.flops_per_image, metrics=metrics, made_with=made_with,
    )  # fmt: skip
