"""Phase teacher: train a small ViT on the data and save it as an ordinary transformers directory.

For the embedded demo and for users without a pretrained teacher; with teacher.source set there is nothing to do.
"""

from __future__ import annotations

from models.teacher.load import load_teacher, save_teacher
from trainer.context import Run, training_flops
from trainer.distributed.ranks import seed_everything
from trainer.objectives import Classify
from trainer.teaching.teachers import new_teacher_of, trained_preprocessing


def run(run: Run) -> None:
    """Train OUT/teacher."""
    t = run.recipe.teacher
    if t.source:
        raise ValueError(
            f"teacher.source is {t.source!r}, so there is no teacher to train: go on with --phase meta, "
            "or set teacher.source='' to train one"
        )
    folder, done = run.open("teacher")
    if done:
        return
    preprocessing = trained_preprocessing(t)
    seed_everything(run.recipe.seed, 0, run.recipe.run.deterministic)
    model = new_teacher_of(t, run.labels)
    settings = run.settings("teacher", t)
    tokens = (t.image_size // t.patch_size) ** 2 + 1
    objective = Classify(model, tokens, run.recipe.augment.label_smoothing)
    outcome, state, engine = run.train(objective, run.data_for(preprocessing), t, settings, folder, "teacher")
    engine.close()
    model.float().cpu().load_state_dict(state)
    if run.dist.main:
        save_teacher(model, folder, preprocessing)
    run.dist.barrier()
    flops = training_flops(load_teacher(str(folder)).model, tokens)
    metrics = outcome.evaluation
    run.finish(folder, "teacher", None, outcome, settings, epochs=t.epochs, flops_per_image=flops, metrics=metrics)
