"""Before anything is trained: does every phase of this invocation have what it needs, and do the sizes fit?

Models are built on the meta device, so even a V-MoE-H costs neither memory nor time here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trainer.config.load import close, shown
from trainer.context import Run
from trainer.loop.fit import epoch_length
from trainer.request.graph import GROWING, taught_by_expert
from trainer.teaching import experts, reuse
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
    before = ("meta", *GROWING) if run.recipe.teacher.grown else ("teacher",)  # phases that do without the teacher
    if set(before) & set(phases) and not (run.out / before[-1] / "result.json").is_file():
        run = run.with_teacher(planned_teacher(run.recipe.teacher, labels))
    num_experts = run.recipe.student.moe.num_experts
    for section in ("teacher", "meta", *GROWING, "distill", "train"):
        if section in phases:
            schedule = getattr(run.recipe, section)
            settings = run.settings(section, schedule, num_experts if section in ("distill", "train") else 0)
            check_zero(settings.config["zero_optimization"])
            epoch_length(run.data_for(None), settings)
    if "expert" in phases:  # a share may be smaller than a batch: it is repeated
        check_zero(run.settings("expert", run.recipe.expert).config["zero_optimization"])
    reuse.check(run, phases)
    given = {"train"} if run.recipe.train.init and run.recipe.train.start == "distilled" else set()
    # evaluate needs no teacher, nor does a given start
    with_teacher = {"meta", *GROWING, "cluster", "expert", "distill", "train"} - given
    if with_teacher & set(phases):
        with torch.device("meta"):
            run.teacher_stages()
            if taught_by_expert(run.recipe) and {"cluster", "expert", "distill"} & set(phases):
                experts.check(run)
            student_modules(run)
            if run.planned_teacher is not None:
                new_meta(run)


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
