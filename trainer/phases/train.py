"""Phase train: the student end to end, from the distilled modules, from a V-MoE (train.init) or from scratch.

"scratch_equal_cost" is the honest rival: scratch with as many epochs as meta model, distillation and end-to-end
training cost together in FLOPs.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.experts.guided_routing import Guide
from models.flops import num_tokens
from models.modules.basis import Project
from models.modules.meta import MetaModel
from models.modules.stitch import STITCHES, StudentModule
from models.moe.parallel import load_full_state_dict
from trainer import artifacts, disk
from trainer.config.ds_config import Settings
from trainer.config.load import module_depths
from trainer.config.phases import TrainConfig
from trainer.context import Run
from trainer.data.loader import eval_batches
from trainer.distributed.engine import working_type
from trainer.evaluation.accuracy import Predictor, evaluate
from trainer.objectives import Borders, Classify, LearnFromTeacher, Objective
from trainer.request import graph
from trainer.teaching import reuse, upcycling
from trainer.teaching.families import family_of
from trainer.teaching.guidance import routers_of
from trainer.teaching.meta import border_bases
from trainer.teaching.students import new_student, scratch_student, student_modules

FOLD_IMAGES = 256  # training images a fold is fitted on


def run(run: Run, start: str) -> None:
    """Train OUT/train, OUT/train_scratch or OUT/train_scratch_equal_cost."""
    recipe, schedule = run.recipe, run.recipe.train
    folder, done = run.open("train", start=start)
    if done:
        return
    settings = run.settings("train", schedule, recipe.student.moe.num_experts)
    student, made_with, assembled = _start(run, start, settings, folder)
    config = student.config
    data = run.data if student.preprocessing is None else run.data_for(student.preprocessing)
    objective, guide_flops = _objective(run, student)
    if start == "scratch_equal_cost":
        schedule = _at_equal_cost(run, schedule, objective.flops_per_image)
    name = "train" if start == "distilled" else start.replace("_equal_cost", ", equal cost")
    if run.dist.main:
        family_of(recipe).write_config(
            folder, config, data.preprocessing, run.labels
        )  # makes a model of an exported checkpoint
    outcome, state, engine = run.train(
        objective, data, schedule, settings, folder, name,
        layer_decay=schedule.layer_decay, ema=schedule.ema, evaluate_start=True,
    )  # fmt: skip
    engine.close()
    if run.dist.main:
        trained = family_of(recipe).build(config)
        load_full_state_dict(trained, state)
        trained.save_pretrained(folder, preprocessing=data.preprocessing, labels=run.labels)
    run.finish(
        folder, "train", None, outcome, settings,
        epochs=schedule.epochs, flops_per_image=objective.flops_per_image,
        extra_flops=guide_flops + (upcycling.spent(run) if start == "upcycled" else 0),
        metrics=outcome.evaluation | {"start_accuracy": outcome.start["accuracy"]} | assembled, made_with=made_with,
    )  # fmt: skip


def _start(
    run: Run, start: str, settings: Settings, folder: Path
) -> tuple[nn.Module, dict[str, Any], dict[str, float]]:
    """The student before training, what it was made with, and what each way to assemble it gives."""
    schedule = run.recipe.train
    if start == "upcycled":
        return new_student(run, schedule.drop_path), {"teacher": run.teacher_record, **upcycling.record(run)}, {}
    if start != "distilled":
        return scratch_student(run, schedule.drop_path), {}, {}
    if schedule.init:
        student = reuse.initial_student(run, settings.ep_size)
        return student, {"init": student.source}, {}
    modules = student_modules(run, schedule.drop_path)
    last = "refine" if run.recipe.refine.epochs else "distill"
    for i, module in enumerate(modules):
        found, _ = artifacts.require(run.out, f"{last}_{i}", run.recipe, "--phase train")
        load_full_state_dict(module, artifacts.load_weights(found, module.state_dict()))
    states = _border_states(run, modules) if schedule.stitches == "fold" else None
    assembled = _ways_to_assemble(run, modules, settings, folder) if settings.ep_size == 1 else {}
    return (
        family_of(run.recipe).assemble(modules, schedule.stitches, states),
        {"teacher": run.teacher_record},
        assembled,
    )


def _objective(run: Run, student: nn.Module) -> tuple[Objective, int]:
    """Labels alone, or with the teacher beside them; and the FLOPs of making its routers.

    Raises:
        ValueError: the teacher is to guide a student that sees other images, or states in a basis that is not theirs.
    """
    recipe, schedule, tokens = run.recipe, run.recipe.train, num_tokens(student)
    smoothing = recipe.augment.label_smoothing
    if not schedule.kd_weight and not schedule.border_weight and not schedule.routing_weight:
        return Classify(student, tokens, smoothing), 0
    if student.preprocessing not in (None, run.teacher.preprocessing):
        raise ValueError(
            "train.kd_weight, border_weight, routing_weight show teacher and student the same images, but train.init "
            f"{schedule.init} wants {student.preprocessing} and the teacher {run.teacher.preprocessing}: set them to 0"
        )
    borders = _borders(run, student) if schedule.border_weight else None
    teacher, guide, flops = MetaModel(run.teacher_stages()), None, 0
    if schedule.routing_weight:
        routers, flops = routers_of(run, student)
        guide = Guide(routers, teacher, schedule.routing_weight)
    return LearnFromTeacher(student, teacher, schedule, tokens, smoothing, borders, guide), flops


def _borders(run: Run, student: nn.Module) -> Borders:
    bases = border_bases(run)
    if bases is None:
        raise ValueError(f"train.border_weight needs the bases of {run.out / 'meta'}: run --phase meta first")
    depths = module_depths(run.recipe.student.depths, len(student.blocks), run.recipe.modules, "student")
    first_blocks = list(itertools.accumulate(depths))[:-1]
    return Borders(first_blocks, [Project(*basis.leading(student.embed_dim)) for basis in bases])


@torch.no_grad()
def _border_states(run: Run, modules: list[StudentModule]) -> list[Tensor]:
    """Outputs (B, T, D_s) of the stages before each border, to fit a fold of stitches with LayerNorm on."""
    source = run.data.train.spread(FOLD_IMAGES)
    images = next(eval_batches(source, run.data.preprocessing, batch=len(source))).images
    states = []
    for module in modules[:-1]:
        given = images if module.pre is None else module.pre(images)
        states.append(module.eval().stage(given))
        images = module.post(states[-1])
    return states


def _ways_to_assemble(run: Run, modules: list[StudentModule], settings: Settings, folder: Path) -> dict[str, float]:
    """Accuracy before any end-to-end step of every treatment of the stitches; measured once, kept in assembled.json."""
    path, found = folder / "assembled.json", None
    if run.dist.main and path.is_file():
        found = json.loads(path.read_text())
    found = run.dist.gather(found)[0]
    if found is None:
        found, dtype = {}, working_type(settings)
        states = _border_states(run, modules)
        for way in STITCHES:
            # a copy: its weights go to the device and to another type
            student = copy.deepcopy(family_of(run.recipe).assemble(modules, way, states)).to(run.dist.device, dtype)
            measured = evaluate(Predictor(student, student), run.data, dtype, run.eval_batch(settings), run.dist)
            found[f"start_accuracy/{way}"] = measured["accuracy"]
        if run.dist.main:
            disk.write_json(path, found)
    return found


def _at_equal_cost(run: Run, schedule: TrainConfig, flops_per_image: int) -> TrainConfig:
    """The schedule with as many epochs as the whole chain costs, rounded up: in doubt the rival gets more."""
    names = graph.preparation(run.recipe)
    spent = sum(artifacts.require(run.out, name, run.recipe, "scratch_equal_cost")[1]["flops"] for name in names)
    batch = run.settings("train", schedule, run.recipe.student.moe.num_experts).global_batch
    per_epoch = len(run.data.train) // batch * batch * flops_per_image
    return dataclasses.replace(schedule, epochs=schedule.epochs + math.ceil(spent / per_epoch))
