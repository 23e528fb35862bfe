"""Phase incubate: one module of a teacher that is grown learns the labels in its place in the frozen meta model.

`--module i` is one job of its own; `--module all` runs them one after another. Experimental (docs/studies.md).
"""

from __future__ import annotations

import torch

from models.modules.meta import MetaModel
from models.modules.stages import set_drop_path
from trainer.context import Run
from trainer.objectives import Incubate
from trainer.teaching.estimate import Known, Rehearsed, blank_images, of_training
from trainer.teaching.meta import new_meta, trained_meta
from trainer.teaching.teachers import with_seedling


def run(run: Run, module: int) -> None:
    """Train OUT/incubate_<module>."""
    recipe, schedule = run.recipe, run.recipe.incubate
    folder, complete = run.open("incubate", module)
    if complete:
        return
    run = with_seedling(run)
    meta, meta_result = trained_meta(run, f"--phase incubate --module {module}")
    set_drop_path(run.teacher.model, schedule.drop_path)
    settings = run.settings("incubate")
    what = f"incubate {module + 1}/{recipe.modules}"
    trained = run.train(objective(run, module, meta), run.data, schedule, settings, folder, what)
    evaluation = trained.outcome.evaluation
    run.finish(
        folder,
        "incubate",
        module,
        trained,
        settings,
        metrics=evaluation | {"hybrid_accuracy": evaluation["accuracy"]},
        weights=trained.weights,
        made_with={"meta": meta_result["files"]["model.safetensors"]},
    )


def objective(run: Run, module: int, meta: MetaModel) -> Incubate:
    """Teacher module `module` in its place in the meta model; only the module is trained."""
    stage = run.teacher_stages()[module].requires_grad_(True)
    return Incubate(stage, meta, module, run.tokens, run.recipe.augment.label_smoothing)


def taught(run: Run, module: int) -> Incubate:
    """What the phase trains, before any training."""
    return objective(run, module, new_meta(run))


def rehearse(run: Run, module: int, known: Known) -> Rehearsed:
    """One image through the hybrid, and what training the module will cost."""
    grown = taught(run, module)
    with torch.no_grad():
        grown.predict(blank_images(run))
    return of_training(run, "incubate", f"incubate_{module}", grown.flops_per_image)
