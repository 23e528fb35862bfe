"""Phase incubate: one module of a teacher that is grown learns the labels in its place in the frozen meta model.

`--module i` is one job of its own; `--module all` runs them one after another.
"""

from __future__ import annotations

from models.modules.stages import set_drop_path
from trainer.context import Run, save_weights
from trainer.objectives import Incubate
from trainer.teaching.meta import trained_meta
from trainer.teaching.teachers import with_seedling


def run(run: Run, module: int) -> None:
    """Train OUT/incubate_<module>."""
    recipe, schedule = run.recipe, run.recipe.incubate
    folder, done = run.open("incubate", module)
    if done:
        return
    run = with_seedling(run)
    meta, meta_result = trained_meta(run, f"--phase incubate --module {module}")
    set_drop_path(run.teacher.model, schedule.drop_path)
    stage = run.teacher_stages()[module].requires_grad_(True)
    settings = run.settings("incubate", schedule)
    objective = Incubate(stage, meta, module, run.tokens, recipe.augment.label_smoothing)
    outcome, state, engine = run.train(
        objective, run.data, schedule, settings, folder, f"incubate {module + 1}/{recipe.modules}"
    )
    engine.close()
    if run.dist.main:
        save_weights(folder / "model.safetensors", state)
    run.finish(
        folder, "incubate", module, outcome, settings,
        epochs=schedule.epochs, flops_per_image=objective.flops_per_image,
        metrics=outcome.evaluation | {"hybrid_accuracy": outcome.evaluation["accuracy"]},
        made_with={"meta": meta_result["files"]["model.safetensors"]},
    )  # fmt: skip
