"""The teacher's routers of a run (models/experts/guided_routing.py), made before a phase guided by them trains."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from models.experts.guided_routing import Guide, TeacherRouters, matching_blocks, teacher_routers, teacher_routers_flops
from models.modules.stages import split
from models.modules.stitch import StudentModule
from trainer.config.load import module_depths
from trainer.context import Run
from trainer.data.loader import eval_batches
from trainer.distributed.interrupt import HEARTBEAT

IMAGES = 1000  # of the training set, spread evenly over it


def module_guide(run: Run, student: nn.Module, stage: nn.Module) -> tuple[Guide | None, int]:
    """What guides the routers of a student module beside `stage` of the teacher, and the FLOPs of making it.

    None where distill.routing_weight is 0. Raises ValueError as routers_of.
    """
    weight = run.recipe.distill.routing_weight
    if not weight:
        return None, 0
    routers, flops = routers_of(run, student)
    return Guide(routers, stage, weight), flops


def routers_of(run: Run, student: nn.Module) -> tuple[TeacherRouters, int]:
    """Routers for the MoE blocks of a student module or of the whole student, and the FLOPs it took to make them.

    Every rank makes the same ones by itself, with the clusters numbered like the experts of the student as it is.
    Ask before the student is made expert parallel.

    Raises:
        ValueError: the student has no MoE block, or too few different tokens for its experts.
    """
    config = student.stage.config if isinstance(student, StudentModule) else student.config
    device = run.dist.device
    teacher = run.teacher.model.eval().to(device)
    depths = module_depths(run.recipe.student.depths, config.depth, run.recipe.modules, "student")
    sources = matching_blocks(student, depths, run.teacher_depths)
    runs_here = not any(parameter.is_meta for parameter in student.parameters())  # else other ranks hold some experts
    if runs_here:
        student.to(device)
    images = _images(run, next(teacher.parameters()).dtype)
    whole_teacher = split(teacher, [len(teacher.blocks)])[0]
    entry = _entry(run, student, depths)
    routers = teacher_routers(whole_teacher, student, images, sources, config.moe.num_experts, run.recipe.seed, entry)
    # where phases keep what they do not train yet
    teacher.cpu()
    if runs_here:
        student.cpu()
    count = min(IMAGES, len(run.data.train))
    return routers, teacher_routers_flops(teacher, student, routers, count, run.tokens)


def _entry(run: Run, student: nn.Module, depths: Sequence[int]) -> int | None:
    """The teacher's block whose output a student module takes; None where it takes the images, as a whole one does."""
    start = student.stage.start if isinstance(student, StudentModule) else 0
    if not start:
        return None
    modules_before = list(itertools.accumulate(depths)).index(start) + 1
    return sum(run.teacher_depths[:modules_before]) - 1


def _images(run: Run, dtype: torch.dtype) -> Iterator[Tensor]:
    """Batches of training images as in evaluation, the same on every rank."""
    data = run.data
    batch_size = run.recipe.run.eval_batch or 32
    for batch in eval_batches(data.train.spread(IMAGES), data.preprocessing, batch=batch_size, workers=data.workers):
        HEARTBEAT.beat()
        if bool(batch.mask.any()):
            yield batch.images[batch.mask].to(run.dist.device, dtype)
