"""Phase distill: one student module learns to behave like the teacher module inside the frozen meta model.

`--module i` is one job of its own (Slurm runs them as an array); `--module all` runs them one after another. With
distill.level=expert the module starts from its experts, which phase expert has taught one by one.
"""

from __future__ import annotations

from trainer.context import Run, save_weights
from trainer.objectives import Distill
from trainer.teaching import reuse, upcycling
from trainer.teaching.experts import Assembly
from trainer.teaching.guidance import module_guide
from trainer.teaching.meta import trained_meta
from trainer.teaching.students import student_modules


def run(run: Run, module: int) -> None:
    """Train OUT/distill_<module>, or take it from distill.source."""
    recipe, d = run.recipe, run.recipe.distill
    folder, done = run.open("distill", module)
    if done:
        return
    if d.source:
        reuse.take_module(run, module, folder)
        return
    meta, meta_result = trained_meta(run, f"--phase distill --module {module}")
    assembly = Assembly(run, module) if d.level == "expert" else None
    student = assembly.student if assembly else student_modules(run, d.drop_path)[module]
    settings = run.settings("distill", d, recipe.student.moe.num_experts)
    stage = run.teacher_stages()[module]
    made_with = {"teacher": run.teacher_record, "meta": meta_result["files"]["model.safetensors"]}
    made_with |= upcycling.record(run)
    extra_flops = (assembly.flops if assembly else 0) + upcycling.spent(run) // recipe.modules
    guide, guide_flops = module_guide(run, student, stage) if d.epochs else (None, 0)
    smoothing = recipe.augment.label_smoothing
    objective = Distill(student, stage, meta, module, d, run.tokens, smoothing, guide=guide)
    if d.epochs:
        outcome, state, engine = run.train(
            objective, run.data, d, settings, folder, f"distill {module + 1}/{recipe.modules}",
            evaluate_start=assembly is not None,
        )  # fmt: skip
        engine.close()
    else:
        state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        outcome = run.measure(objective, settings)
    if run.dist.main:
        save_weights(folder / "model.safetensors", state)
    metrics = outcome.evaluation | {
        "hybrid_accuracy": outcome.evaluation["accuracy"],
        "teacher_hybrid_accuracy": meta_result["metrics"][f"hybrid_accuracy/{module}"],
    }
    if assembly:
        metrics |= assembly.metrics(state) | {"start_accuracy": (outcome.start or outcome.evaluation)["accuracy"]}
    run.finish(
        folder, "distill", module, outcome, settings,
        epochs=d.epochs, flops_per_image=objective.flops_per_image, extra_flops=extra_flops + guide_flops,
        metrics=metrics, made_with=made_with,
    )  # fmt: skip
