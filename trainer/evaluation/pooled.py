"""What pooled features tell of classes, without a head: k-NN and linear-probe accuracy. Where images have labels.

N images, F features of each, C classes, V validation images.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.base import ImageSource
from trainer.data.loader import Data, eval_batches
from trainer.distributed.interrupt import HEARTBEAT
from trainer.distributed.ranks import Dist
from trainer.evaluation.accuracy import together_in
from trainer.evaluation.linear import fit_linear

log = logging.getLogger(__name__)
TRAIN_IMAGES = 50_000  # of the training set, spread evenly over it: what neighbours and probe are taken from
# DINO (Caron et al. 2021, arXiv 2104.14294), section 4.1 and its eval_knn.py: k, and the temperature of the votes
NEIGHBOURS = 20
TEMPERATURE = 0.07
AT_ONCE = 1024  # validation images whose neighbours are looked for at once


def class_accuracies(
    model: nn.Module, what: str, data: Data, dtype: torch.dtype, batch: int, dist: Dist, *, seed: int
) -> dict[str, float]:
    """knn_accuracy and probe_accuracy of a model's pooled features on the validation images (collective).

    Args:
        model: a timm vision transformer, or one that behaves like it, on the device and in `dtype`.
        what: it is, in messages.
        batch: images per rank and forward.

    Raises:
        ValueError: on all ranks, features that are not finite.
    """
    model.eval()
    train_NF, train_labels = pooled_features(model, data.train.spread(TRAIN_IMAGES), data, dtype, batch, dist)
    val_VF, val_labels = pooled_features(model, data.val, data, dtype, batch, dist)
    broken = sum(int((~torch.isfinite(features).all(1)).sum()) for features in (train_NF, val_VF))
    if broken:
        images = len(train_NF) + len(val_VF)
        raise ValueError(
            f"the features of {what} are not finite on {broken} of {images} images: check its weights, or work in fp32"
        )
    accuracies = {}
    if len(train_NF) < NEIGHBOURS and dist.main:
        log.warning("k-NN accuracy is that of %d neighbours: there are no more training images", len(train_NF))
    predicted = nearest_classes(train_NF, train_labels, val_VF, data.num_classes)
    accuracies["knn_accuracy"] = _share(predicted == val_labels)
    try:
        fit = fit_linear(train_NF, train_labels, data.num_classes, seed=seed)
    except ValueError as error:
        if dist.main:
            log.warning("no linear probe of %s: %s", what, error)
        return accuracies
    predicted = F.linear(val_VF, fit.weight, fit.bias).argmax(1)
    return accuracies | {"probe_accuracy": _share(predicted == val_labels)}


def pooled_features(
    model: nn.Module, source: ImageSource, data: Data, dtype: torch.dtype, batch: int, dist: Dist
) -> tuple[Tensor, Tensor]:
    """Pooled features (N, F) float32 of every image that can be read, and its label (N,); on every rank (collective).

    What a head would read; the mean of the patch tokens where the model does not pool. Without augmentation.
    """
    group = together_in([model])
    batches = eval_batches(
        source,
        data.preprocessing,
        batch=-(-batch // group) * group,
        world=dist.world,
        rank=dist.rank,
        workers=data.workers,
        group=group,
    )
    numbers, parts = [], []
    with torch.no_grad():
        for padded in batches:
            HEARTBEAT.beat()
            b = padded.without_padding()
            features = pooled(model, b.images.to(dist.device, dtype))
            parts.append(features.float().cpu().numpy()[b.mask.numpy()])
            numbers.append(b.index[b.mask].numpy())
    gathered = dist.gather((np.concatenate(numbers), np.concatenate(parts)))
    index = np.concatenate([numbers for numbers, _ in gathered])
    features = np.concatenate([parts for _, parts in gathered])
    order = np.argsort(index, kind="stable")
    labels = source.targets[index[order]]
    return torch.from_numpy(features[order]).to(dist.device), torch.from_numpy(labels).to(dist.device)


def nearest_classes(train_NF: Tensor, labels: Tensor, val_VF: Tensor, num_classes: int) -> Tensor:
    """The class (V,) that the nearest training images vote for, each with exp(cosine / TEMPERATURE).

    Args:
        labels: (N,) of the training images.
    """
    train_NF = F.normalize(train_NF, dim=1)
    predicted = []
    for part_VF in F.normalize(val_VF, dim=1).split(AT_ONCE):
        HEARTBEAT.beat()
        cosine_Vk, neighbour_Vk = (part_VF @ train_NF.T).topk(min(NEIGHBOURS, len(train_NF)), dim=1)
        votes_VC = part_VF.new_zeros(len(part_VF), num_classes)
        votes_VC.scatter_add_(1, labels[neighbour_Vk], (cosine_Vk / TEMPERATURE).exp())
        predicted.append(votes_VC.argmax(1))
    return torch.cat(predicted)


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    """What a head would read of images (B, C, H, W): (B, F); the mean of the patch tokens where nothing is pooled."""
    x = model.forward_head(model.forward_features(images), pre_logits=True)
    if x.ndim == 3:  # a model that does not pool
        x = x[:, model.num_prefix_tokens :].mean(1)
    return x


def _share(right: Tensor) -> float:
    return float(right.double().mean())
