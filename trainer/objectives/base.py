"""What the objectives share: the form of a step, and the losses."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.moe.out import Out
from trainer.objectives.cost import Pass, flops_per_image

Step = tuple[Tensor, dict[str, Tensor]]
Pairs = dict[str, tuple[Tensor, Tensor]]  # ending of a metric's name -> (state, the teacher's), each (B, T, D)
Forward = Callable[..., Any]  # the engine in a run, the bare module in a unit test
Told = dict[str, Tensor]  # what the frozen side tells a step, by name


class Objective(ABC):
    """One kind of training step; the loop moves `module` (trained) and `frozen` to the device.

    A subclass says what a step is (`step`), what is evaluated (`predict`) and what a step passes through (`passes`).

    Attributes:
        module: all that is trained.
        frozen: what runs beside it.
        tokens: length of the token sequence T, which the cost depends on.
        most_tokens: the same of the largest image; 0 = all are of one size.
        most_numbers: pixels of the largest image, all channels; 0 = all are of one size.
        classifies: whether `predict` gives logits, which are evaluated; else it is evaluated by `compare`.
    """

    module: nn.Module
    frozen: list[nn.Module]
    tokens: int
    most_tokens: int = 0
    most_numbers: int = 0
    classifies: bool = True

    def __call__(
        self, forward: Forward, images: Tensor, target: Tensor, progress: float = 0.0, out: Out | None = None
    ) -> Step:
        """Loss, and its detached parts for the log, of one micro-batch.

        Args:
            forward: the engine in a run and the bare `module` in a unit test, so that losses are tested without
                DeepSpeed.
            images: (B, C, H, W).
            target: class index (B,) or, with mixup, a distribution (B, classes).
            progress: share of the phase's steps that are done, 0..1.
            out: takes what the forward of `module` tells of its routing, by names inside `module` (models/moe/out.py).
        """
        if out is None:
            out = {}
        return self.step(forward, images, target, progress, out)

    @abstractmethod
    def step(self, forward: Forward, images: Tensor, target: Tensor, progress: float, out: Out) -> Step:
        """What a subclass does when it is called."""

    @abstractmethod
    def predict(self, images: Tensor, out: Out | None = None) -> Tensor:
        """Logits (B, classes) that are evaluated, or without classes final tokens (B, T, D); `out` as in a step."""

    def compare(self, images: Tensor, out: Out | None = None) -> Pairs:
        """Without classes: what is evaluated beside the teacher's; see border_pairs for the names.

        Raises:
            NotImplementedError: an objective that knows classes only, which evaluation judges by its logits.
        """
        raise NotImplementedError(f"{type(self).__name__} is evaluated by its logits")

    @abstractmethod
    def passes(self) -> list[Pass]:
        """What one image passes through in a step."""

    @functools.cached_property
    def flops_per_image(self) -> int:
        """FLOPs of one image in a step, backward included; the same before and after `module` is expert parallel."""
        return flops_per_image(self.passes(), self.tokens)


class Taught(Objective):
    """An objective whose frozen side is run apart, so that what it tells can be kept on disk (trainer/loop/lessons.py).

    A subclass says what the frozen side tells (`tell`) and how that is learned (`learn`).

    Attributes:
        told_share: share of the steps in which the frozen side runs; in the others what it told is read.
    """

    told_share: float = 1.0

    def step(self, forward: Forward, images: Tensor, target: Tensor, progress: float, out: Out) -> Step:
        """Both in one."""
        return self.learn(forward, images, target, self.tell(images), progress, out)

    @abstractmethod
    def tell(self, images: Tensor) -> Told:
        """What the frozen side tells of these images, without gradients; training changes nothing of it."""

    @abstractmethod
    def learn(self, forward: Forward, images: Tensor, target: Tensor, told: Told, progress: float, out: Out) -> Step:
        """The step, given what the frozen side told of the very same images; see Objective.__call__."""


def soft_kl(teacher_logits: Tensor, logits: Tensor, tau: float = 1.0) -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(logits / tau)), mean over the batch (Hinton et al. 2015)."""
    log_p = F.log_softmax(teacher_logits.float() / tau, -1)
    log_q = F.log_softmax(logits.float() / tau, -1)
    # sum over classes of p (log p - log q), over the number of images
    return tau * tau * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def relative_mse(state: Tensor, reference: Tensor) -> Tensor:
    """|a - b|^2 / |b|^2 over the batch, b the reference; 0 when equal, 1 when a is 0."""
    state = state.float()
    reference = reference.float()
    return (state - reference).square().sum() / reference.square().sum().clamp_min(1e-12)


def border_pairs(states: Sequence[Tensor], references: Sequence[Tensor]) -> Pairs:
    """Two chains of modules border by border: "/0", "/1", ...; the last one, the final tokens, also as ""."""
    pairs = {f"/{i}": pair for i, pair in enumerate(zip(states, references, strict=True))}
    return {"": (states[-1], references[-1])} | pairs


def label_loss(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy with the labels, mean over the batch; targets of mixup (B, C) carry their own smoothing.

    Args:
        logits: (B, C) in float32.
    """
    if target.ndim != 1:
        label_smoothing = 0.0
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
