"""What a phase will come to, before it trains: steps on its ranks, images and FLOPs (the dry run asks every phase)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.preprocessing import Preprocessing
from trainer.context import Run
from trainer.loop.fit import epoch_length

FEW_STEPS = 10  # an epoch: with fewer a schedule of epochs learns little, whatever it learns from


@dataclass(frozen=True)
class Cost:
    """Of one result, from its start."""

    images: float  # passed through it in training
    flops: float


Known = Mapping[str, Cost]  # of the results before, by name


@dataclass(frozen=True)
class Rehearsed:
    """What a phase found when it built everything it needs without training it.

    Attributes:
        text: for people.
        costs: of every result it would make, by name.
        parameters: of the largest model in it that checkpoints would hold; 0 = not more than what is known already.
        apart: parameters of all models that are trained side by side, each with checkpoints of its own.
        files: bytes of what it keeps beside weights.
        problem: why it cannot be trained on these images after all; empty = it can.
    """

    text: str
    costs: dict[str, Cost] = field(default_factory=dict)
    parameters: int = 0
    apart: int = 0
    files: int = 0
    problem: str = ""


def of_training(
    run: Run, section: str, artifact: str, flops_per_image: float, *, images: int = 0, extra_flops: float = 0
) -> Rehearsed:
    """What training by a section of the recipe comes to.

    Images that are fewer than a global batch are a problem; the cost is then that of each of them once an epoch, as it
    would be with a smaller batch.

    Args:
        images: an epoch's; 0 = the training images.
        extra_flops: beside those per image.
    """
    schedule, settings = getattr(run.recipe, section), run.settings(section)
    problem = ""
    if images:
        steps_per_epoch = images // settings.global_batch
    else:
        try:
            steps_per_epoch = epoch_length(run.data_for(None), settings)
        except ValueError as error:
            steps_per_epoch = 0
            problem = str(error)
    steps = schedule.epochs * steps_per_epoch
    passed = float(steps * settings.global_batch)
    if problem:
        passed = float(schedule.epochs * len(run.sources[0]))
    few = few_steps(section, images or len(run.sources[0]), settings.global_batch)
    text = (
        f"{steps:,} steps of {settings.global_batch} images on {run.dist.world} ranks (micro-batch "
        f"{settings.micro_batch} x {settings.accumulation}, ep {settings.ep_size})"
    )
    if few:
        text += f" ({few})"
    return Rehearsed(text, {artifact: Cost(passed, passed * flops_per_image + extra_flops)}, problem=problem)


def few_steps(section: str, images: int, global_batch: int) -> str:
    """What to change where an epoch of few images has hardly any step; empty where there is nothing to say.

    Args:
        section: of the recipe, whose batch it is.
        images: of an epoch.
    """
    steps = images // global_batch
    if steps >= FEW_STEPS:
        return ""
    smaller = global_batch
    while smaller > 1 and images // smaller < FEW_STEPS:
        smaller //= 2
    count = "1 step" if steps == 1 else f"{steps} steps"
    return (
        f"{count} an epoch of {images:,} images, which is little: {section}.global_batch={smaller} makes "
        f"{images // smaller}, or raise {section}.epochs"
    )


def blank_images(run: Run, preprocessing: Preprocessing | None = None) -> Tensor:
    """The smallest batch a student takes, (B, C, H, W) of zeros, for the teacher's preprocessing or another."""
    wanted = preprocessing or run.teacher.preprocessing
    images = max(1, run.recipe.student.moe.images_per_group)
    return torch.zeros(images, wanted.in_chans, wanted.image_size, wanted.image_size)
