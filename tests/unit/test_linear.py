"""The linear classifier on features: against an independent solver, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from trainer.evaluation import linear
from trainer.evaluation.linear import fit_linear


def clouds(images=600, features=20, classes=5, spread=1.5, seed=0):
    """Gaussian clouds on axes of very different scale, with an offset: what features of a network look like."""
    draws = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, features, generator=draws)
    labels = torch.arange(images) % classes
    points = centers[labels] + spread * torch.randn(images, features, generator=draws)
    scales = torch.logspace(-2, 2, features)
    return points * scales + 10 * scales, labels


def newton(features, labels, classes, strength):
    """The same problem by Newton's method in fp64 with the exact Hessian: nothing shared with what is tested."""
    x = features.double()
    deviation, mean = torch.std_mean(x, dim=0, correction=0)
    x = torch.cat([(x - mean) / deviation, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    width = x.shape[1]
    penalty = torch.full((classes, width), strength, dtype=torch.float64)
    penalty[:, -1] = 1e-9  # the intercepts are free but for a common shift, which has no curvature
    w = torch.zeros(classes, width, dtype=torch.float64)
    for _ in range(30):
        p = (x @ w.T).softmax(1)
        gradient = (p - F.one_hot(labels, classes)).T @ x / len(x) + penalty * w
        # d2/dw_c dw_k = mean of p_c (1[c = k] - p_k) x x'
        outer = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        hessian = torch.einsum("nck,nf,ng->cfkg", outer, x, x).reshape(classes * width, -1) / len(x)
        hessian += torch.diag(penalty.flatten())
        w -= torch.linalg.solve(hessian, gradient.flatten()).view_as(w)
    weight = w[:, :-1] / deviation
    return weight, w[:, -1] - weight @ mean


def test_equals_newtons_method():
    features, labels = clouds()
    fit = fit_linear(features, labels, 5, seed=0)
    weight, bias = newton(features, labels, 5, fit.regularisation)
    wanted = (features.double() @ weight.T + bias).softmax(1)
    got = (features @ fit.weight.T + fit.bias).softmax(1)
    assert (got - wanted).abs().max() < 2e-3
    assert fit.weight.dtype == torch.float32 and fit.weight.shape == (5, 20) and fit.bias.shape == (5,)


def test_the_strength_with_the_highest_held_out_accuracy_is_chosen(monkeypatch):
    """Many classes of round clouds: strong shrinking gives the best accuracy, and a poor cross-entropy."""
    features, labels = clouds(images=1500, features=64, classes=50, spread=3)
    chosen = fit_linear(features, labels, 50, seed=0)
    many = fit_linear(*clouds(images=4000, features=10, spread=1), 5, seed=0)
    alone = []
    for strength in linear.STRENGTHS:
        monkeypatch.setattr(linear, "STRENGTHS", (strength,))
        alone.append(fit_linear(features, labels, 50, seed=0))
    best = max(alone, key=lambda fit: fit.held_out_accuracy)
    # a fit that starts from the last strength's ends a rounding away from one that starts at zero: one image of 1,500
    assert chosen.held_out_accuracy == pytest.approx(best.held_out_accuracy, abs=1.5 / 1500)
    assert best.held_out_accuracy > alone[-1].held_out_accuracy + 0.05
    assert chosen.regularisation == best.regularisation == 0.1
    assert many.regularisation < chosen.regularisation
    assert many.held_out_accuracy > 0.8


def test_held_out_accuracy_is_of_unseen_images():
    """Labels without any meaning: what is fitted is near 1, what is held out near chance."""
    draws = torch.Generator().manual_seed(1)
    features = torch.randn(400, 300, generator=draws)
    labels = torch.randint(2, (400,), generator=draws)
    fit = fit_linear(features, labels, 2, seed=0)
    seen = ((features @ fit.weight.T + fit.bias).argmax(1) == labels).float().mean()
    assert abs(fit.held_out_accuracy - 0.5) < 0.2 < seen - 0.6


def test_folds_are_stratified_of_one_size_and_seeded():
    labels = torch.tensor([0] * 50 + [1] * 2 + [2] + [3] * 11)
    folds = linear._folds(labels, 5, seed=3)
    assert torch.bincount(folds[labels == 0]).tolist() == [10] * 5
    assert len(folds[labels == 1].unique()) == 2  # each of the two is learned from while the other is held out
    assert folds[labels == 2].tolist() == [-1]  # never held out: nothing would be left of its class
    assert sorted(torch.bincount(folds[labels == 3], minlength=5).tolist()) == [2, 2, 2, 2, 3]
    sizes = torch.bincount(folds[folds >= 0], minlength=5)
    assert sizes.max() - sizes.min() <= 1
    assert torch.equal(folds, linear._folds(labels, 5, seed=3))
    assert not torch.equal(folds, linear._folds(labels, 5, seed=4))


def test_every_image_is_held_out_once_and_of_many_images_one_fold(monkeypatch):
    features, labels = clouds(images=100)
    monkeypatch.setattr(linear, "STRENGTHS", (1.0,))
    learned = []
    fit = linear._fit

    def noted(features_NF, labels, strength, start):
        learned.append(len(labels))
        return fit(features_NF, labels, strength, start)

    monkeypatch.setattr(linear, "_fit", noted)
    every = fit_linear(features, labels, 5, seed=0).held_out_accuracy
    assert learned == [80, 80, 80, 80, 80, 100]
    assert every * 100 == pytest.approx(round(every * 100))  # each of the 100 images once
    learned.clear()
    monkeypatch.setattr(linear, "ALL_FOLDS", 99)
    one = fit_linear(features, labels, 5, seed=0).held_out_accuracy
    assert learned == [80, 100]
    assert one * 20 == pytest.approx(round(one * 20))


def test_the_strength_does_not_depend_on_the_seed():
    """Few images of many classes: one held-out fifth chose strengths a factor of 10,000 apart."""
    features, labels = clouds(images=400, features=20, classes=20, spread=1)
    assert len({fit_linear(features, labels, 20, seed=seed).regularisation for seed in range(3)}) == 1


def test_is_deterministic_and_the_same_in_parts(monkeypatch):
    features, labels = clouds(images=150)
    whole = fit_linear(features, labels, 5, seed=0)
    again = fit_linear(features, labels, 5, seed=0)
    assert torch.equal(whole.weight, again.weight) and torch.equal(whole.bias, again.bias)
    monkeypatch.setattr(linear, "LOGITS_AT_ONCE", 5 * 7)  # 7 images at once
    parts = fit_linear(features, labels, 5, seed=0)
    assert torch.equal(
        (features @ parts.weight.T + parts.bias).argmax(1), (features @ whole.weight.T + whole.bias).argmax(1)
    )
    assert parts.regularisation == whole.regularisation


def test_a_constant_feature_and_an_empty_class_do_no_harm():
    features, labels = clouds()
    features[:, 3] = 7.0
    fit = fit_linear(features, labels, 6, seed=0)  # class 5 has no image
    predicted = (features @ fit.weight.T + fit.bias).argmax(1)
    assert torch.isfinite(fit.weight).all() and predicted.max() < 5


def test_features_that_are_not_finite_are_refused():
    features, labels = clouds()
    features[3, 2] = float("nan")
    features[5, 1] = float("inf")
    with pytest.raises(ValueError, match="features of 2 of 600 images are not finite"):
        fit_linear(features, labels, 5, seed=0)


def test_one_image_of_each_class_is_refused():
    with pytest.raises(ValueError, match="no class has two images"):
        fit_linear(torch.randn(4, 3), torch.arange(4), 4, seed=0)
