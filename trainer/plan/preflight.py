"""Before anything is trained: does every phase of this invocation have what it needs, and do the sizes fit?

Models are built on the meta device, so even a V-MoE-H costs neither memory nor time here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from trainer.config.load import close, shown
from trainer.context import Run
from trainer.loop.fit import epoch_length
from trainer.phases import code_of
from trainer.request.graph import TABLE, own_teacher, taking_part
from trainer.teaching.meta import new_meta
from trainer.teaching.students import student_modules
from trainer.teaching.teachers import planned_teacher
from trainer.tracking import trackers


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
    labels = run.labels  # opens the data, which may be a download of hours
    if _teacher_comes_later(run, phases):
        run = run.with_teacher(planned_teacher(run.recipe.teacher, labels))
    asked = [row for row in TABLE if row.name in phases]
    for row in asked:
        if row.trains:
            settings = run.settings(row.section)
            check_zero(settings.config["zero_optimization"])
            if row.repeated != "expert":  # whose share may be smaller than a batch: it is repeated
                epoch_length(run.data_for(None), settings)
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


def _teacher_comes_later(run: Run, phases: Sequence[str]) -> bool:
    """Whether one of these phases comes before the teacher is trained, or trains it."""
    own = own_teacher(run.recipe)
    if not own or (run.out / own[0] / "result.json").is_file():
        return False
    names = [row.name for row in taking_part(run.recipe)]
    up_to_it = [*itertools.takewhile(lambda name: name != own[0], names), own[0]]
    return bool(set(up_to_it) & set(phases))


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
