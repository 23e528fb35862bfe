"""Before anything is trained: does every phase of this invocation have what it needs, and do the sizes fit?

Models are built on the meta device, so even a V-MoE-H costs neither memory nor time here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from models.preprocessing import Preprocessing
from models.teacher import Teacher, TransformersTeacher, new_teacher
from trainer import experts, reuse, trackers
from trainer.artifacts import taught_by_expert
from trainer.config import close, shown
from trainer.context import Run
from trainer.job import GROWING
from trainer.loop import epoch_length
from trainer.schema import TeacherConfig


def check(run: Run, phases: Sequence[str], *, make_repo: bool = True) -> None:
    """Check hub, data, teacher, depths, widths, tokens, batches and expert parallelism of the phases about to run.

    Args:
        make_repo: for phase push, make a repository that does not exist yet; else only ask what can be asked.

    Raises:
        ValueError: what does not fit, before any training.
        OSError: the hub cannot be reached.
    """
    if "push" in phases and run.dist.main:
        from trainer.hub import check_hub

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
            run.student_modules()
            if run.planned_teacher is not None:
                run.new_meta()


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


def new_teacher_of(t: TeacherConfig, labels: list[str]) -> TransformersTeacher:
    """The teacher of teacher.* sizes with random weights, from torch's generator."""
    return new_teacher(
        image_size=t.image_size, patch_size=t.patch_size, width=t.width, depth=t.depth, heads=t.heads,
        mlp_dim=t.mlp_dim, labels=labels, preprocessing=trained_preprocessing(t),
    )  # fmt: skip


def planned_teacher(t: TeacherConfig, labels: list[str]) -> Teacher:
    """A stand-in, without weights, for the teacher that phase teacher is going to train."""
    if t.image_size % t.patch_size or t.width % t.heads:
        raise ValueError(
            f"teacher.image_size {t.image_size} must be a multiple of teacher.patch_size {t.patch_size}, "
            f"and teacher.width {t.width} of teacher.heads {t.heads}"
        )
    with torch.device("meta"):
        model = VisionTransformer(
            img_size=t.image_size, patch_size=t.patch_size, embed_dim=t.width, depth=t.depth, num_heads=t.heads,
            mlp_ratio=t.mlp_dim / t.width, num_classes=len(labels),
        )  # fmt: skip
    return Teacher(model, trained_preprocessing(t), "to be trained", labels, len(labels))


def trained_preprocessing(t: TeacherConfig) -> Preprocessing:
    """What a teacher of phase teacher sees: the statistics of google/vit-*; any fixed pair serves."""
    return Preprocessing(t.image_size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
