"""What evaluation leaves for the report: accuracy per class, confusions, and which expert took which patch.

Plain numbers, names and small PNGs (analysis.json in the evaluate artifact), so that the report needs neither torch nor
the data. Its size depends on the number of classes, layers and patches, not on the number of images.
B images of a batch, T tokens of an image, K experts chosen per token, best first.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.moe.layer import routed_layers
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
        student: the plain model; the routing of its last forward is read after every batch.
        source: the validation images.
        preprocessing: how the images were normalised, to turn them back into pictures.
    """

    def __init__(self, student: nn.Module, source: ImageSource, preprocessing: Preprocessing, dist: Dist) -> None:
        self.student, self.source, self.preprocessing, self.dist = student, source, preprocessing, dist
        self.layers = routed_layers(student)
        self.seen: list[np.ndarray] = []  # (images, 3) int64 each: index, label, predicted class
        self.choices = Choices(self.layers, dist.device)
        self.pictures: dict[int, dict[str, Any]] = {}
        self.wanted = {place * len(source) // PICTURES for place in range(PICTURES)}

    def observe(self, batch: Batch, logits: Tensor) -> None:
        """Count one batch of this rank; logits (B, classes)."""
        predicted = logits.argmax(-1).cpu()
        rows = torch.stack([batch.index, batch.labels, predicted], dim=1)[batch.mask]
        self.seen.append(rows.numpy())
        self.choices.add(batch.mask.to(logits.device))
        for place, index in enumerate(batch.index.tolist()):
            if index in self.wanted:
                self.pictures[index] = self._picture(batch, place, logits[place])

    def summary(self) -> dict[str, Any]:
        """Everything the report shows, complete on every rank (collective).

        Returns:
            images, skipped (unreadable ones), labels, classes (per class: images, correct, predicted, and what it is
            taken for most, -1 = nothing, how often), confusion (classes x classes, rows = truth; None above
            MATRIX_CLASSES), confusions ([truth, predicted, count], most frequent first), grid ([rows, columns] of
            patches), layers (per MoE layer, as from Choices.summary), pictures.
        """
        seen = np.concatenate([rows for rank in self.dist.gather(self.seen) for rows in rank])
        assert len(np.unique(seen[:, 0])) == len(seen), "an image was counted twice"
        pictures = {index: picture for rank in self.dist.gather(self.pictures) for index, picture in rank.items()}
        return {
            "images": len(seen),
            "skipped": len(self.source) - len(seen),
            **_classes(seen[:, 1], seen[:, 2], self.source.labels),
            "grid": list(self.student.patch_embed.grid_size),
            "layers": self.choices.summary(self.dist),
            "pictures": [pictures[index] for index in sorted(pictures)],
        }

    def _picture(self, batch: Batch, place: int, logits: Tensor) -> dict[str, Any]:
        """One validation image as the model saw it, its prediction, and per layer the expert of every patch."""
        experts = {}
        for name, layer in self.layers.items():
            expert_BTK, kept_BTK = per_image(layer.routing, len(batch.mask))
            expert_TK, kept_TK = (x[place, self.student.num_prefix_tokens :] for x in (expert_BTK, kept_BTK))
            first_T1 = kept_TK.int().argmax(-1, keepdim=True)  # the best choice that found a slot
            first_T = expert_TK.gather(1, first_T1).squeeze(1)
            experts[name] = torch.where(kept_TK.any(-1), first_T, -1).tolist()
        confidence, predicted = logits.softmax(-1).max(-1)
        return {
            "index": int(batch.index[place]),
            "label": int(batch.labels[place]),
            "predicted": int(predicted),
            "confidence": float(confidence),
            "png": _png(batch.images[place], self.preprocessing),
            "experts": experts,
        }


def _classes(truth: np.ndarray, predicted: np.ndarray, labels: list[str]) -> dict[str, Any]:
    """Counts per class, and the pairs that are confused most."""
    pairs, counts = np.unique(np.stack([truth, predicted], axis=1), axis=0, return_counts=True)
    right = pairs[:, 0] == pairs[:, 1]
    correct = np.zeros(len(labels), dtype=np.int64)
    correct[pairs[right, 0]] = counts[right]
    wrong = sorted(((int(n), int(t), int(p)) for (t, p), n in zip(pairs[~right], counts[~right])), reverse=True)
    taken_for, times = np.full(len(labels), -1), np.zeros(len(labels), dtype=np.int64)
    for count, true, other in reversed(wrong):  # the most frequent one is written last
        taken_for[true], times[true] = other, count
    matrix = None
    if len(labels) <= MATRIX_CLASSES:
        matrix = np.zeros((len(labels), len(labels)), dtype=np.int64)
        matrix[pairs[:, 0], pairs[:, 1]] = counts
    return {
        "labels": list(labels),
        "classes": {
            "images": np.bincount(truth, minlength=len(labels)).tolist(),
            "correct": correct.tolist(),
            "predicted": np.bincount(predicted, minlength=len(labels)).tolist(),
            "taken_for": taken_for.tolist(),
            "taken_count": times.tolist(),
        },
        "confusion": None if matrix is None else matrix.tolist(),
        "confusions": [[t, p, n] for n, t, p in wrong[:TOP_CONFUSIONS]],
    }


def _png(image_CHW: Tensor, preprocessing: Preprocessing) -> str:
    """A normalised image as a base64 PNG of at most PICTURE_SIDE pixels; grey unless it has three channels."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    values = ((image_CHW * std + mean).clamp(0, 1) * 255).round()
    if len(values) != 3:
        values = values.mean(0, keepdim=True).expand(3, -1, -1)
    picture = Image.fromarray(values.permute(1, 2, 0).to(torch.uint8).numpy())
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    with io.BytesIO() as file:
        picture.save(file, "PNG", optimize=True)
        return base64.b64encode(file.getvalue()).decode()
