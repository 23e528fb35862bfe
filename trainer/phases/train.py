"""Phase train: the student end to end, from the distilled modules, from a student (train.init) or from scratch.

"scratch_equal_cost" is the honest rival: scratch with as many epochs as meta model, distillation and end-to-end
training cost together in FLOPs.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.experts.guided_routing import Guide
from models.flops import num_tokens
from models.modules.meta import MetaModel
from models.modules.stitch import StudentModule
from models.moe.parallel import expert_parallel, load_full_state_dict
from trainer import artifacts
from trainer.config.ds_config import Settings
from trainer.context import Run
from trainer.data.loader import eval_batches
from trainer.disk import write_json
from trainer.distributed.engine import working_type
from trainer.evaluation.accuracy import Predictor, evaluate
from trainer.objectives import Borders, Classify, LearnFeatures, LearnFromTeacher, Objective
from trainer.request.graph import artifact_name, last_round, preparation
from trainer.teaching import comparison, reuse, upcycling
from trainer.teaching.estimate import Cost, Known, Rehearsed, blank_images, of_training
from trainer.teaching.families import family_of
from trainer.teaching.guidance import routers_of
from trainer.teaching.students import new_student, scratch_student, student_modules
from trainer.tracking.measures import measure_of

FOLD_IMAGES = 256  # training images a fold is fitted on


@dataclass(frozen=True)
class Beginning:
    """The student before training, what it was made with, and what each way to assemble it gives."""

    student: nn.Module
    made_with: dict[str, Any] = field(default_factory=dict)
    assembled: dict[str, float] = field(default_factory=dict)
    spent: int = 0  # FLOPs


def run(run: Run, start: str) -> None:
    """Train OUT/train, OUT/train_scratch or OUT/train_scratch_equal_cost."""
    schedule, family = run.recipe.train, family_of(run.recipe)
    folder, complete = run.open("train", start=start)
    if complete:
        return
    settings = run.settings("train")
    begun = _begin(run, start, settings, folder)
    student = begun.student
    config = student.config
    data = run.data if student.preprocessing is None else run.data_for(student.preprocessing)
    whole, spent = objective(run, student, _borders(run, student), guided=True)
    if start == "scratch_equal_cost":
        schedule = replace(schedule, epochs=schedule.epochs + _epochs_of_preparation(run, whole.flops_per_image))
    name = "train" if start == "distilled" else start.replace("_equal_cost", ", equal cost")
    if run.dist.main:
        family.write_config(folder, config, data.preprocessing, run.classes)  # makes a model of an exported checkpoint
    trained = run.train(
        whole,
        data,
        schedule,
        settings,
        folder,
        name,
        layer_decay=schedule.layer_decay,
        ema=schedule.ema,
        evaluate_start=True,
    )
    if run.dist.main:
        with torch.device("meta"):  # nothing is drawn
            plain = family.build(config)
        plain.save_pretrained(folder, preprocessing=data.preprocessing, labels=run.classes, state=trained.weights)
    outcome = trained.outcome
    measure = measure_of(outcome.evaluation).key
    run.finish(
        folder,
        "train",
        None,
        trained,
        settings,
        metrics=outcome.evaluation | {f"start_{measure}": outcome.start[measure]} | begun.assembled,
        extra_flops=begun.spent + spent,
        made_with=begun.made_with,
    )


def objective(run: Run, student: nn.Module, borders: Borders | None, *, guided: bool = False) -> tuple[Objective, int]:
    """Labels alone, or with the teacher beside them; without classes the teacher alone.

    Args:
        borders: where states are compared, for train.border_weight.
        guided: make the teacher's routers that train.routing_weight asks for; a rehearsal does without.

    Returns:
        The objective, and the FLOPs it took to make those routers.

    Raises:
        ValueError: the teacher is to guide a student that sees other images.
    """
    recipe, schedule, tokens = run.recipe, run.recipe.train, num_tokens(student)
    smoothing = recipe.augment.label_smoothing
    beside = schedule.kd_weight or schedule.border_weight or schedule.routing_weight
    if run.classifies and not beside:
        return Classify(student, tokens, smoothing), 0
    if student.preprocessing not in (None, run.teacher.preprocessing):
        step = "set them to 0" if run.classifies else "take a student that was taught by this teacher"
        raise ValueError(
            "train.kd_weight, border_weight, routing_weight and teacher.head=none show teacher and student the same "
            f"images, but train.init {schedule.init} wants {student.preprocessing} and the teacher "
            f"{run.teacher.preprocessing}: {step}"
        )
    teacher = MetaModel(run.teacher_stages())
    guide, spent = None, 0
    if guided and schedule.routing_weight:
        routers, spent = routers_of(run, student)
        guide = Guide(routers, teacher, schedule.routing_weight)
    kind = LearnFromTeacher if run.classifies else LearnFeatures
    # what the teacher reads; a student of other tokens counts itself
    return kind(student, teacher, schedule, run.tokens, smoothing, borders, guide), spent


def check(run: Run) -> None:
    """Whether the student of train.init fits."""
    reuse.check_student(run)


def taught(run: Run, module: int | None) -> Objective:
    """What the phase trains, before any training and without a guide."""
    t = run.recipe.train
    given = t.init if t.start == "distilled" else ""
    if given:
        reuse.check_student(run)
        student = family_of(run.recipe).load(given)
    else:
        student = new_student(run, t.drop_path)
    # borders without a place: to know how long the teacher is run
    fading = Borders((), ()) if t.border_weight or t.routing_weight else None
    return objective(run, student, fading)[0]


def rehearse(run: Run, module: int | None, known: Known) -> Rehearsed:
    """One image through the whole student, its cost, and that of its rivals."""
    t = run.recipe.train
    whole = taught(run, module)
    student = whole.module
    parameters = sum(p.numel() for p in student.parameters())
    with torch.no_grad():
        whole.predict(blank_images(run, student.preprocessing))
    found = of_training(run, "train", "train", whole.flops_per_image)
    own = found.costs["train"]
    costs = {"train": own} | {artifact_name("train", start=rival): own for rival in ("scratch", "upcycled")}
    before = preparation(run.recipe)
    if known.keys() >= set(before):
        flops_of_epoch = own.flops / t.epochs
        more_epochs = math.ceil(sum(known[name].flops for name in before) / flops_of_epoch)
        flops = own.flops + more_epochs * flops_of_epoch
        equal_cost = artifact_name("train", start="scratch_equal_cost")
        costs[equal_cost] = Cost(flops / whole.flops_per_image, flops)
    text = f"student of {parameters / 1e6:.3g} M parameters; {found.text}"
    return replace(found, text=text, costs=costs, parameters=parameters)


def _begin(run: Run, start: str, settings: Settings, folder: Path) -> Beginning:
    schedule = run.recipe.train
    if start == "upcycled":
        made_with = {"teacher": run.teacher_record, **upcycling.record(run)}
        return Beginning(new_student(run, schedule.drop_path), made_with, spent=upcycling.spent(run))
    if start != "distilled":
        return Beginning(scratch_student(run, schedule.drop_path))
    if schedule.init:
        student = reuse.initial_student(run, settings.ep_size)
        made_with = {"init": student.source}
        if student.classes_note:
            made_with["init_classes"] = student.classes_note
        return Beginning(student, made_with)
    modules = student_modules(run, schedule.drop_path)
    for i, module in enumerate(modules):
        learned, _ = artifacts.require(run.out, f"{last_round(run.recipe)}_{i}", run.recipe, "--phase train")
        load_full_state_dict(module, artifacts.load_weights(learned, module.state_dict()))
    states = _border_states(run, modules) if schedule.stitches == "fold" else None
    assembled = _ways_to_assemble(run, modules, settings, folder)
    student = family_of(run.recipe).assemble(modules, schedule.stitches, states)
    return Beginning(student, {"teacher": run.teacher_record}, assembled)


def _borders(run: Run, student: nn.Module) -> Borders | None:
    """Where the student's states are compared with the teacher's: before the first block of each module but the first.

    Raises:
        ValueError: there is no meta model, whose bases they are compared in.
    """
    if not run.recipe.train.border_weight:
        return None
    borders = comparison.borders_of(run, student)
    if borders is None:
        raise ValueError(f"train.border_weight needs the bases of {run.out / 'meta'}: run --phase meta first")
    return borders


@torch.no_grad()
def _border_states(run: Run, modules: Sequence[StudentModule]) -> list[Tensor]:
    """Outputs (B, T, D_s) of the stages before each border, to fit a fold of stitches with LayerNorm on."""
    source = run.data.train.spread(FOLD_IMAGES)
    x = next(eval_batches(source, run.data.preprocessing, batch=len(source))).images
    states = []
    for module in modules[:-1]:
        entered = x if module.pre is None else module.pre(x)
        states.append(module.eval().stage(entered))
        x = module.post(states[-1])
    return states


def _ways_to_assemble(run: Run, modules: Sequence[StudentModule], settings: Settings, folder: Path) -> dict[str, float]:
    """Accuracy before any end-to-end step of every treatment of the stitches; measured once, kept in assembled.json."""
    path, accuracies = folder / "assembled.json", None
    if run.dist.main and path.is_file():
        accuracies = json.loads(path.read_text())
    accuracies = run.dist.gather(accuracies)[0]
    if accuracies is not None:
        return accuracies
    accuracies, dtype = {}, working_type(settings)
    family = family_of(run.recipe)
    states = _border_states(run, modules) if "fold" in family.STITCHES else None
    for way in family.STITCHES:
        assembled = family.assemble(modules, way, states)
        # a copy: it goes elsewhere, to another type, and leaves the experts of other ranks behind
        student = copy.deepcopy(assembled)
        if settings.ep_size > 1:
            expert_parallel(student, settings.ep_size)
        student.to(run.dist.device, dtype)
        measured = evaluate(_alone(run, student, dtype), run.data, dtype, run.eval_batch(settings), run.dist)
        measure = measure_of(measured).key
        accuracies[f"start_{measure}/{way}"] = measured[measure]
    if run.dist.main:
        write_json(path, accuracies)
    return accuracies


def _alone(run: Run, student: nn.Module, dtype: torch.dtype) -> Predictor:
    """How a student is measured that is not in training."""
    if run.classifies:
        return Predictor(student, student)
    teacher = MetaModel(run.teacher_stages()).to(run.dist.device, dtype)
    return comparison.predictor(student, teacher, functools.partial(student, as_teacher=True))


def _epochs_of_preparation(run: Run, flops_per_image: int) -> int:
    """End-to-end epochs that cost as much as the whole preparation, rounded up: in doubt the rival gets more."""
    results = [
        artifacts.require(run.out, name, run.recipe, "scratch_equal_cost")[1] for name in preparation(run.recipe)
    ]
    spent = sum(result["flops"] for result in results)
    batch = run.settings("train").global_batch
    flops_of_epoch = len(run.data.train) // batch * batch * flops_per_image
    return math.ceil(spent / flops_of_epoch)
