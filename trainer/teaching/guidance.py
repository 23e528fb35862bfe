"""The teacher's routers of a run (models/experts/guided_routing.py), made before a phase guided by them trains."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.experts.guided_routing import Guide, TeacherRouters, matching_blocks, teacher_routers, teacher_routers_flops
from trainer.config.load import module_depths
from trainer.context import Run
from trainer.data.loader import eval_batches
from trainer.distributed.interrupt import HEARTBEAT

IMAGES = 1000  # of the training set, spread evenly over it


def module_guide(run: Run, student: nn.Module, stage: nn.Module) -> tuple[Guide | None, int]:
    """What guides the routers of a student module beside `stage` of the teacher, and the FLOPs of making it.

    None where distill.routing_weight is 0. Raises ValueError as routers_of.
    """
    if not (weight := run.recipe.distill.routing_weight):
        return None, 0
    routers, flops = routers_of(run, student)
    return Guide(routers, stage, student, weight), flops


def routers_of(run: Run, student: nn.Module) -> tuple[TeacherRouters, int]:
    """Routers for the MoE blocks of a student module or of the whole student, and the FLOPs it took to make them.

    Every rank makes the same ones by itself, with the clusters numbered like the experts of the student as it is.
    Ask before the student is made expert parallel.

    Raises:
        ValueError: the student has no MoE block, or too few different tokens for its experts.
    """
    stage = getattr(student, "stage", student)
    config, device = stage.config, run.dist.device
    depths = module_depths(run.recipe.student.depths, config.depth, run.recipe.modules, "student")
    teacher, entry = run.teacher.model.eval().to(device), None
    if start := getattr(stage, "start", 0):  # this module takes what the teacher's modules before it put out
        before = list(itertools.accumulate(depths)).index(start) + 1
        entry = sum(run.teacher_depths[:before]) - 1
    whole = not any(parameter.is_meta for parameter in student.parameters())  # else other ranks hold some experts
    if whole:
        student.to(device)
    sources = matching_blocks(student, depths, run.teacher_depths)
    images = _images(run, next(teacher.parameters()).dtype)
    routers = teacher_routers(teacher, student, images, sources, config.moe.num_experts, run.recipe.seed, entry)
    for model in (teacher, student) if whole else (teacher,):
        model.cpu()  # where phases keep what they do not train yet
    count = min(IMAGES, len(run.data.train))
    return routers, teacher_routers_flops(teacher, student, routers, count, run.tokens)


def _images(run: Run, dtype: torch.dtype) -> Iterator[Tensor]:
    """Batches of training images as in evaluation, the same on every rank."""
    data, batch = run.data, run.recipe.run.eval_batch or 32
    for found in eval_batches(data.train.spread(IMAGES), data.preprocessing, batch=batch, workers=data.workers):
        HEARTBEAT.beat()
        if bool(found.mask.any()):
            yield found.images[found.mask].to(run.dist.device, dtype)
