"""How meta models and grown teacher modules learn: losses, draws, passes and costs worked by hand."""

import itertools
import math

import pytest
import torch
from torch import nn
from vit_families import images, tiny

from models.flops import Flops, flops
from models.modules.meta import MetaModel
from models.modules.stages import split
from trainer.config.phases import MetaConfig
from trainer.objectives import Classify, Incubate, MatchTeacher, Theseus, meta_objective
from trainer.objectives.cost import expected_mixed_flops

TOKENS, DEPTHS = 17, [2, 1, 3]  # of the tiny teacher of 6 blocks
X, LABELS = images(count=2), torch.tensor([1, 4])
LN2_0 = torch.tensor([[math.log(2), 0.0]])


class Scale(nn.Module):
    """A stage that multiplies, and counts how often it runs."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.runs = nn.Parameter(torch.tensor(float(factor))), 0

    def forward(self, x):
        self.runs += 1
        return self.factor * x


def frozen_as_the_loop_does(objective):
    for module in objective.frozen:
        module.eval().requires_grad_(False)
    return objective


def scales(kind, stages=3, **config):
    """(objective, meta stages, teacher stages): the teacher doubles in every stage, the meta model changes nothing."""
    ours, theirs = [Scale(1) for _ in range(stages)], [Scale(2) for _ in range(stages)]
    return frozen_as_the_loop_does(kind(MetaModel(ours), theirs, MetaConfig(**config), TOKENS)), ours, theirs


def vit(kind=MatchTeacher, **config):
    """(objective, FLOPs of each meta stage, of each teacher stage) of the tiny ViT."""
    teacher = tiny("vit", depth=6)
    meta, stages = MetaModel.from_teacher(teacher, 3, teacher_depths=DEPTHS), split(teacher, DEPTHS)
    costs = [[flops(stage, TOKENS) for stage in part] for part in (meta.stages, stages)]
    return frozen_as_the_loop_does(kind(meta, stages, MetaConfig(**config), TOKENS)), *costs


def kl(p, q):
    """Of two distributions over two classes, given by their first probability."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


KL_FREE, KL_FORCED = kl(256 / 257, 2 / 3), kl(256 / 257, 16 / 17)  # teacher 8x, meta model x, its last stage on 4x
# per row: weights; errors at the borders; KL; how often each meta stage and each teacher stage runs
WEIGHTS = [
    ({}, 1 / 4 + 9 / 16 + 1 / 4, KL_FREE + KL_FORCED, [1, 2, 2], [1, 1, 1]),
    ({"free_weight": 3.0}, 3 * (1 / 4 + 9 / 16) + 1 / 4, KL_FREE + KL_FORCED, [1, 2, 2], [1, 1, 1]),
    ({"forced_weight": 0.0}, 1 / 4 + 9 / 16, KL_FREE, [1, 1, 1], [1, 1, 1]),
    ({"free_weight": 0.0}, 1 / 4 + 1 / 4, KL_FREE + KL_FORCED, [1, 2, 2], [1, 1, 1]),
    ({"kl_weight": 0.0}, 1 / 4 + 9 / 16 + 1 / 4, None, [1, 2, 1], [1, 1, 0]),
    ({"free_weight": 0.0, "forced_weight": 0.0}, 0.0, KL_FREE, [1, 1, 1], [1, 1, 1]),
    ({"free_weight": 0.0, "forced_weight": 0.0, "kl_weight": 0.0}, 0.0, None, [1, 1, 1], [0, 0, 0]),
    ({"forced_weight": 0.0, "kl_weight": 0.0}, 1 / 4 + 9 / 16, None, [1, 1, 1], [1, 1, 0]),
]


@pytest.mark.parametrize("config, match, expected_kl, ours, theirs", WEIGHTS)
def test_a_weight_of_0_leaves_out_what_only_it_needs(config, match, expected_kl, ours, theirs):
    objective, own, taught = scales(MatchTeacher, **config)
    loss, parts = objective(objective.module, LN2_0, torch.tensor([1]))
    assert parts["match"].item() == pytest.approx(match)
    assert parts.get("kl", torch.tensor(-1.0)).item() == pytest.approx(-1.0 if expected_kl is None else expected_kl)
    expected = match + (expected_kl or 0.0) * objective.config.kl_weight + 0.5 * math.log(3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert [stage.runs for stage in own] == ours and [stage.runs for stage in taught] == theirs
    loss.backward()
    assert all(stage.factor.grad is not None for stage in own)


@pytest.mark.parametrize("config, match, expected_kl, ours, theirs", WEIGHTS)
def test_the_cost_follows_the_passes(config, match, expected_kl, ours, theirs):
    objective, own, taught = vit(**config)
    runs = sum(n * cost.trained for n, cost in zip(ours, own))
    runs += sum(n * cost.forward for n, cost in zip(theirs, taught))
    assert objective.flops_per_image == runs


def test_objectives_by_name():
    teacher = tiny("vit", depth=6)
    stages = split(teacher, DEPTHS)
    for name, kind in (("labels", Classify), ("matching", MatchTeacher), ("theseus", Theseus)):
        meta = MetaModel.from_teacher(teacher, 3, teacher_depths=DEPTHS)
        objective = meta_objective(meta, stages, MetaConfig(objective=name), TOKENS, 0.0, 0)
        assert type(objective) is kind
        # what phase meta publishes
        assert {key.removeprefix("meta.") for key in objective.module.state_dict()} == set(meta.state_dict())


def test_theseus_replaces_more_and_more():
    objective, *_ = scales(Theseus, replace_rate=0.2)
    assert [objective.replace_rate(u) for u in (0, 0.25, 0.5, 1)] == pytest.approx([0.2, 0.6, 1, 1])
    draws = [[objective.draw(step / 4000) for step in part] for part in (range(400), range(2000, 2100))]
    share = sum(map(sum, draws[0])) / 1200
    # p from .2 to .36 over these steps, and one more where none is drawn
    assert share == pytest.approx(0.28 + 0.72**3 / 3, abs=0.05)
    assert all(map(any, draws[0])) and all(map(all, draws[1]))
    assert len({tuple(draw) for draw in draws[0]}) == 7  # every mixture but the one that trains nothing


def test_the_draw_is_that_of_the_step_and_the_seed():
    draws = []
    for noise, seed in ((1, 0), (2, 0), (2, 7)):  # torch is seeded per rank and micro-batch
        torch.manual_seed(noise)
        stages = [Scale(2) for _ in range(3)]
        objective = Theseus(MetaModel([Scale(1) for _ in range(3)]), stages, MetaConfig(), TOKENS, seed=seed)
        before = torch.get_rng_state()
        draws.append([objective.draw(step / 100) for step in range(40)])
        assert torch.equal(torch.get_rng_state(), before)
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("kl_weight", [0.0, 2.0])
@pytest.mark.parametrize("own", [(True, False, False), (False, True, True), (True, True, True)])
def test_theseus_loss_by_hand(own, kl_weight, monkeypatch):
    objective, ours, theirs = scales(Theseus, objective="theseus", kl_weight=kl_weight, label_weight=0.5)
    monkeypatch.setattr(objective, "draw", lambda progress: list(own))
    loss, parts = objective(objective.module, LN2_0, torch.tensor([1]))
    odds = 2**2 ** own.count(False)  # logits (ln 2, 0), doubled by every teacher stage; the teacher itself: 256
    label = math.log(1 + odds)
    expected = 0.5 * label + kl_weight * (kl(256 / 257, odds / (1 + odds)))
    assert parts["label"].item() == pytest.approx(label)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert [stage.runs for stage in ours] == [int(mine) for mine in own]
    assert [stage.runs for stage in theirs] == [int(not mine) + (kl_weight > 0) for mine in own]
    loss.backward()
    assert [stage.factor.grad is not None for stage in ours] == list(own)  # also in front of a teacher's stage
    assert all(stage.factor.grad is None for stage in theirs)


def test_theseus_ends_as_the_meta_model():
    objective, *_ = vit(Theseus, objective="theseus")
    loss, parts = objective(objective.module, X, LABELS, progress=0.5)
    logits = objective.predict(X)
    assert torch.equal(logits, objective.module.meta(X))
    assert parts["label"].item() == pytest.approx(nn.functional.cross_entropy(logits, LABELS).item())
    loss.backward()
    assert [name for name, p in objective.module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_expected_cost_is_the_mean_over_all_mixtures(p):
    ours = [Flops(5, 1, 6), Flops(7, 9, 8), Flops(11, 13, 12)]
    theirs = [Flops(13, 2, 0), Flops(17, 20, 15), Flops(19, 21, 18)]

    def cost(own):
        trained = [any(own[:i]) for i in range(3)]  # a frozen stage costs its forward, and passing the gradient on
        total = 0
        for a, b, mine, passes in zip(ours, theirs, own, trained):
            if mine:
                total += a.forward + a.to_input + a.to_weights
            else:
                total += b.forward + passes * b.to_input
        return total

    total = 0.0
    for own in itertools.product((True, False), repeat=3):
        chance = math.prod(p if mine else 1 - p for mine in own)
        one = [tuple(i == only for i in range(3)) for only in range(3)]
        total += chance * (cost(own) if any(own) else sum(map(cost, one)) / 3)
    assert expected_mixed_flops(p, ours, theirs) == pytest.approx(total)


def test_the_cost_of_theseus():
    objective, own, taught = vit(Theseus, objective="theseus", replace_rate=1.0)
    trained = sum(cost.trained for cost in own)
    teacher = sum(cost.forward for cost in taught)
    assert objective.flops_per_image == trained + teacher  # which runs for its logits
    objective, *_ = vit(Theseus, objective="theseus", replace_rate=1.0, kl_weight=0.0)
    assert objective.flops_per_image == trained
    objective, *_ = vit(Theseus, objective="theseus", replace_rate=0.5, kl_weight=0.0)
    rising = sum(expected_mixed_flops(0.5 + i / 200, own, taught) for i in range(100)) / 100
    assert objective.flops_per_image == pytest.approx((rising + trained) / 2, rel=2e-3)


@pytest.mark.parametrize("index", range(3))
def test_incubation(index):
    teacher = tiny("vit", depth=6)
    meta, stage = MetaModel.from_teacher(teacher, 3, teacher_depths=DEPTHS), split(teacher, DEPTHS)[index]
    objective = frozen_as_the_loop_does(Incubate(stage, meta, index, TOKENS, 0.1))
    loss, parts = objective(objective.module, X, LABELS)
    hybrid = meta.back(stage(meta.front(X, index)), index)
    assert torch.equal(objective.predict(X), hybrid)
    expected = nn.functional.cross_entropy(hybrid, LABELS, label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item()) == parts["label"].item()
    loss.backward()
    assert [name for name, p in stage.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in meta.parameters())
    costs = [flops(part, TOKENS) for part in meta.stages]
    in_front = sum(cost.forward for cost in costs[:index])
    behind = sum(cost.relaying for cost in costs[index + 1 :])
    assert objective.flops_per_image == in_front + flops(stage, TOKENS).trained + behind


@pytest.mark.parametrize(
    "values, message",
    [
        ({"blocks_per_module": 0, "init": "scratch"}, "meta.init is 'scratch'.*blocks_per_module=0"),
        ({"kl_weight": 0.0, "label_weight": 0.0}, "meta.kl_weight is 0.0.*meta.label_weight"),
        ({"replace_rate": 0.0}, "meta.replace_rate is 0.0"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(ValueError, match=message):
        MetaConfig(**values)
