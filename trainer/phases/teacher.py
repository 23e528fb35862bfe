"""Phase teacher: train a small ViT on the data and save it as an ordinary transformers directory.

For the embedded demo and for users without a pretrained teacher; with teacher.source set there is nothing to do.
"""

from __future__ import annotations

from dataclasses import replace

from models.teacher.load import TransformersTeacher, load_teacher, save_teacher
from trainer.context import Run
from trainer.distributed.ranks import seed_everything
from trainer.objectives import Classify, cost
from trainer.objectives.cost import flops_per_image
from trainer.teaching.estimate import Known, Rehearsed, of_training
from trainer.teaching.teachers import new_teacher_of, trained_preprocessing


def run(run: Run) -> None:
    """Train OUT/teacher."""
    schedule = run.recipe.teacher
    folder, complete = run.open("teacher")
    if complete:
        return
    seed_everything(run.recipe.seed, 0, run.recipe.run.deterministic)
    model = new_teacher_of(schedule, run.labels)
    preprocessing = trained_preprocessing(schedule)
    settings = run.settings("teacher")
    data = run.data_for(preprocessing)
    trained = run.train(objective(run, model), data, schedule, settings, folder, "teacher")
    model.float().cpu().load_state_dict(trained.weights)
    if run.dist.main:
        save_teacher(model, folder, preprocessing)
    run.dist.barrier()
    # counted on timm's form, in which the attention's products are known by `qkv`
    trained = replace(
        trained, flops_per_image=flops_per_image(cost.trained(load_teacher(str(folder)).model), _tokens(run))
    )
    run.finish(folder, "teacher", None, trained, settings, metrics=trained.outcome.evaluation)


def objective(run: Run, model: TransformersTeacher) -> Classify:
    """The teacher on the labels."""
    return Classify(model, _tokens(run), run.recipe.augment.label_smoothing)


def taught(run: Run, module: int | None) -> Classify:
    """What the phase trains, in timm's form; `run` has a teacher of this size already."""
    return objective(run, run.teacher.model.requires_grad_(True))


def rehearse(run: Run, module: int | None, known: Known) -> Rehearsed:
    """What training it will cost; `run` has a teacher of this size already."""
    return of_training(run, "teacher", "teacher", flops_per_image(cost.trained(run.teacher.model), run.tokens))


def _tokens(run: Run) -> int:
    t = run.recipe.teacher
    return (t.trained_size // t.patch_size) ** 2 + 1
