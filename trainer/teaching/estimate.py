"""What a phase will come to, before it trains: steps on its ranks, images and FLOPs (the dry run asks every phase)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from models.moe.layer import routed_layers
from models.preprocessing import Preprocessing
from trainer.context import Run
from trainer.distributed.engine import working_type
from trainer.loop.fit import epoch_length
from trainer.objectives.base import Taught

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


def with_told(run: Run, section: str, objective: Taught, found: Rehearsed) -> Rehearsed:
    """The same, with what a section keeps on disk while it teaches: what the teacher told in its first epochs.

    Args:
        objective: before any training and without guides.
    """
    epochs = getattr(run.recipe, section).kept_epochs
    if not epochs:
        return found
    of_image = told_numbers(run, objective) * working_type(run.settings(section)).itemsize
    size = epochs * len(run.sources[0]) * of_image
    word = "epoch" if epochs == 1 else f"{epochs} epochs"
    text = f"{found.text}; what the teacher tells in the first {word} takes {size / 1e9:.3g} GB of disk while it trains"
    return replace(found, text=text, files=found.files + size)


@torch.no_grad()
def told_numbers(run: Run, objective: Taught) -> int:
    """Numbers that the teacher's side tells of an image.

    Args:
        objective: on the CPU or the meta device, before any training and without guides, whose targets of routers are
            counted beside it.
    """
    images = blank_images(run).to(next(objective.module.parameters()).device)
    told = {id(tensor): tensor for tensor in objective.tell(images).values()}  # names may share one
    numbers = sum(tensor.numel() for tensor in told.values()) // len(images)
    if run.recipe.distill.routing_weight:
        layers = routed_layers(objective.module).values()
        numbers += run.tokens * sum(layer.config.num_experts for layer in layers)
    return numbers


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
