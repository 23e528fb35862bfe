"""A teacher that is grown inside the meta model (teacher.grown), as in Deep Incubation (arXiv 2212.04129).

The phases in order: meta (labels, from scratch), incubate 0..N-1 (independent of each other), assemble.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer

from models.preprocessing import Preprocessing
from models.teacher.convert import to_timm
from models.teacher.load import Teacher, TransformersTeacher, new_teacher
from trainer.config.phases import TeacherConfig
from trainer.context import Run
from trainer.distributed.ranks import seed_everything


def with_seedling(run: Run) -> Run:
    """The same run with the teacher as it is before it grows: drawn from the recipe's seed, the same in every job.

    Raises:
        ValueError: teacher.* sizes that do not fit together.
    """
    r = run.recipe
    seed_everything(r.seed, 0, r.run.deterministic)
    model = to_timm(new_teacher_of(r.teacher, run.labels).classifier).requires_grad_(False)
    preprocessing = trained_preprocessing(r.teacher)
    return run.with_teacher(Teacher(model, preprocessing, "being grown", run.labels, len(run.labels)))


def new_teacher_of(t: TeacherConfig, labels: list[str]) -> TransformersTeacher:
    """The teacher of teacher.* sizes with random weights, from torch's generator."""
    return new_teacher(
        image_size=t.trained_size,
        patch_size=t.patch_size,
        width=t.width,
        depth=t.depth,
        heads=t.heads,
        mlp_dim=t.mlp_dim,
        labels=labels,
        preprocessing=trained_preprocessing(t),
    )


def planned_teacher(t: TeacherConfig, labels: list[str]) -> Teacher:
    """A stand-in, without weights, for the teacher that phase teacher is going to train."""
    if t.trained_size % t.patch_size or t.width % t.heads:
        raise ValueError(
            f"teacher.image_size {t.trained_size} must be a multiple of teacher.patch_size {t.patch_size}, "
            f"and teacher.width {t.width} of teacher.heads {t.heads}"
        )
    with torch.device("meta"):
        model = VisionTransformer(
            img_size=t.trained_size,
            patch_size=t.patch_size,
            embed_dim=t.width,
            depth=t.depth,
            num_heads=t.heads,
            mlp_ratio=t.mlp_dim / t.width,
            num_classes=len(labels),
        )
    return Teacher(model, trained_preprocessing(t), "to be trained", labels, len(labels))


def trained_preprocessing(t: TeacherConfig) -> Preprocessing:
    """What a teacher of phase teacher sees: the statistics of google/vit-*; any fixed pair serves."""
    return Preprocessing(t.trained_size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
