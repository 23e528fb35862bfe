"""Phase assemble: the incubated modules become one teacher, fine-tuned on labels and saved like that of phase teacher.

Every module is then measured in its place in the meta model, as phase meta does with a teacher that is there before.
Experimental (docs/studies.md).
"""

from __future__ import annotations

from models.modules.stages import set_drop_path
from models.teacher.convert import back_to_transformers
from models.teacher.load import load_teacher, save_teacher
from trainer import artifacts
from trainer.context import Run
from trainer.objectives import Classify
from trainer.teaching import hybrids
from trainer.teaching.estimate import Known, Rehearsed, of_training
from trainer.teaching.meta import trained_meta
from trainer.teaching.teachers import new_teacher_of, with_seedling


def run(run: Run) -> None:
    """Train OUT/assemble."""
    recipe, schedule = run.recipe, run.recipe.assemble
    folder, complete = run.open("assemble")
    if complete:
        return
    run = with_seedling(run)
    meta, meta_result = trained_meta(run, "--phase assemble")
    model, stages = run.teacher.model, run.teacher_stages()
    for i, stage in enumerate(stages):  # they share the model's parameters
        incubated, _ = artifacts.require(run.out, f"incubate_{i}", recipe, "--phase assemble")
        stage.load_state_dict(artifacts.load_weights(incubated, stage.state_dict()))
    set_drop_path(model, schedule.drop_path)
    model.requires_grad_(True)
    settings = run.settings("assemble")
    trained = run.train(objective(run), run.data, schedule, settings, folder, "assemble", evaluate_start=True)
    outcome = trained.outcome
    hybrid_metrics = hybrids.measure(run, meta, stages, settings)
    made_with = {"meta": meta_result["files"]["model.safetensors"]}
    if run.dist.main:
        hybrids.report(hybrid_metrics, recipe.modules)
        model.float().cpu().load_state_dict(trained.weights)
        grown = new_teacher_of(recipe.teacher, run.labels)
        back_to_transformers(model, grown.classifier)
        save_teacher(grown, folder, run.teacher.preprocessing)
        made_with["teacher"] = run.with_teacher(load_teacher(str(folder))).teacher_record
    metrics = outcome.evaluation | {"start_accuracy": outcome.start["accuracy"]} | hybrid_metrics
    run.finish(folder, "assemble", None, trained, settings, metrics=metrics, made_with=made_with)


def objective(run: Run) -> Classify:
    """The whole teacher on the labels."""
    return Classify(run.teacher.model, run.tokens, run.recipe.augment.label_smoothing)


def taught(run: Run, module: int | None) -> Classify:
    """What the phase trains, before any training."""
    run.teacher.model.requires_grad_(True)
    return objective(run)


def rehearse(run: Run, module: int | None, known: Known) -> Rehearsed:
    """What fine-tuning it will cost."""
    return of_training(run, "assemble", "assemble", objective(run).flops_per_image)
