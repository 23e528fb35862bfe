"""Routing measures of an evaluation: a change made by hand, states that come back, and experts that are copies."""

import json

import pytest
import torch
from torch import nn

from models.moe.layer import MoE, MoEConfig
from models.moe.out import inside
from models.moe.similarity import expert_similarity
from models.preprocessing import Preprocessing
from trainer.config.data import AugmentConfig, DataConfig
from trainer.config.runtime import RunConfig
from trainer.data.loader import Batch, Data
from trainer.data.sources import DigitsSource
from trainer.distributed.ranks import Dist
from trainer.evaluation import routing
from trainer.evaluation.accuracy import Predictor, evaluate
from trainer.evaluation.routing import Choices, RoutingWatch
from trainer.tracking.health import Health, collapse

ALONE = Dist(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))


def model(num_experts=4, k=2, layers=2):
    """Layers that send token value v to expert v first: the router is the identity."""
    config = MoEConfig(num_experts=num_experts, k=k)
    parts = nn.Sequential(*(MoE(num_experts, 3, config, layer=n) for n in range(layers)))
    for part in parts:
        part.router.weight.data.copy_(torch.eye(num_experts))
    return parts


def look(watch, tokens, first_image=0, real=None):
    """One batch: tokens (B, T) name the expert that both layers choose first."""
    mask = torch.ones(len(tokens), dtype=torch.bool) if real is None else torch.tensor(real)
    index = torch.where(mask, torch.arange(first_image, first_image + len(tokens)), -1)
    out = {}
    for number, layer in enumerate(watch.module):
        layer(nn.functional.one_hot(torch.tensor(tokens), 4).float(), inside(out, str(number)))
    watch.observe(Batch(torch.zeros(0), torch.zeros(len(tokens)), mask, index), torch.zeros(len(tokens), 10), out)


def test_routing_change_by_hand():
    watch = RoutingWatch(model(), images=3, dist=ALONE)
    look(watch, [[0, 1, 2], [3, 3, 3]])
    look(watch, [[1, 1, 1], [0, 0, 0]], first_image=2, real=[True, False])  # the last one is padding
    first = watch.take()
    assert "routing_change" not in first.means and not any("change" in key for key in first.per_layer)
    assert first.layers["0"]["first"] == pytest.approx([1 / 9, 4 / 9, 1 / 9, 3 / 9], rel=1e-5)
    assert first.layers["0"]["kept"] == 1.0 and sum(first.layers["1"]["load"]) == pytest.approx(1)
    look(watch, [[1, 1, 1]], first_image=2)  # other batches than before
    look(watch, [[0, 2, 1], [3, 3, 0]])  # three of nine tokens changed
    second = watch.take()
    assert second.means["routing_change"] == pytest.approx(3 / 9)
    assert second.per_layer["routing_change/1"] == pytest.approx(3 / 9)
    look(watch, [[0, 2, 1], [3, 3, 0], [1, 1, 1]])
    assert watch.take().means["routing_change"] == 0


def test_layers_are_told_apart():
    watch = RoutingWatch(model(), images=1, dist=ALONE)
    look(watch, [[0, 1]])
    watch.take()
    watch.module[1].router.weight.data.copy_(torch.eye(4)[[1, 0, 2, 3]])
    look(watch, [[0, 2]])  # layer 0: the second token changes; layer 1: both
    found = watch.take()
    assert found.per_layer["routing_change/0"] == 0.5 and found.per_layer["routing_change/1"] == 1.0
    assert found.means["routing_change"] == 0.75


def test_the_state_comes_back_on_any_number_of_ranks():
    first, second, after = (RoutingWatch(model(), images=2, dist=ALONE) for _ in range(3))
    look(first, [[0, 1, 2]])
    look(second, [[3, 3, 3]], first_image=1)
    assert first.state() == {}
    first.take(), second.take()
    after.restore(json.loads(json.dumps([first.state(), second.state(), {}])))
    look(after, [[0, 1, 1], [0, 3, 3]])
    assert after.take().means["routing_change"] == pytest.approx(2 / 6)


def test_images_are_spread_when_there_are_more_tokens_than_are_kept(monkeypatch):
    monkeypatch.setattr(routing, "TOKENS", 4)
    watch = RoutingWatch(model(), images=5, dist=ALONE)  # 5 images x 2 tokens: every third image
    look(watch, [[0, 1]] * 5)
    assert list(watch.now) == [0, 3]
    watch.take()
    look(watch, [[0, 0], [2, 2], [2, 2], [0, 1], [2, 2]])
    found = watch.take()
    assert found.means["routing_change"] == 1 / 4
    assert found.layers["0"]["first"] == [0.3, 0.1, 0.6, 0.0], "the load counts every token"
    assert next(iter(watch.before.values())).itemsize == 1


def test_without_experts_there_is_nothing_to_tell():
    watch = RoutingWatch(nn.Linear(2, 2), images=3, dist=ALONE)
    batch = Batch(torch.zeros(0), torch.zeros(1), torch.ones(1, dtype=torch.bool), torch.zeros(1))
    watch.observe(batch, torch.ones(1), {})
    assert watch.take() == routing.Measures() and watch.state() == {}


def test_an_evaluation_feeds_the_watch():
    class Digits(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = MoE(8, 4, MoEConfig(num_experts=4, k=1))

        def forward(self, images, out=None):
            return self.moe(images.mean(1), inside(out, "moe")).mean(1) @ torch.ones(8, 10)

    source = DigitsSource(DataConfig(limit=20), "val")
    data = Data(source, source, Preprocessing(8, (0.5,) * 3, (0.5,) * 3), AugmentConfig(), 0, 10, False)
    network = Digits()
    watch, again = (RoutingWatch(network, len(source), ALONE) for _ in range(2))
    for batch in (8, 5):
        evaluate(Predictor(network, network), data, torch.float32, batch, ALONE, observe=watch.observe)
        found = watch.take()
    assert found.means["routing_change"] == 0 and len(watch.before) == 20
    again.before = {index: (first + 1) % 4 for index, first in watch.before.items()}
    evaluate(Predictor(network, network), data, torch.float32, 8, ALONE, observe=again.observe)
    assert again.take().means["routing_change"] == 1


def test_similarity_of_copies_is_one_and_of_opposites_minus_one():
    layers = model(num_experts=4)
    for expert in layers[0].experts:
        expert.load_state_dict(layers[0].experts[0].state_dict())
    vectors = [torch.cat([p.flatten() for p in expert.parameters()]) for expert in layers[1].experts]
    pairs = [torch.cosine_similarity(vectors[a], vectors[b], dim=0).item() for a in range(4) for b in range(a)]
    found = expert_similarity(layers)
    assert found["0"] == pytest.approx(1, abs=1e-6)
    assert found["1"] == pytest.approx(sum(pairs) / 6, abs=1e-6) and abs(found["1"]) < 0.5
    two = model(num_experts=2, layers=1)
    for a, b in zip(two[0].experts[0].parameters(), two[0].experts[1].parameters()):
        b.data.copy_(-a)
    assert expert_similarity(two)["0"] == pytest.approx(-1, abs=1e-6)
    assert expert_similarity(model(num_experts=1, k=1)) == {}


def test_dropped_choices_are_counted_as_asked_and_not_as_kept():
    layer = MoE(2, 3, MoEConfig(num_experts=2, k=1, eval_capacity_factor=0.5, capacity_multiple=1)).eval()
    layer.router.weight.data.copy_(torch.eye(2))
    choices = Choices({"only": 2}, torch.device("cpu"))
    out = {}
    layer(torch.tensor([[[1.0, 0.0]] * 4]), out)  # ceil(4 x .5 / 2) = 1 slot
    choices.add(torch.tensor([True]), {"only": out["routing"]})
    assert choices.summary(ALONE) == {"only": {"load": [1.0, 0.0], "first": [1.0, 0.0], "kept": 0.25}}


def test_a_collapsed_router():
    assert collapse([0.25] * 4) is None and collapse([1.0]) is None
    assert collapse([0.9, 0.05, 0.05, 0.0]) is None  # not above nine tenths; entropy .28
    assert "expert 0 of 2, 91% to one" in collapse([0.91, 0.09]).replace("experts 0, 1", "expert 0")
    assert collapse([0.5, 0.5] + [0.0] * 14) is None  # ln 2 / ln 16 = .25, the bound
    assert collapse([0.5, 0.5] + [0.0] * 15) == "first choices go to experts 0, 1 of 17, 50% to one (entropy 0.24)"


def test_idle_experts_and_collapsed_routers_are_told_once_until_they_recover():
    watch = Health(RunConfig(), "train")

    def told(step, load, first=(0.25,) * 4):
        layers = {"blocks.1.mlp": {"load": list(load), "first": list(first)}}
        return [(f.message, f.about) for f in watch.look_at_evaluation(step, {"images": 9}, layers)]

    ((message, about),) = told(1, [0.5, 0.3, 0.2, 0.0])
    assert message == "layer blocks.1.mlp: not one validation token for expert 3, at step 1"
    assert about == {"layer": "blocks.1.mlp", "unused_experts": [3]}
    assert told(2, [0.5, 0.3, 0.2, 0.0]) == []
    restored = Health(RunConfig(), "train")
    restored.restore(json.loads(json.dumps(watch.state())))
    watch = restored
    assert told(3, [0.5, 0.5, 0.0, 0.0])[0][1]["unused_experts"] == [2, 3]
    ((message, about),) = told(4, [0.5, 0.5, 0.0, 0.0], [0.95, 0.05, 0.0, 0.0])
    assert "collapsed on the validation images: first choices go to experts 0, 1 of 4, 95% to one" in message
    assert about["first_choices"] == [0.95, 0.05, 0.0, 0.0]
    assert told(5, [0.5, 0.5, 0.0, 0.0], [0.95, 0.05, 0.0, 0.0]) == []
    assert told(6, [0.25] * 4) == []
    assert len(told(7, [0.5, 0.5, 0.0, 0.0], [0.95, 0.05, 0.0, 0.0])) == 2


def test_what_the_training_rows_told_is_not_told_again():
    watch = Health(RunConfig(dead_after=1), "train")
    watch.look(1, {"loss": 1.0, "load/blocks.1.mlp": [1.0, 0.0, 0.0, 0.0]})
    layers = {"blocks.1.mlp": {"load": [1.0, 0.0, 0.0, 0.0], "first": [1.0, 0.0, 0.0, 0.0]}}
    assert watch.look_at_evaluation(1, {"images": 9}, layers) == []
