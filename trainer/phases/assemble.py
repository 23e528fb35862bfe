"""Phase assemble: the incubated modules become one teacher, fine-tuned on labels and saved like that of phase teacher.

Every module is then measured in its place in the meta model, as phase meta does with a teacher that is there before.
"""

from __future__ import annotations

from models.modules.stages import set_drop_path
from models.teacher.convert import back_to_transformers
from models.teacher.load import load_teacher, save_teacher
from trainer import artifacts
from trainer.context import Run
from trainer.objectives import Classify
from trainer.teaching import hybrids
from trainer.teaching.meta import trained_meta
from trainer.teaching.teachers import new_teacher_of, with_seedling


def run(run: Run) -> None:
    """Train OUT/assemble."""
    recipe, schedule = run.recipe, run.recipe.assemble
    folder, done = run.open("assemble")
    if done:
        return
    run = with_seedling(run)
    meta, meta_result = trained_meta(run, "--phase assemble")
    model, stages = run.teacher.model, run.teacher_stages()
    for i, stage in enumerate(stages):  # they share the model's parameters
        found, _ = artifacts.require(run.out, f"incubate_{i}", recipe, "--phase assemble")
        stage.load_state_dict(artifacts.load_weights(found, stage.state_dict()))
    set_drop_path(model, schedule.drop_path)
    model.requires_grad_(True)
    settings = run.settings("assemble", schedule)
    objective = Classify(model, run.tokens, recipe.augment.label_smoothing)
    outcome, state, engine = run.train(objective, run.data, schedule, settings, folder, "assemble", evaluate_start=True)
    measured = hybrids.measure(run, meta, stages, settings)
    engine.close()
    made_with = {"meta": meta_result["files"]["model.safetensors"]}
    if run.dist.main:
        hybrids.report(measured, recipe.modules)
        model.float().cpu().load_state_dict(state)
        grown = new_teacher_of(recipe.teacher, run.labels)
        back_to_transformers(model, grown.classifier)
        save_teacher(grown, folder, run.teacher.preprocessing)
        made_with["teacher"] = run.with_teacher(load_teacher(str(folder))).teacher_record
    run.finish(
        folder, "assemble", None, outcome, settings,
        epochs=schedule.epochs, flops_per_image=objective.flops_per_image,
        metrics=outcome.evaluation | {"start_accuracy": outcome.start["accuracy"]} | measured, made_with=made_with,
    )  # fmt: skip
