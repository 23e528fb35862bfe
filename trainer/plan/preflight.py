"""Before anything is trained: does every phase of this invocation have what it needs, and do the sizes fit?

Models are built on the meta device, so even a V-MoE-H costs neither memory nor time here.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch

from models.preprocessing import Preprocessing
from trainer.config.knobs import close
from trainer.config.load import shown
from trainer.context import Run
from trainer.data.loader import try_transforms
from trainer.distributed.engine import build_cosine, build_optimizer
from trainer.loop.fit import epoch_length
from trainer.phases import code_of
from trainer.plan import image_size
from trainer.request.graph import TABLE, Phase, own_teacher, taking_part
from trainer.teaching.estimate import few_steps
from trainer.teaching.meta import new_meta
from trainer.teaching.students import student_modules
from trainer.teaching.teachers import before_the_probe, planned_teacher
from trainer.tracking import trackers

log = logging.getLogger(__name__)
STAND_IN = Preprocessing(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def check(run: Run, phases: Sequence[str], *, make_repo: bool = True) -> None:
    """Check hub, data, teacher, depths, widths, tokens, batches and expert parallelism of the phases about to run.

    Args:
        make_repo: for phase push, make a repository that does not exist yet; else only ask what can be asked.

    Raises:
        ValueError: what does not fit, before any training.
        OSError: the hub cannot be reached.
    """
    if "push" in phases and run.dist.main:
        from trainer.hub.push import check_hub

        check_hub(run.recipe.hub, make=make_repo)
    if not set(phases) - {"push"}:
        return
    trackers.chosen(run.recipe.run.trackers)
    if run.recipe.run.compile:
        _check_compiler()
    asked = [row for row in TABLE if row.name in phases]
    for row in asked:
        if row.own_images:
            _check_own_images(run, row)
    asked = [row for row in asked if not row.own_images]
    if not {row.name for row in asked} - {"push"}:
        return
    labels = run.labels  # opens the data, which may be a download of hours
    if not run.classifies and run.dist.main:
        for line in said_of_features(run):
            log.info(line)
    if _teacher_comes_later(run, phases):
        run = run.with_teacher(planned_teacher(run.recipe.teacher, labels))
    if "probe" in phases:
        run = before_the_probe(run)
    for row in asked:
        if row.trains(run.recipe):
            settings = run.settings(row.section)
            check_zero(settings.config["zero_optimization"])
            if row.repeated != "expert":  # whose share may be smaller than a batch: it is repeated
                epoch_length(run.data_for(None), settings)
                if _trained(run, row):
                    few = few_steps(row.section, len(run.sources[0]), settings.global_batch)
                    if few:
                        log.warning("phase %s: %s", row.name, few)
            check_training(run, row)
    for row in asked:
        if hasattr(code_of(row.name), "check"):
            code_of(row.name).check(run)
    train = run.recipe.train
    given = train.init and train.start == "distilled"  # such a student needs no teacher; nor does phase evaluate
    if any(row.section not in ("", "teacher") and not (row.name == "train" and given) for row in asked):
        with torch.device("meta"):
            run.teacher_stages()
            student_modules(run)
            if run.planned_teacher is not None:
                new_meta(run)
    if any(row.trains(run.recipe) for row in asked):
        # once: all phases share the transforms. A given student brings its own preprocessing, in place of the teacher's
        without_teacher = given and all(row.name == "train" for row in asked if row.section)
        preprocessing = STAND_IN if without_teacher else run.teacher.preprocessing
        if not without_teacher:
            for doubt in image_size.doubts(run):
                log.warning(doubt)
        try_transforms(run.data_for(preprocessing))


def _check_own_images(run: Run, row: Phase) -> None:
    """The same of a phase that needs neither section data nor a teacher."""
    settings = run.settings(row.section)
    check_zero(settings.config["zero_optimization"])
    check_training(run, row)
    code_of(row.name).check(run)


def _check_compiler() -> None:
    """torch.compile writes C++ and has it compiled, on a GPU too (Triton's launchers)."""
    asked_for = os.environ.get("CXX", "")
    names = [asked_for] if asked_for else ["g++", "clang++", "c++"]
    if not any(map(shutil.which, names)):
        raise ValueError(
            f"run.compile is true, but no C++ compiler was found (looked for {', '.join(names)}). Install one, name it "
            f"in CXX, or leave run.compile false."
        )


def said_of_features(run: Run) -> list[str]:
    """What a run without classes reads otherwise than it was written, a line each."""
    recipe = run.recipe
    reason = f"teacher.head={recipe.teacher.head}"
    if not run.labels:
        reason += f" and {run.sources[0].name} has no labels"
    lines = [f"{reason}: the student learns the teacher's features and gives features, without classes"]
    if recipe.distill.border == "none":
        lines.append("distill.border=none is read as mse: border targets are all there is to learn from")
    unused = recipe.without_effect()
    if unused:
        lines.append(f"without classes these have no effect: {', '.join(unused)}")
    return lines


def _teacher_comes_later(run: Run, phases: Sequence[str]) -> bool:
    """Whether one of these phases comes before the teacher is trained, or trains it."""
    own = own_teacher(run.recipe)
    if not own or (run.out / own[0] / "result.json").is_file():
        return False
    names = [row.name for row in taking_part(run.recipe)]
    up_to_it = [*itertools.takewhile(lambda name: name != own[0], names), own[0]]
    return bool(set(up_to_it) & set(phases))


def _trained(run: Run, row: Phase) -> bool:
    """Whether a phase has anything to train."""
    if row.name == "meta" and (run.recipe.meta.source or not run.recipe.meta.blocks_per_module):
        return False
    return getattr(run.recipe, row.section).epochs > 0


def check_training(run: Run, row: Phase) -> None:
    """Build optimiser and schedule of a phase on a stand-in of one number, and see that its batches can be mixed.

    Raises:
        ValueError: torch refuses a value, a learning rate is none, or mixing would meet an odd micro-batch.
    """
    schedule = getattr(run.recipe, row.section)
    settings = run.settings(row.section)
    if not schedule.epochs:
        return  # turned off
    augment = run.recipe.augment
    if not row.own_images and (augment.mixup or augment.cutmix) and settings.micro_batch % 2:
        raise ValueError(
            f"mixup pairs images: the micro-batch must be even, got {settings.micro_batch} in phase {row.name}: change "
            f"{row.section}.global_batch or the DeepSpeed JSON, or set augment.mixup=0 augment.cutmix=0"
        )
    images = len(run.boxes[0] if row.own_images else run.sources[0])
    steps_per_epoch = max(1, images // settings.global_batch)
    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": schedule.weight_decay}
    try:
        optimizer = build_optimizer([group], schedule, settings)
    except ValueError as error:
        raise ValueError(f"torch refuses the optimiser of section {row.section}: {error}; change it there") from None
    cosine = build_cosine(optimizer, schedule, settings, steps_per_epoch)
    steps = schedule.epochs * steps_per_epoch
    for step in (0, steps // 2, steps - 1):
        cosine.step_update(step)
        lr = optimizer.param_groups[0]["lr"]
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(
                f"the learning rate of step {step} of section {row.section} is {lr}, expected 0 or more: check lr, "
                "min_lr, warmup_lr and warmup_epochs"
            )


def check_zero(zero: dict[str, Any]) -> None:
    """Let DeepSpeed read its ZeRO section now; it would refuse a misspelt key only when an engine is built.

    Raises:
        ValueError: a key or value DeepSpeed does not know.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        found = error.errors()[0]
        name = ".".join(map(str, found["loc"]))
        if found["type"] == "extra_forbidden":
            near = close(name, list(DeepSpeedZeroConfig.model_fields), "See DeepSpeed's documentation of ZeRO")
            raise ValueError(f'unknown key "zero_optimization.{name}" in the DeepSpeed JSON. {near}') from None
        raise ValueError(
            f'"zero_optimization.{name}" is {shown(found["input"])} in the DeepSpeed JSON: {found["msg"]}'
        ) from None
