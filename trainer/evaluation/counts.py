"""What one evaluation counts, image by image, so that it is the same on any number of ranks and batches.

B images of a batch, T tokens, D width, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.distributed.ranks import Dist
from trainer.objectives import Pairs
from trainer.tracking.health import NonFiniteLoss


class Counts(ABC):
    """Sums over the images of this rank, then over all ranks; an image that is no number is counted apart."""

    def __init__(self, dist: Dist) -> None:
        self.dist = dist
        self.images = self._zeros(2)  # finite ones, all

    def metrics(self) -> dict[str, float]:
        """The metrics over all ranks (collective).

        Raises:
            NonFiniteLoss: on all ranks, no image has a finite output.
            ValueError: on all ranks, no image could be read.
        """
        *sums, finite, images = self.dist.sum(torch.cat([self._sums(), self.images])).tolist()
        if not images:
            raise ValueError("none of the validation images could be read: check data.path and data.val_split")
        if not finite:
            raise NonFiniteLoss(f"the model's output is not finite on any of the {int(images)} validation images")
        metrics = self._means(sums, finite, images) | {"images": int(images)}
        if finite < images:
            metrics["nonfinite_images"] = int(images - finite)
        return metrics

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=self.dist.device)

    @abstractmethod
    def _sums(self) -> Tensor:
        """Of this rank, in one row."""

    @abstractmethod
    def _means(self, sums: list[float], finite: float, images: float) -> dict[str, float]: ...


class Classified(Counts):
    """Accuracy and mean cross-entropy of logits; an image whose loss is not finite counts as wrong."""

    def __init__(self, dist: Dist) -> None:
        super().__init__(dist)
        self.sums = self._zeros(2)  # right ones, loss

    def add(self, logits: Tensor, labels: Tensor, mask: Tensor) -> None:
        """Count a batch: logits (B, C) in float32, labels (B,), mask (B,) False on what is no image."""
        loss = F.cross_entropy(logits, labels, reduction="none")
        finite = mask & torch.isfinite(loss)
        correct = (logits.argmax(-1) == labels) & finite
        self.sums += torch.stack([correct.sum(), loss[finite].sum()])
        self.images += torch.stack([finite.sum(), mask.sum()])

    def _sums(self) -> Tensor:
        return self.sums

    def _means(self, sums: list[float], finite: float, images: float) -> dict[str, float]:
        correct, loss = sums
        return {"accuracy": correct / images, "loss": loss / finite}


class Compared(Counts):
    """Relative error and cosine of states beside the teacher's; an image that is not finite is left out of both.

    relative error = sum over images of |a - b|^2 / sum over images of |b|^2, b the teacher's: 0 when equal, 1 for
    zeros. cosine = mean over images and tokens of the cosine of the two states of a token.
    """

    def __init__(self, dist: Dist) -> None:
        super().__init__(dist)
        self.sums: dict[str, Tensor] = {}  # per pair: |a - b|^2, |b|^2, cosine

    def add(self, pairs: Pairs, mask: Tensor) -> None:
        """Count a batch of pairs of states (B, T, D), the same names in every batch; mask (B,) False on no image."""
        of_images = {}
        finite = mask
        for name, (state_BTD, teacher_BTD) in pairs.items():
            state_BTD = state_BTD.float()
            teacher_BTD = teacher_BTD.float()
            error_B = (state_BTD - teacher_BTD).square().sum((1, 2))
            size_B = teacher_BTD.square().sum((1, 2))
            cosine_B = F.cosine_similarity(state_BTD, teacher_BTD, dim=-1).mean(1)
            of_images[name] = torch.stack([error_B, size_B, cosine_B]).double()
            finite = finite & torch.isfinite(of_images[name]).all(0)
        for name, values in of_images.items():
            self.sums[name] = self.sums.get(name, self._zeros(3)) + values[:, finite].sum(1)
        self.images += torch.stack([finite.sum(), mask.sum()])

    def _sums(self) -> Tensor:
        return torch.cat(list(self.sums.values()))

    def _means(self, sums: list[float], finite: float, images: float) -> dict[str, float]:
        metrics = {}
        for place, name in enumerate(self.sums):
            error, size, cosine = sums[3 * place : 3 * place + 3]
            metrics[f"relative_error{name}"] = error / max(size, 1e-12)
            metrics[f"cosine{name}"] = cosine / finite
        return metrics
