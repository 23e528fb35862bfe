"""What evaluation leaves for the report: accuracy per class, confusions, and which expert took which patch.

Plain numbers, names and small PNGs (analysis.json in the evaluate artifact), so that the report needs neither torch nor
the data. Its size depends on the number of classes, layers and patches, not on the number of images.
B images of a batch, T tokens of an image, K experts chosen per token, best first.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.modules.tokens import grid_size
from models.moe.layer import routed_layers
from models.moe.out import Out, routings
from models.moe.routing import Routing
from models.preprocessing import Preprocessing
from trainer.data.base import ImageSource
from trainer.data.loader import Batch
from trainer.distributed.ranks import Dist
from trainer.evaluation.routing import Choices, per_image

PICTURES = 8  # validation images whose routing is drawn, spread evenly over the split
PICTURE_SIDE = 160  # pixels, at most
MATRIX_CLASSES = 50  # up to here the whole confusion matrix is kept
TOP_CONFUSIONS = 50  # always kept: the most frequent pairs of (true, predicted)


class Analysis:
    """Watches one evaluation of a student: `observe` every batch of this rank, then `summary` on all ranks.

    Args:
        student: the plain model.
        source: the validation images.
        preprocessing: how the images were normalised, to turn them back into pictures.
        classifies: whether it tells classes; else nothing is said of any.
    """

    def __init__(
        self,
        student: nn.Module,
        source: ImageSource,
        preprocessing: Preprocessing,
        dist: Dist,
        *,
        classifies: bool = True,
    ) -> None:
        self.student = student
        self.classifies = classifies
        self.source = source
        self.preprocessing = preprocessing
        self.dist = dist
        self.rows: list[np.ndarray] = []  # (images, 3) int64 each: index, label, predicted class
        num_experts = {name: layer.config.num_experts for name, layer in routed_layers(student).items()}
        self.choices = Choices(num_experts, dist.device)
        self.pictures: dict[int, dict[str, Any]] = {}
        self.drawn = {place * len(source) // PICTURES for place in range(PICTURES)}  # indices of images

    def observe(self, batch: Batch, logits: Tensor, out: Out) -> None:
        """Count one batch of this rank; logits (B, classes), or without classes final tokens (B, T, D)."""
        predicted = logits.argmax(-1).cpu() if self.classifies else torch.zeros_like(batch.labels)
        rows = torch.stack([batch.index, batch.labels, predicted], dim=1)[batch.mask]
        self.rows.append(rows.numpy())
        routed = routings(out)
        self.choices.add(batch.mask.to(logits.device), routed)
        for place, index in enumerate(batch.index.tolist()):
            if index in self.drawn:
                self.pictures[index] = self._picture(batch, place, logits[place], routed)

    def summary(self) -> dict[str, Any]:
        """Everything the report shows, complete on every rank (collective).

        Returns:
            images, skipped (unreadable ones), labels, classes (per class: images, correct, predicted, and what it is
            taken for most, -1 = nothing, how often), confusion (classes x classes, rows = truth; None above
            MATRIX_CLASSES), confusions ([truth, predicted, count], most frequent first), grid ([rows, columns] of
            patches), layers (per MoE layer, as from Choices.summary), pictures. Without classes none of what is said of
            them, nor of what a picture shows.
        """
        rows = np.concatenate(list(itertools.chain.from_iterable(self.dist.gather(self.rows))))
        index, truth, predicted = rows.T
        assert len(np.unique(index)) == len(index), "an image was counted twice"
        pictures: dict[int, dict[str, Any]] = {}
        for of_rank in self.dist.gather(self.pictures):
            pictures |= of_rank
        return {
            "images": len(index),
            "skipped": len(self.source) - len(index),
            **(_classes(truth, predicted, self.source.labels) if self.classifies else {}),
            "grid": list(grid_size(self.student)),
            "layers": self.choices.summary(self.dist),
            "pictures": [pictures[image] for image in sorted(pictures)],
        }

    def _picture(self, batch: Batch, place: int, logits: Tensor, routed: Mapping[str, Routing]) -> dict[str, Any]:
        """One validation image as the model saw it, its prediction, and per layer the expert of every patch."""
        experts = {}
        for name, routing in routed.items():
            expert_BTK, kept_BTK = per_image(routing, len(batch.mask))
            # of the patches alone
            expert_TK = expert_BTK[place, self.student.num_prefix_tokens :]
            kept_TK = kept_BTK[place, self.student.num_prefix_tokens :]
            first_T1 = kept_TK.int().argmax(-1, keepdim=True)  # the best choice that found a slot
            first_T = expert_TK.gather(1, first_T1).squeeze(1)
            experts[name] = torch.where(kept_TK.any(-1), first_T, -1).tolist()
        picture = {
            "index": int(batch.index[place]),
            "png": _png(batch.images[place], self.preprocessing),
            "experts": experts,
        }
        if not self.classifies:
            return picture
        confidence, predicted = logits.softmax(-1).max(-1)
        label = int(batch.labels[place])
        return picture | {"label": label, "predicted": int(predicted), "confidence": float(confidence)}


def _classes(truth: np.ndarray, predicted: np.ndarray, labels: list[str]) -> dict[str, Any]:
    """Counts per class, and the pairs that are confused most."""
    pairs, counts = np.unique(np.stack([truth, predicted], axis=1), axis=0, return_counts=True)
    right = pairs[:, 0] == pairs[:, 1]
    correct = np.zeros(len(labels), dtype=np.int64)
    correct[pairs[right, 0]] = counts[right]
    confused = []  # (how often, truth, predicted), most frequent first
    for (true, other), count in zip(pairs[~right], counts[~right]):
        confused.append((int(count), int(true), int(other)))
    confused.sort(reverse=True)
    taken_for = np.full(len(labels), -1)
    times = np.zeros(len(labels), dtype=np.int64)
    for count, true, other in reversed(confused):  # the most frequent one is written last
        taken_for[true] = other
        times[true] = count
    matrix = None
    if len(labels) <= MATRIX_CLASSES:
        counts_CC = np.zeros((len(labels), len(labels)), dtype=np.int64)
        counts_CC[pairs[:, 0], pairs[:, 1]] = counts
        matrix = counts_CC.tolist()
    return {
        "labels": list(labels),
        "classes": {
            "images": np.bincount(truth, minlength=len(labels)).tolist(),
            "correct": correct.tolist(),
            "predicted": np.bincount(predicted, minlength=len(labels)).tolist(),
            "taken_for": taken_for.tolist(),
            "taken_count": times.tolist(),
        },
        "confusion": matrix,
        "confusions": [[true, other, count] for count, true, other in confused[:TOP_CONFUSIONS]],
    }


def _png(image_CHW: Tensor, preprocessing: Preprocessing) -> str:
    """A normalised image as a base64 PNG of at most PICTURE_SIDE pixels; grey unless it has three channels."""
    mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    values = ((image_CHW * std + mean).clamp(0, 1) * 255).round()
    if len(values) != 3:
        values = values.mean(0, keepdim=True).expand(3, -1, -1)
    picture = Image.fromarray(values.permute(1, 2, 0).to(torch.uint8).numpy())
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    with io.BytesIO() as file:
        picture.save(file, "PNG", optimize=True)
        return base64.b64encode(file.getvalue()).decode()
