"""Phase train: the student end to end, from the distilled modules, from a V-MoE (train.init) or from scratch.

"scratch_equal_cost" is the honest rival: scratch with as many epochs as meta model, distillation and end-to-end
training cost together in FLOPs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from models.flops import num_tokens
from models.moe import load_full_state_dict
from models.stitch import assemble_student
from models.vmoe import VMoE
from models.vmoe_files import write_config
from trainer import artifacts, reuse
from trainer.context import Run
from trainer.objectives import Classify
from trainer.schema import TrainConfig


def run(run: Run, start: str) -> None:
    """Train OUT/train, OUT/train_scratch or OUT/train_scratch_equal_cost."""
    recipe, schedule = run.recipe, run.recipe.train
    folder, done = run.open("train", start=start)
    if done:
        return
    settings = run.settings("train", schedule, recipe.student.moe.num_experts)
    student, made_with = _start(run, start, settings.ep_size)
    config = student.config
    data = run.data if student.preprocessing is None else run.data_for(student.preprocessing)
    objective = Classify(student, num_tokens(student), recipe.augment.label_smoothing)
    if start == "scratch_equal_cost":
        schedule = _at_equal_cost(run, schedule, objective.flops_per_image)
    name = {"distilled": "train", "scratch": "scratch", "scratch_equal_cost": "scratch, equal cost"}[start]
    if run.dist.main:
        write_config(folder, config, data.preprocessing, run.labels)  # makes a model of an exported checkpoint
    outcome, state, engine = run.train(objective, data, schedule, settings, folder, name)
    engine.close()
    if run.dist.main:
        trained = VMoE(config)
        load_full_state_dict(trained, state)
        trained.save_pretrained(folder, preprocessing=data.preprocessing, labels=run.labels)
    run.finish(
        folder, "train", None, outcome, settings,
        epochs=schedule.epochs, flops_per_image=objective.flops_per_image, metrics=outcome.evaluation,
        made_with=made_with,
    )  # fmt: skip


def _start(run: Run, start: str, ep_size: int) -> tuple[VMoE, dict[str, Any]]:
    """The student before training, and what it was made with."""
    schedule = run.recipe.train
    if start != "distilled":
        return VMoE(run.student_config(schedule.drop_path)), {}
    if schedule.init:
        student = reuse.initial_student(run, ep_size)
        return student, {"init": student.source}
    return _distilled(run), {"teacher": run.teacher_record}


def _distilled(run: Run) -> VMoE:
    """The student assembled from OUT/distill_0 .. N-1."""
    modules = run.student_modules(run.recipe.train.drop_path)
    for i, module in enumerate(modules):
        folder, _ = artifacts.require(run.out, f"distill_{i}", run.recipe, "--phase train")
        load_full_state_dict(module, artifacts.load_weights(folder, module.state_dict()))
    return assemble_student(modules, run.recipe.train.stitches)


def _at_equal_cost(run: Run, schedule: TrainConfig, flops_per_image: int) -> TrainConfig:
    """The schedule with as many epochs as the whole chain costs, rounded up: in doubt the rival gets more."""
    names = ["meta", *(f"distill_{i}" for i in range(run.recipe.modules))]
    spent = sum(artifacts.require(run.out, name, run.recipe, "scratch_equal_cost")[1]["flops"] for name in names)
    batch = run.settings("train", schedule, run.recipe.student.moe.num_experts).global_batch
    per_epoch = len(run.data.train) // batch * batch * flops_per_image
    return dataclasses.replace(schedule, epochs=schedule.epochs + math.ceil(spent / per_epoch))
