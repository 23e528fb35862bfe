"""A linear classifier on features: multinomial logistic regression, its regularisation chosen on held-out images.

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
HELD_OUT = 0.2  # of the images of a class; at least one where it has two
ITERATIONS = 300  # of L-BFGS for one strength, at most
LOGITS_AT_ONCE = 2**25  # 128 MiB in fp32: more images are gone through in parts
NO_SPREAD = 1e-6  # of the largest deviation: a feature that varies less than that is constant, but for rounding


@dataclass(frozen=True)
class LinearFit:
    """logits (N, C) = features (N, F) @ weight.T + bias, on the features as they were given."""

    weight: Tensor  # (C, F) float32
    bias: Tensor  # (C,) float32
    regularisation: float  # the lambda that was chosen
    held_out_accuracy: float  # 0..1, of the fit that had not seen these images


def fit_linear(features: Tensor, labels: Tensor, num_classes: int, *, seed: int) -> LinearFit:
    """Multinomial logistic regression by L-BFGS on standardised features.

    The L2 strength is the one of STRENGTHS with the highest accuracy on a fifth of every class's images, which are held
    out (stratified, by `seed`); of several, the one with the lowest cross-entropy. By cross-entropy alone the choice
    would be too weak where there are many classes (docs/log.md). The classifier is then fitted on all images with it.
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
    held_N = _held_out(labels, num_classes, seed)
    mean_F, deviation_F = _moments(features)
    standard_NF = (features - mean_F) / deviation_F
    learned = standard_NF[~held_N], labels[~held_N]
    held = standard_NF[held_N], labels[held_N]
    parameters = standard_NF.new_zeros(num_classes, standard_NF.shape[1] + 1)  # weight, and the intercept behind it
    best = parameters
    regularisation = STRENGTHS[0]
    best_accuracy = -1.0
    best_loss = float("inf")
    for strength in STRENGTHS:
        parameters = _fit(*learned, strength, parameters)
        loss, accuracy = _measure(*held, parameters)
        if (accuracy, -loss) > (best_accuracy, -best_loss):
            best = parameters
            regularisation = strength
            best_accuracy = accuracy
            best_loss = loss
    del learned, held
    final = _fit(standard_NF, labels, regularisation, best)
    # (x - mean) / deviation @ W + b, as a classifier of x itself
    weight_CF = final[:, :-1] / deviation_F
    bias_C = final[:, -1] - weight_CF @ mean_F
    return LinearFit(weight_CF, bias_C, regularisation, best_accuracy)


def _held_out(labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """Which images are held out, (N,) bool: a fifth of each class, drawn by the seed; none of a class with one."""
    labels_N = labels.cpu()
    order_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    shuffled_N = labels_N[order_N]
    by_class_N = order_N[torch.argsort(shuffled_N, stable=True)]
    held_N = torch.zeros(len(labels_N), dtype=torch.bool)
    start = 0
    for count in torch.bincount(labels_N, minlength=num_classes).tolist():
        held = max(1, round(HELD_OUT * count)) if count > 1 else 0
        held_N[by_class_N[start : start + held]] = True
        start += count
    if not held_N.any():
        raise ValueError(
            f"no class has two images ({len(labels_N)} images, {num_classes} classes), so none can be held out to "
            "choose the regularisation: give more images of each class"
        )
    return held_N.to(labels.device)


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
def _measure(features_NF: Tensor, labels: Tensor, parameters: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0..1)."""
    loss, correct = 0.0, 0
    for part_NF, labels_part in _parts(features_NF, labels, len(parameters)):
        logits_NC = _logits(part_NF, parameters)
        loss += float(F.cross_entropy(logits_NC, labels_part, reduction="sum"))
        correct += int((logits_NC.argmax(1) == labels_part).sum())
    return loss / len(labels), correct / len(labels)


def _logits(features_NF: Tensor, parameters: Tensor) -> Tensor:
    return F.linear(features_NF, parameters[:, :-1], parameters[:, -1])


def _parts(features_NF: Tensor, labels: Tensor, num_classes: int) -> list[tuple[Tensor, Tensor]]:
    """The images in parts whose logits fit in memory at once."""
    images = max(1, LOGITS_AT_ONCE // num_classes)
    return list(zip(features_NF.split(images), labels.split(images)))
