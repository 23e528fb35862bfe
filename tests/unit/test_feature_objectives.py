"""Without classes: what objectives learn and compare, and how an evaluation counts it, worked out from the states."""

import math

import numpy as np
import pytest
import torch
from test_evaluation_layout import Counted, OneOfMany, digits
from torch import nn
from vit_families import images, tiny

from models.modules.basis import Project
from models.modules.meta import MetaModel
from models.modules.stages import split
from models.modules.stitch import StudentModule, build_student_modules
from models.moe.layer import MoEConfig
from models.moe.out import auxiliary_loss
from models.vmoe import VMoE, VMoEConfig
from trainer.config.phases import DistillConfig, MetaConfig, TrainConfig
from trainer.distributed.ranks import Dist
from trainer.evaluation import pooled
from trainer.evaluation.accuracy import Predictor, evaluate, of_published
from trainer.evaluation.counts import Compared
from trainer.objectives import Borders, Distill, LearnFeatures, MatchTeacher, Theseus, Together, relative_mse
from trainer.tracking.measures import headline, measure_of, score_of

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
X = images(count=4)
LABELS = torch.tensor([1, 4, 0, 2])
TOKENS = 16 + 5
WIDTH = 24  # the teacher's


def teacher():
    """(model, its three modules, a meta model of one block each) without a head: DINOv2 with registers."""
    model = tiny("dinov2 reg4", depth=6).requires_grad_(False)
    meta = MetaModel.from_teacher(model, 3, teacher_depths=[2, 2, 2]).eval()
    return model, split(model, [2, 2, 2]), meta


def student():
    """Three blocks of width 8 with experts."""
    return VMoE(
        VMoEConfig(
            image_size=32,
            patch_size=8,
            width=8,
            depth=3,
            heads=2,
            mlp_dim=20,
            num_classes=0,
            reg_tokens=4,
            feature_width=WIDTH,
            moe_blocks="all",
            moe=MoEConfig(num_experts=3, k=2),
        )
    )


def equal(loss, expected):
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-7)


def whatever_the_labels(objective, **options):
    """The step, which must not read the labels."""
    torch.manual_seed(0)
    loss, parts = objective(objective.module, X, LABELS, **options)
    torch.manual_seed(0)
    again, _ = objective(objective.module, X, torch.zeros_like(LABELS), **options)
    assert torch.equal(loss, again)
    assert parts.keys().isdisjoint({"label", "kl", "kd", "distill"})
    return loss, parts


def test_the_meta_model_matches_borders_and_final_tokens():
    model, stages, meta = teacher()
    objective = MatchTeacher(meta, stages, MetaConfig(free_weight=2.0, forced_weight=0.5, kl_weight=3.0), TOKENS)
    assert not objective.classifies
    loss, parts = whatever_the_labels(objective)
    h0, h1, tokens = MetaModel(stages).hidden_states(X)
    assert torch.equal(tokens, model.forward_features(X))
    f0, f1, free = meta.hidden_states(X)
    # the first border once, with the larger weight; the second free and forced; the final tokens free and forced
    match = 2 * relative_mse(f0, h0) + 2 * relative_mse(f1, h1) + 0.5 * relative_mse(meta.stages[1](h0), h1)
    last = relative_mse(free, tokens) + relative_mse(meta.stages[2](h1), tokens)
    equal(loss, match + 3 * last)
    equal(parts["tokens"], last)
    compared = objective.compare(X)
    assert list(compared) == ["", "/0", "/1", "/2"]
    assert torch.equal(compared["/1"][0], f1)
    assert torch.equal(compared["/1"][1], h1)
    assert compared[""] is not compared["/0"]
    assert torch.equal(compared[""][1], tokens)


def test_module_replacing_is_judged_by_the_final_tokens():
    model, stages, meta = teacher()
    objective = Theseus(meta, stages, MetaConfig(kl_weight=2.0), TOKENS)
    loss, _ = whatever_the_labels(objective, progress=0.9)  # every stage is the meta model's
    equal(loss, 2 * relative_mse(meta(X), model.forward_features(X)))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("border", ["none", "mse", "cosine"])
def test_every_module_has_a_border_the_last_one_the_final_tokens(index, border):
    model, stages, meta = teacher()
    whole = MetaModel(stages)
    module = build_student_modules(student(), [1, 1, 1], WIDTH)[index]
    config = DistillConfig(border=border, border_weight=2.0)
    objective = Distill(module, stages[index], meta, index, config, TOKENS, teacher=whole)
    told = {}
    loss, parts = objective(module, X, LABELS, out=told)
    h = meta.front(X, index)
    state = module(h)
    reference = stages[index](h)
    assert state.shape == reference.shape == (4, TOKENS, WIDTH)
    error = relative_mse(state, reference)
    if border == "cosine":
        error = 1 - torch.cosine_similarity(state, reference, dim=-1).mean()
    equal(loss, 2 * error + auxiliary_loss(told))
    assert parts.keys() == {"border", "balance"}
    # neither the stages behind nor the whole teacher run in a step
    frozen = [each.part for each in objective.passes() if each.part is not module]
    assert frozen == [stages[index], *meta.stages[:index]]
    compared = objective.compare(X)
    assert list(compared) == ["", f"/{index}"]
    assert torch.equal(compared[""][0], meta.back(state, index))
    assert torch.equal(compared[""][1], model.forward_features(X))
    assert torch.equal(compared[f"/{index}"][1], reference)


@torch.no_grad()
def test_the_teachers_own_modules_have_no_error():
    model, stages, _ = teacher()
    meta = MetaModel.from_teacher(model, 3, 0, teacher_depths=[2, 2, 2]).eval()
    for index, stage in enumerate(stages):
        objective = Distill(stage, stage, meta, index, DistillConfig(), TOKENS, teacher=MetaModel(stages))
        metrics = evaluated_alone(objective)
        assert metrics["relative_error"] == metrics[f"relative_error/{index}"] == 0
        assert metrics["cosine"] == pytest.approx(1, abs=1e-6)


def evaluated_alone(objective):
    counts = Compared(ALONE)
    counts.add(objective.compare(X), torch.ones(4, dtype=torch.bool))
    return counts.metrics()


def test_all_modules_together_are_the_pairs_in_a_chain():
    _, stages, meta = teacher()
    modules = build_student_modules(student(), [1, 1, 1], WIDTH)
    config = DistillConfig(border="mse")
    objective = Together(modules, stages, meta, config, TOKENS, meta_is_teacher=False)
    loss, parts = whatever_the_labels(objective)
    expected = 0
    for i, (module, stage) in enumerate(zip(modules, stages)):
        pair = Distill(module, stage, meta, i, config, TOKENS, 0.0, modules[:i], teacher=MetaModel(stages))
        expected = expected + pair(module, X, LABELS)[0]
    equal(loss, expected)
    assert "border/2" in parts
    assert objective.compare(X)["/2"][0].shape == (4, TOKENS, WIDTH)


def test_end_to_end_learns_the_final_tokens_and_the_borders():
    model, stages, _ = teacher()
    whole = student()
    config = TrainConfig(kd_weight=0.5, border_weight=2.0, border_epochs=10, epochs=10)
    projections = [Project(torch.zeros(WIDTH), torch.eye(WIDTH)[:, : whole.embed_dim]) for _ in range(2)]
    borders = Borders([1, 2], projections)
    objective = LearnFeatures(whole, MetaModel(stages), config, TOKENS, borders=borders)
    told = {}
    loss, parts = objective(whole, X, LABELS, progress=0.25, out=told)
    tokens = whole(X, as_teacher=True)
    last = relative_mse(tokens, model.forward_features(X))
    h0, h1, _ = MetaModel(stages).hidden_states(X)
    z0, z1 = (told["blocks"][str(block)]["state"] for block in (0, 1))
    border = relative_mse(z0, h0[..., : whole.embed_dim]) + relative_mse(z1, h1[..., : whole.embed_dim])
    # fade is 1 - 0.25
    equal(loss, last + 2 * 0.75 * border + auxiliary_loss(told))
    equal(parts["tokens"], last)
    loss.backward()
    assert whole.feature_head.weight.grad.abs().sum() > 0
    assert whole.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert list(objective.compare(X)) == ["", "/0", "/1", "/2"]
    # once the borders have faded out the teacher still runs: it is the target
    equal(objective(whole, X, LABELS, progress=1.0)[1]["tokens"], last)
    shares = {each.part: each.share for each in objective.passes()}
    assert shares == dict.fromkeys([whole, objective.teacher, *projections], 1.0)


# evaluation


def test_relative_error_and_cosine_by_hand():
    """Image 0: |(3, 4) - (3, 0)|^2 = 16, |(3, 0)|^2 = 9, cosine 3/5; 1: equal, |(0, 2)|^2 = 4; 2: no number."""
    states = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]], [[math.nan, 1.0]], [[9.0, 9.0]]])
    theirs = torch.tensor([[[3.0, 0.0]], [[0.0, 2.0]], [[1.0, 1.0]], [[1.0, 1.0]]])
    counts = Compared(ALONE)
    counts.add({"": (states, theirs)}, torch.tensor([True, True, True, False]))  # the last one is padding
    metrics = counts.metrics()
    assert metrics == {
        "relative_error": pytest.approx(16 / 13),
        "cosine": pytest.approx((3 / 5 + 1) / 2),
        "images": 3,
        "nonfinite_images": 1,
    }


class Blur(nn.Module):
    """Images of digits -> tokens, one per row of the image."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, images):
        return (self.factor * images[:, 0]).tanh()


@pytest.mark.parametrize(("batch", "world"), [(7, 1), (50, 2), (4, 3)])
def test_neither_batch_nor_ranks_change_a_comparison(batch, world):
    model, reference = Blur(0.5), Blur(1.0)
    measured = Predictor(model, model, compare=lambda x: {"": (model(x), reference(x))})
    expected = evaluate(measured, digits(50), torch.float32, 50, ALONE)
    assert expected["images"] == 50
    totals = 0
    for rank in range(world):
        dist = OneOfMany(rank, world, rank, world, torch.device("cpu"))
        with pytest.raises(Counted) as counted:
            evaluate(measured, digits(50), torch.float32, batch, dist)
        totals = totals + counted.value.args[0]
    error, size, cosine, finite, count = totals.tolist()
    assert (finite, count) == (50, 50)
    assert error / size == pytest.approx(expected["relative_error"], rel=1e-6)
    assert cosine / finite == pytest.approx(expected["cosine"], rel=1e-6)


def test_what_an_evaluation_is_judged_by():
    accuracy = {"accuracy": 0.9, "loss": 0.3}
    features = {"relative_error": 0.25, "cosine": 0.9, "relative_error_ema": 0.2, "cosine_ema": 0.92}
    assert score_of(accuracy) == 0.9
    assert score_of(features) == -0.25  # less error is better
    assert headline(features) == "relative error 0.25, cosine 0.900"
    assert measure_of(accuracy).shown(0.9) == "90.0%"
    published = of_published(features)
    assert (published["relative_error"], published["relative_error_raw"], published["cosine"]) == (0.2, 0.25, 0.92)


# what features tell of labels


def test_nearest_classes_vote_by_their_cosine():
    """Cosines 1 and 0 to the classes' images: e^(1/0.07) outweighs nineteen votes of e^0 = 1."""
    train = torch.cat([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]).repeat(19, 1)])
    labels = torch.tensor([0] + [1] * 19)
    assert pooled.nearest_classes(train, labels, torch.tensor([[3.0, 0.0], [0.1, 5.0]]), 2).tolist() == [0, 1]


def test_only_the_nearest_twenty_vote():
    """Of 30 images of class 1 at cosine 0.5 and 20 of class 0 at cosine 0.6 the first are too far to be asked."""
    near = torch.tensor([[0.6, 0.8]]).repeat(20, 1)
    far = torch.tensor([[0.5, math.sqrt(0.75)]]).repeat(300, 1)
    train = torch.cat([far, near])
    labels = torch.tensor([1] * 300 + [0] * 20)
    assert pooled.nearest_classes(train, labels, torch.tensor([[1.0, 0.0]]), 2).tolist() == [0]


class Features(nn.Module):
    """Digits as features of two kinds: the pixels, or no numbers."""

    num_prefix_tokens = 1

    def __init__(self, broken: bool = False, pools: bool = True):
        super().__init__()
        self.broken = broken
        self.pools = pools

    def forward_features(self, images):
        patches = images[:, 0].reshape(len(images), 4, -1)
        return torch.cat([100 * torch.ones_like(patches[:, :1]), patches], 1)  # a prefix token that tells nothing

    def forward_head(self, tokens, pre_logits=False):
        assert pre_logits
        if self.broken:
            tokens = tokens / 0
        return tokens[:, 1:].flatten(1) if self.pools else tokens


def test_pixels_of_digits_tell_their_class_and_it_is_said_when_neighbours_are_few(caplog):
    data = digits(200)
    accuracies = pooled.class_accuracies(Features(), "it", data, torch.float32, 16, ALONE, seed=0)
    assert accuracies["knn_accuracy"] > 0.9
    assert accuracies["probe_accuracy"] > 0.9
    assert not caplog.records
    few = pooled.class_accuracies(Features(), "it", digits(12), torch.float32, 16, ALONE, seed=0)
    assert "12 neighbours: there are no more training images" in caplog.text
    assert 0 <= few["knn_accuracy"] <= 1


def test_a_model_that_does_not_pool_gives_the_mean_of_its_patch_tokens():
    data = digits(20)
    features, labels = pooled.pooled_features(Features(pools=False), data.val, data, torch.float32, 8, ALONE)
    tokens = Features().forward_features(torch.stack([eval_image(i) for i in range(20)]))
    torch.testing.assert_close(features, tokens[:, 1:].mean(1))
    assert labels.tolist() == digits(20).val.targets.tolist()


def eval_image(index: int) -> torch.Tensor:
    from trainer.data.transforms import eval_transform

    data = digits(20)
    return eval_transform(data.preprocessing)(data.val.image(index))


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"the features of teacher X are not finite on 24 of 24 images"):
        pooled.class_accuracies(Features(broken=True), "teacher X", digits(12), torch.float32, 8, ALONE, seed=0)


def test_the_order_of_images_is_that_of_the_split_on_several_ranks(monkeypatch):
    """What two ranks gather is what one rank computes."""
    data = digits(21)
    alone, labels = pooled.pooled_features(Features(), data.val, data, torch.float32, 4, ALONE)
    parts = []

    class Two(Dist):
        def gather(self, value):
            parts.append(value)
            return list(parts)

    for rank in range(2):
        dist = Two(rank, 2, rank, 2, torch.device("cpu"))
        found, found_labels = pooled.pooled_features(Features(), data.val, data, torch.float32, 4, dist)
    assert torch.equal(found, alone)
    assert np.array_equal(found_labels, labels)


def test_a_student_module_without_classes_is_the_stage_and_the_feature_head():
    module = build_student_modules(student(), [1, 1, 1], WIDTH)[2]
    assert isinstance(module, StudentModule)
    assert module.stage.feature_head.weight.shape == (WIDTH, module.stage.embed_dim)
