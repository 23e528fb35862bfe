"""Training a detector: the losses of RF-DETR on matched objects, and the balance losses of a backbone with experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.detection.detector import Detections, Detector, Target, sizes_of
from models.moe.out import Out, auxiliary_loss
from trainer.objectives.base import Forward, Objective, Step
from trainer.objectives.cost import Pass, forward_only, trained


class Detect(Objective):
    """loss = class + box + GIoU (+ mask + dice) terms of every decoder layer and of the proposals + balance losses.

    Args:
        patches: of the mean image, which its cost is counted for.
        freeze: train the heads alone; the backbone stands beside them.
        most_patches: of the largest image, which memory is planned for.
    """

    def __init__(self, detector: Detector, patches: int, freeze: bool = False, most_patches: int = 0):
        self.detector = detector
        self.patches = patches
        self.tokens = patches + detector.backbone.vit.num_prefix_tokens
        self.most_tokens = most_patches + detector.backbone.vit.num_prefix_tokens
        self.most_numbers = 3 * most_patches * detector.backbone.patch_size**2
        self.module = detector.heads if freeze else detector
        self.frozen = [detector.backbone] if freeze else []

    def step(
        self, forward: Forward, images: Sequence[Tensor], target: Sequence[Target], progress: float, out: Out
    ) -> Step:
        """See Objective.__call__; parts: class, box, giou, with masks mask and dice, and balance.

        Args:
            images: (C, H, W) each, of any sizes.
            target: the objects of each.
        """
        if self.frozen:
            with torch.no_grad():
                maps = self.detector.backbone(images)
            return forward(maps, sizes_of(images), target)
        loss, parts = forward(images, target, out)
        balance = auxiliary_loss(out)
        return loss + balance.to(loss.device), parts | {"balance": balance.detach()}

    def predict(self, images: Tensor, out: Out | None = None) -> Tensor:
        """A detector has no logits of whole images: trainer/evaluation/detection.py asks detect()."""
        raise NotImplementedError("Detect is evaluated by its objects")

    def detect(self, picture: Tensor, original: tuple[int, int], out: Out | None = None) -> Detections:
        """See Detector.detect_picture."""
        return self.detector.detect_picture(picture, original, out)

    def passes(self) -> list[Pass]:
        """Backbone and heads."""
        heads = Pass(self.detector.heads, relays=True, learns=True, tokens=self.patches)
        if self.frozen:
            return [*forward_only(self.detector.backbone), heads]
        return [*trained(self.detector.backbone), heads]
