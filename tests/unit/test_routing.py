"""Routing against the official V-MoE code (tests/fixtures/vmoe: google-research/vmoe, commit 942a78b) and by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from models.moe.routing import RouterConfig, capacity, route, squared_variation

FIXTURES = Path(__file__).parents[1] / "fixtures" / "vmoe"
AUXILIARY = {  # loss of the fixture -> weights of (gshard, importance, load)
    "importance": (0, 1, 0),
    "load": (0, 0, 1),
    "gshard": (1, 0, 0),
    "auxiliary": (0, 0.005, 0.005),
    "auxiliary_all": (0.01, 0.005, 0.005),
}


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture(scope="module", params=[1, 2])
def official(request) -> dict[str, torch.Tensor]:
    return load(f"router_G2_S16_E4_K{request.param}")


def config(official, **changes) -> RouterConfig:
    values = {"num_experts": 4, "k": int(official["num_selected"]), "renormalize": False, "noise_std": 1.0}
    return RouterConfig(**{**values, **changes})


def combine(routing) -> torch.Tensor:
    """(G, S, E) weights of the kept choices."""
    dense = torch.zeros(*routing.expert_GSK.shape[:2], 4)
    return dense.scatter_add(2, routing.expert_GSK, routing.weight_GSK)


@pytest.mark.parametrize("mode", ["det", "train"])
def test_experts_slots_and_weights_are_the_official_ones(official, mode):
    noise = official["noise"] if mode == "train" else None
    logits = official["inputs"] @ official["kernel"]
    cases = [key.removesuffix("/slot") for key in official if key.startswith(f"{mode}/cf") and key.endswith("/slot")]
    assert len(cases) >= 12
    for case in cases:
        factor, bpr, multiple = (part[-1] if part[:2] != "cf" else part[2:] for part in case.split("/")[1:])
        settings = config(official, batch_priority=bpr == "1")
        slots = capacity(16, 4, settings.k, float(factor), int(multiple))
        assert slots == official[f"{case}/capacity"]
        routing = route(logits, settings, slots, noise)
        assert_close(routing.expert_GSK, official[f"{case}/expert"].long(), rtol=0, atol=0)
        assert_close(routing.slot_GSK, official[f"{case}/slot"].long(), rtol=0, atol=0)
        assert_close(combine(routing), official[f"{case}/combine"], rtol=0, atol=1e-5)
        assert_close(routing.kept, (official[f"{case}/slot"] >= 0).float().mean(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["det", "train"])
def test_losses_and_their_gradients_are_the_official_ones(official, mode):
    noise = official["noise"] if mode == "train" else None
    for name, (gshard, importance, load_) in AUXILIARY.items():
        if f"{mode}/loss/{name}" not in official:
            assert (mode, name) == ("det", "load")  # not defined without noise
            continue
        inputs = official["inputs"].clone().requires_grad_()
        kernel = official["kernel"].clone().requires_grad_()
        losses = route(inputs @ kernel, config(official), noise_GSE=noise).losses
        total = gshard * losses["gshard"] + importance * losses["importance"] + load_ * losses["load"]
        if name in losses:
            assert_close(losses[name], official[f"{mode}/{name}_loss"], rtol=0, atol=1e-5)
        assert_close(total.mean(), official[f"{mode}/loss/{name}"], rtol=0, atol=1e-5)
        total.mean().backward()
        assert_close(kernel.grad, official[f"{mode}/grad_kernel/{name}"], rtol=1e-4, atol=1e-5)
        assert_close(inputs.grad, official[f"{mode}/grad_inputs/{name}"], rtol=1e-4, atol=1e-5)


def test_ties_go_to_the_lowest_expert_and_the_lowest_token():
    ties = load("router_ties")
    for prefix, k, bpr, slots in (("bpr0/", 2, False, 4), ("bpr1/", 2, True, 4), ("bprtie/", 1, True, 2)):
        gates = ties["gates"] if k == 2 else ties["bprtie/gates"]
        routing = route(gates.log(), RouterConfig(4, k, renormalize=False, batch_priority=bpr), slots)
        assert_close(routing.expert_GSK, ties[f"{prefix}expert"].long(), rtol=0, atol=0)
        assert_close(routing.slot_GSK, ties[f"{prefix}slot"].long(), rtol=0, atol=0)
        assert_close(combine(routing), ties[f"{prefix}combine"], rtol=0, atol=1e-6)
    # torch's unstable sorts keep the order of a few equal elements, but not of this many
    routing = route(torch.zeros(1, 40, 32), RouterConfig(32, 2, batch_priority=True))
    assert routing.expert_GSK.unique(dim=1).tolist() == [[[0, 1]]]
    assert routing.slot_GSK[0, :, 0].tolist() == list(range(40))


def test_capacity_is_the_official_one():
    rows = load("capacity_table")["rows"].tolist()
    assert any(row[-1] == -1 for row in rows) and {row[3] for row in rows} == {0, 1}
    for choices, experts, factor, rounding, multiple, expected in rows:
        arguments = (int(choices), int(experts), 1, factor, int(multiple), "round" if rounding else "ceil")
        if expected == -1:
            with pytest.raises(ValueError, match="at least 1"):
                capacity(*arguments)
        else:
            assert capacity(*arguments) == expected
    with pytest.raises(ValueError, match="floor"):
        capacity(16, 4, 1, 1.0, rounding="floor")


def test_all_first_choices_queue_before_second_ones():
    # expert 0: first choice of tokens 0 and 2, second of token 1; with two slots the second choice is dropped
    logits = torch.tensor([[[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [2.0, 0.0, 1.0]]])
    routing = route(logits, RouterConfig(3, 2), capacity=2)
    assert routing.expert_GSK.tolist() == [[[0, 1], [1, 0], [0, 2]]]
    assert routing.slot_GSK.tolist() == [[[0, 1], [0, -1], [1, 0]]]
    assert routing.weight_GSK[0, 1, 1] == 0
    assert routing.count_GE.tolist() == [[3, 2, 1]]
    assert_close(routing.kept, torch.tensor(5 / 6))
    assert_close(routing.load, torch.tensor([3 / 6, 2 / 6, 1 / 6]))


def test_priority_gives_the_slot_to_the_surest_token():
    logits = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]]])
    for priority, slots in ((False, [0, -1, -1]), (True, [-1, 0, -1])):
        routing = route(logits, RouterConfig(2, 1, batch_priority=priority), capacity=1)
        assert routing.slot_GSK.flatten().tolist() == slots


def test_renormalised_weights_sum_to_one_and_nothing_is_dropped_without_capacity():
    logits = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    plain, normed = (route(logits, RouterConfig(5, 3, renormalize=value)) for value in (False, True))
    assert_close(normed.weight_GSK, plain.weight_GSK / plain.weight_GSK.sum(-1, keepdim=True))
    assert_close(plain.gate_sum, plain.weight_GSK.sum(-1).mean())
    assert plain.kept == 1 and plain.slot_GSK.min() == 0


def test_equal_experts_have_finite_gradients():
    logits = torch.zeros(1, 4, 4, requires_grad=True)
    route(logits, RouterConfig(4, 2)).losses["importance"].sum().backward()
    assert torch.isfinite(logits.grad).all()  # the official std / mean form gives NaN here
    assert_close(squared_variation(torch.tensor([[1.0, 3.0]])), torch.tensor([0.25]))  # mean 2, variance 1


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="num_experts = 4"):
        RouterConfig(4, 5)
    with pytest.raises(ValueError, match=r"\(groups, tokens, 4\)"):
        route(torch.zeros(2, 4), RouterConfig(4, 1))
    with pytest.raises(ValueError, match="noise_std is 0"):
        route(torch.zeros(1, 2, 4), RouterConfig(4, 1), noise_GSE=torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="got 0"):
        route(torch.zeros(1, 2, 4), RouterConfig(4, 1), capacity=0)
