"""A linear classifier on features: multinomial logistic regression, its regularisation chosen by cross-validation.

N images, F features of each, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# lambda of: mean cross-entropy + lambda / 2 * |weight|^2, on features of mean 0 and deviation 1; scikit-learn's C is
# 1 / (lambda N). Tried from the strongest on, each fit starting from the last
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
FOLDS = 5  # of cross-validation: a fifth of every class's images is held out at a time
ALL_FOLDS = 50_000  # images at most for which every fold is held out in turn; of more, the first fold says enough
ITERATIONS = 300  # of L-BFGS for one strength, at most
LOGITS_AT_ONCE = 2**25  # 128 MiB in fp32: more images are gone through in parts
NO_SPREAD = 1e-6  # of the largest deviation: a feature that varies less than that is constant, but for rounding


@dataclass(frozen=True)
class LinearFit:
    """logits (N, C) = features (N, F) @ weight.T + bias, on the features as they were given."""

    weight: Tensor  # (C, F) float32
    bias: Tensor  # (C,) float32
    regularisation: float  # the lambda that was chosen
    held_out_accuracy: float  # 0..1, of held-out images by fits that had not seen them


def fit_linear(features: Tensor, labels: Tensor, num_classes: int, *, seed: int) -> LinearFit:
    """Multinomial logistic regression by L-BFGS on standardised features.

    The L2 strength is the one of STRENGTHS with the highest accuracy in stratified cross-validation with FOLDS folds
    drawn by `seed` (of more than ALL_FOLDS images the first fold alone is held out); of several, the one with the
    lowest cross-entropy. By cross-entropy alone the choice would be too weak where there are many classes, and on one
    fold of few images it would be drawn by the seed (both in docs/log.md). The classifier is then fitted on all images
    with it.
    The intercept is not regularised. The same features, labels and seed give the same classifier on the same kind of
    machine.

    Args:
        features: (N, F) float32; the fit runs where they are.
        labels: (N,) int64, 0..num_classes - 1; a class without images is never told.

    Raises:
        ValueError: features that are not finite, or no class has two images, so that none can be held out.
    """
    finite_N = torch.isfinite(features).all(dim=1)
    if not finite_N.all():
        raise ValueError(
            f"the features of {int((~finite_N).sum())} of {len(features)} images are not finite: they come from "
            "weights or images with numbers out of range; compute in fp32, or use other weights"
        )
    labels = labels.to(features.device)
    folds_N = _folds(labels, num_classes, seed)
    mean_F, deviation_F = _moments(features)
    standard_NF = (features - mean_F) / deviation_F
    chosen = _cross_validate(standard_NF, labels, folds_N, num_classes)
    start = standard_NF.new_zeros(num_classes, standard_NF.shape[1] + 1)  # weight, and the intercept behind it
    final = _fit(standard_NF, labels, chosen.strength, start)
    # (x - mean) / deviation @ W + b, as a classifier of x itself
    weight_CF = final[:, :-1] / deviation_F
    bias_C = final[:, -1] - weight_CF @ mean_F
    return LinearFit(weight_CF, bias_C, chosen.strength, chosen.accuracy)


@dataclass(frozen=True)
class _Choice:
    """A strength and what fits with it made of held-out images."""

    strength: float
    accuracy: float  # 0..1
    loss: float  # mean cross-entropy


def _cross_validate(features_NF: Tensor, labels: Tensor, folds_N: Tensor, num_classes: int) -> _Choice:
    """The strength with the highest accuracy on held-out images, then with the lowest loss."""
    held_out = [fold for fold in range(FOLDS) if (folds_N == fold).any()]
    if len(labels) > ALL_FOLDS:
        held_out = held_out[:1]
    losses = dict.fromkeys(STRENGTHS, 0.0)
    correct = dict.fromkeys(STRENGTHS, 0)
    images = 0
    for fold in held_out:
        held_N = folds_N == fold
        learned = features_NF[~held_N], labels[~held_N]
        held = features_NF[held_N], labels[held_N]
        images += len(held[1])
        parameters = features_NF.new_zeros(num_classes, features_NF.shape[1] + 1)
        for strength in STRENGTHS:
            parameters = _fit(*learned, strength, parameters)
            loss, right = _measure(*held, parameters)
            losses[strength] += loss
            correct[strength] += right
    choices = [_Choice(strength, correct[strength] / images, losses[strength] / images) for strength in STRENGTHS]
    return max(choices, key=lambda choice: (choice.accuracy, -choice.loss))


def _folds(labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """The fold of every image, (N,) int64: 0..FOLDS - 1, drawn by the seed; -1, never held out, for a class's only one.

    The images of a class are dealt to the folds in turn, and the next class goes on where it ended: the folds are of
    one size, and each leaves an image of every class to learn from.
    """
    labels_N = labels.cpu()
    several_N = torch.bincount(labels_N, minlength=num_classes)[labels_N] > 1
    if not several_N.any():
        raise ValueError(
            f"no class has two images ({len(labels_N)} images, {num_classes} classes), so none can be held out to "
            "choose the regularisation: give more images of each class"
        )
    order_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    by_class_N = order_N[torch.argsort(labels_N[order_N], stable=True)]
    dealt = by_class_N[several_N[by_class_N]]
    folds_N = torch.full_like(labels_N, -1)
    folds_N[dealt] = torch.arange(len(dealt)) % FOLDS
    return folds_N.to(labels.device)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every feature, (F,) each; the deviation of a constant one is 1."""
    deviation_F, mean_F = torch.std_mean(features, dim=0, correction=0)
    constant_F = deviation_F <= NO_SPREAD * deviation_F.max()
    return mean_F, torch.where(constant_F, 1.0, deviation_F)


def _fit(features_NF: Tensor, labels: Tensor, strength: float, start: Tensor) -> Tensor:
    """Parameters (C, F + 1) of the least regularised mean cross-entropy, from `start`."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        objective = strength / 2 * parameters[:, :-1].square().sum()
        objective.backward()
        objective = objective.detach()
        for part_NF, labels_part in _parts(features_NF, labels, len(start)):
            loss = F.cross_entropy(_logits(part_NF, parameters), labels_part, reduction="sum") / len(labels)
            loss.backward()
            objective += loss.detach()
        return objective

    with torch.enable_grad():
        optimizer.step(closure)
    return parameters.detach()


@torch.no_grad()
def _measure(features_NF: Tensor, labels: Tensor, parameters: Tensor) -> tuple[float, int]:
    """Cross-entropy, summed over the images, and how many of them are told right."""
    loss, correct = 0.0, 0
    for part_NF, labels_part in _parts(features_NF, labels, len(parameters)):
        logits_NC = _logits(part_NF, parameters)
        loss += float(F.cross_entropy(logits_NC, labels_part, reduction="sum"))
        correct += int((logits_NC.argmax(1) == labels_part).sum())
    return loss, correct


def _logits(features_NF: Tensor, parameters: Tensor) -> Tensor:
    return F.linear(features_NF, parameters[:, :-1], parameters[:, -1])


def _parts(features_NF: Tensor, labels: Tensor, num_classes: int) -> list[tuple[Tensor, Tensor]]:
    """The images in parts whose logits fit in memory at once."""
    images = max(1, LOGITS_AT_ONCE // num_classes)
    return list(zip(features_NF.split(images), labels.split(images)))
