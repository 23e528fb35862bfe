"""What the objectives share: the form of a step, and the losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Step = tuple[Tensor, dict[str, Tensor]]


class Objective:
    """One kind of training step.

    `objective(forward, images, target)` returns a Step (loss, parts): `forward` is the engine in a run and the bare
    `objective.module` in a unit test, so that losses are tested without DeepSpeed. `target` is a class index (B,) or,
    with mixup, a distribution (B, C). `parts` are detached losses for the log. `predict(images)` gives the logits
    (B, C) that are evaluated. The loop moves `module` (trained) and `frozen` to the device.
    """

    progress = 0.0  # share of the phase's steps that are done; the loop sets it before every step


def soft_kl(wanted: Tensor, logits: Tensor, tau: float = 1.0) -> Tensor:
    """tau^2 KL(softmax(wanted / tau) || softmax(logits / tau)), mean over the batch (Hinton et al. 2015)."""
    p, q = F.log_softmax(wanted.float() / tau, -1), F.log_softmax(logits.float() / tau, -1)
    return tau * tau * F.kl_div(q, p, log_target=True, reduction="batchmean")


def relative_mse(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 / |b|^2 over the batch; 0 when equal, 1 when a is 0."""
    a, b = a.float(), b.float()
    return (a - b).square().sum() / b.square().sum().clamp_min(1e-12)


def smoothing(target: Tensor, label_smoothing: float) -> float:
    """What is left to smooth: targets of mixup (B, C) carry their own."""
    return label_smoothing if target.ndim == 1 else 0.0
