"""Teachers before they are what the run will work with: to be trained, to be grown, to be given a head (phase probe).

One that is grown inside the meta model (teacher.grown) is as in Deep Incubation (arXiv 2212.04129); its phases: meta
(labels, from scratch), incubate 0..N-1 (independent of each other), assemble.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer

from models.modules.stages import shallow_copy
from models.preprocessing import Preprocessing
from models.teacher.classes import with_probe
from models.teacher.convert import to_timm
from models.teacher.load import Teacher, TransformersTeacher, new_teacher
from trainer.config.phases import TeacherConfig
from trainer.context import Run
from trainer.distributed.ranks import seed_everything
from trainer.heads import blank_probe
from trainer.request.graph import may_be_probed


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
        image_size=t.image_size,
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
    if t.image_size % t.patch_size or t.width % t.heads:
        raise ValueError(
            f"teacher.image_size {t.image_size} must be a multiple of teacher.patch_size {t.patch_size}, "
            f"and teacher.width {t.width} of teacher.heads {t.heads}"
        )
    with torch.device("meta"):
        model = VisionTransformer(
            img_size=t.image_size,
            patch_size=t.patch_size,
            embed_dim=t.width,
            depth=t.depth,
            num_heads=t.heads,
            mlp_ratio=t.mlp_dim / t.width,
            num_classes=len(labels),
        )
    return Teacher(model, trained_preprocessing(t), "to be trained", labels, len(labels))


def before_the_probe(run: Run) -> Run:
    """The same run with its teacher as it will be once phase probe has fitted its head, if that is still to come.

    Raises:
        ValueError: what Run.head_of raises.
    """
    if not may_be_probed(run.recipe) or (run.out / "probe" / "result.json").is_file():
        return run
    checkpoint = run.checkpoint
    head = run.head_of(checkpoint)
    if head.kind != "probe":
        return run
    # its parts are those of the checkpoint, which stays as it is
    planned = with_probe(
        replace(checkpoint, model=shallow_copy(checkpoint.model)),
        *blank_probe(checkpoint, len(run.labels)),
        run.labels,
    )
    planned.classes_note = f"phase probe fits a head of the data's {len(run.labels)} classes ({head.why})"
    return run.with_teacher(planned)


def trained_preprocessing(t: TeacherConfig) -> Preprocessing:
    """What a teacher of phase teacher sees: the statistics of google/vit-*; any fixed pair serves."""
    return Preprocessing(t.image_size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
