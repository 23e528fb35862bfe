"""The plain MoE layer against the official MlpMoeBlock (tests/fixtures/vmoe/moe_layer.npz) and a loop over experts."""

import copy
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from models.modules.stages import run_blocks
from models.moe import layer as moe
from models.moe import routing as routing_module
from models.moe.layer import MoE, MoEConfig, official, paper
from models.moe.out import auxiliary_loss, inside, routings
from models.moe.out import routing_metrics as metrics_of
from models.moe.parallel import full_state_dict, load_full_state_dict

FIXTURE = Path(__file__).parents[1] / "fixtures" / "vmoe" / "moe_layer.npz"


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    with np.load(FIXTURE) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def state_of(arrays: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Our names for the parameters (or gradients) of an official MlpMoeBlock."""
    state = {"router.weight": arrays[f"{prefix}/Router/dense/kernel"].T}
    for i in (0, 1):
        for e, (kernel, bias) in enumerate(
            zip(arrays[f"{prefix}/Mlp/Dense_{i}/kernel"], arrays[f"{prefix}/Mlp/Dense_{i}/bias"])
        ):
            state |= {f"experts.{e}.fc{i + 1}.weight": kernel.T, f"experts.{e}.fc{i + 1}.bias": bias}
    return state


def layer_of(reference, **settings) -> MoE:
    values = {"num_experts": 4, "renormalize": False, "noise_std": 1.0, "images_per_group": 2}
    layer = MoE(16, 24, MoEConfig(**{**values, **settings}), act="tanh")
    layer.load_state_dict(state_of(reference, "params"))
    return layer


def assert_gradients(layer, inputs, expected, prefix):
    assert_close(inputs.grad, expected[f"{prefix}/inputs"], rtol=1e-4, atol=1e-5)
    for name, gradient in state_of(expected, prefix).items():
        assert_close(layer.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", ["det", "train"])
@pytest.mark.parametrize("case", [f"K{k}/cf{cf}/bpr{bpr}" for k in (1, 2) for cf in (0.5, 1.0, 1.5) for bpr in (0, 1)])
def test_outputs_losses_and_gradients_are_the_official_ones(reference, case, mode, monkeypatch):
    monkeypatch.setattr(moe, "standard_normal", lambda like: reference["noise"])
    k, factor, priority = case.split("/")
    factor = float(factor[2:])
    layer = layer_of(
        reference, k=int(k[1:]), capacity_factor=factor, eval_capacity_factor=factor, batch_priority=priority == "bpr1"
    ).train(mode == "train")
    inputs = reference["inputs"].clone().requires_grad_()
    out = {}
    outputs = layer(inputs, out)
    main, auxiliary = (outputs * reference["cotangent"]).sum(), auxiliary_loss(out)
    expected = f"{case}/{mode}"
    assert_close(outputs, reference[f"{expected}/outputs"], rtol=0, atol=1e-5)
    assert_close(main, reference[f"{expected}/main_loss"], rtol=1e-5, atol=1e-4)
    assert_close(auxiliary, reference[f"{expected}/aux_loss"], rtol=0, atol=1e-6)
    for name, loss in out["routing"].losses.items():
        if (key := f"{expected}/metrics/{name}_loss") in reference:
            assert_close(loss, reference[key], rtol=0, atol=1e-5)
    if mode == "train":
        (main + auxiliary).backward()
        assert_gradients(layer, inputs, reference, f"{expected}/grad_total")
    elif f"{expected}/grad_main/inputs" in reference:
        main.backward()
        assert_gradients(layer, inputs, reference, f"{expected}/grad_main")


@pytest.mark.parametrize(
    "settings", [{"k": 1}, {"k": 2}, {"k": 3, "images_per_group": 0}, {"k": 2, "images_per_group": 3}]
)
def test_without_capacity_every_choice_counts_whatever_the_groups(settings):
    layer = MoE(6, 10, MoEConfig(num_experts=4, **settings))
    x_BTD = torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(0))
    gates = layer.router(x_BTD).softmax(-1)
    top = gates.topk(settings["k"])
    expected = torch.zeros_like(x_BTD)
    for e, expert in enumerate(layer.experts):
        weight = ((top.indices == e) * top.values / top.values.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        expected += weight * expert["fc2"](F.gelu(expert["fc1"](x_BTD)))
    out = {}
    assert_close(layer(x_BTD, out), expected, rtol=0, atol=1e-6)
    assert out["routing"].expert_GSK.shape[0] == 6 // (settings.get("images_per_group", 1) or 6)


def test_a_dropped_token_gets_nothing_and_the_capacity_depends_on_the_mode():
    layer = MoE(2, 3, MoEConfig(num_experts=2, k=1, capacity_factor=0.5, capacity_multiple=1))
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # all tokens want expert 0
    x_BTD = torch.tensor([[[1.0, 0.0], [2.0, 1.0], [3.0, 2.0], [4.0, 3.0]]])
    told, told_eval = {}, {}
    out_BTD = layer.train()(x_BTD, told)  # ceil(4 tokens * 0.5 / 2 experts) = 1 slot
    assert out_BTD[0, 0].abs().min() > 0 and out_BTD[0, 1:].abs().max() == 0
    assert metrics_of(told)[""]["kept"] == 0.25 and metrics_of(told)[""]["load"].tolist() == [1, 0]
    assert layer.eval()(x_BTD, told_eval).abs().min() > 0
    assert metrics_of(told_eval)[""]["kept"] == 1


class Alone(torch.nn.Module):
    """A block that is its MoE layer."""

    routes = True

    def __init__(self, layer):
        super().__init__()
        self.mlp = layer

    def forward(self, x, out=None):
        return self.mlp(x, inside(out, "mlp"))


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_activation_checkpointing_changes_nothing(capacity_factor):
    layer = MoE(6, 10, MoEConfig(num_experts=4, noise_std=1.0, capacity_factor=capacity_factor, dropout=0.3))
    x_BTD = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    results = []
    for recompute in (False, True):
        layer.zero_grad()
        inputs = x_BTD.clone().requires_grad_()
        torch.manual_seed(1)
        out = {}
        outputs = run_blocks({"0": Alone(layer)}, inputs, recompute, out)
        routing = out["blocks"]["0"]["mlp"]["routing"]
        loss = outputs.square().sum() + auxiliary_loss(out)
        loss.backward()
        # recomputation in backward leaves the routing of the forward alone
        assert out["blocks"]["0"]["mlp"]["routing"] is routing
        results.append([loss, inputs.grad, *(p.grad.clone() for p in layer.parameters())])
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert results[0][2].abs().sum() > 0  # the router learns


def test_a_block_that_is_computed_again_sends_its_tokens_where_it_sent_them(monkeypatch):
    """Also when the second forward rounds otherwise and would choose others; and what it decided is let go of."""
    layer = MoE(6, 10, MoEConfig(num_experts=4, capacity_factor=1.0))
    inputs = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    run_blocks({"0": Alone(layer)}, inputs, False)[:, :, 0].sum().backward()
    expected = [p.grad.clone() for p in (inputs, *layer.parameters())]
    for p in (inputs, *layer.parameters()):
        p.grad = None

    made = []
    choose = routing_module._choose

    def other_each_time(gates_GSE, noisy_GSE, *arguments):
        made.append(choose(gates_GSE.roll(len(made), -1), noisy_GSE, *arguments))
        return made[-1]

    monkeypatch.setattr(routing_module, "_choose", other_each_time)
    outputs = run_blocks({"0": Alone(layer)}, inputs, True)
    outputs[:, :, 0].sum().backward()
    assert_close([p.grad for p in (inputs, *layer.parameters())], expected, rtol=0, atol=0)
    (choice,) = map(weakref.ref, made)
    del outputs
    made.clear()
    assert choice() is None


def test_routing_stays_in_float32_under_bfloat16():
    # logits 256 and 257: equal in bfloat16, where the tie would go to expert 0
    layer = MoE(2, 2, MoEConfig(num_experts=2, k=1))
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    x_BTD = torch.tensor([[[256.0, 1.0]]])
    out, out_bf16 = {}, {}
    with torch.autocast("cpu", torch.bfloat16):
        layer(x_BTD, out)
    assert out["routing"].expert_GSK.item() == 1
    outputs = layer.bfloat16()(x_BTD.bfloat16(), out_bf16)
    routing = out_bf16["routing"]
    assert routing.expert_GSK.item() == 1 and routing.weight_GSK.dtype == torch.float32
    assert outputs.dtype == torch.bfloat16


def test_initial_values_depend_on_seed_layer_and_expert_only():
    few, many = (MoE(8, 12, MoEConfig(num_experts=n), layer=3, seed=5).state_dict() for n in (2, 4))
    assert all(torch.equal(few[name], many[name]) for name in few if name.startswith("experts."))
    layers = [MoE(8, 12, MoEConfig(num_experts=2), layer=layer, seed=seed) for layer, seed in ((2, 5), (3, 6))]
    others = [many["experts.1.fc1.weight"], *(layer.experts[0]["fc1"].weight for layer in layers)]
    assert not any(torch.equal(many["experts.0.fc1.weight"], other) for other in others)
    bound = (6 / (8 + 12)) ** 0.5  # Xavier uniform
    assert 0.9 * bound < few["experts.0.fc1.weight"].abs().max() <= bound
    router = MoE(400, 4, MoEConfig(num_experts=8)).router.weight
    assert_close(router.std().item(), 400**-0.5, rtol=0.05, atol=0)  # LeCun normal


def test_auxiliary_loss_sums_layers_and_skips_those_that_did_not_run():
    layers = torch.nn.Sequential(MoE(4, 4, MoEConfig(num_experts=2)), MoE(4, 4, MoEConfig(num_experts=2)))
    out = {}
    assert auxiliary_loss(out) == 0 and metrics_of(out) == {}
    x_BTD = torch.randn(2, 3, 4)
    layers[1](x_BTD, inside(out, "1"))
    one = auxiliary_loss(out)
    assert_close(one, 0.005 * routings(out)["1"].losses["importance"].mean())
    layers[0](x_BTD, inside(out, "0"))
    assert auxiliary_loss(out) > one and sorted(metrics_of(out)) == ["0", "1"]
    assert inside(None, "0") is None


@pytest.mark.parametrize("images, groups", [(8, 1), (12, 3), (7, 7), (1, 1)])
def test_a_plain_model_trains_on_any_batch(images, groups):
    """In the largest groups that fit, gcd(8, images), as in evaluation: 12 images are 3 groups of 4."""
    layer = MoE(4, 6, MoEConfig(num_experts=2, k=1, images_per_group=8, capacity_factor=1.0)).train()
    out = {}
    x_BTD = torch.randn(images, 3, 4, generator=torch.Generator().manual_seed(0))
    (layer(x_BTD, out).square().sum() + auxiliary_loss(out)).backward()
    assert out["routing"].losses["importance"].shape == (groups,)
    assert layer.router.weight.grad.isfinite().all() and layer.router.weight.grad.any()


def test_a_forward_leaves_nothing_in_the_layer():
    layer = MoE(4, 4, MoEConfig(num_experts=2))
    before = layer.__dict__.keys() | layer._buffers.keys()
    layer(torch.randn(2, 3, 4), {})
    assert layer.__dict__.keys() | layer._buffers.keys() == before
    copy.deepcopy(layer)  # tensors with a graph cannot be copied


def test_presets_are_the_published_ones():
    assert (official().renormalize, official().noise_std, official().load_weight) == (False, 1.0, 0.005)
    assert (paper(k=1).k, paper().router_bias, paper().capacity_factor) == (1, True, None)
    layer = MoE(4, 4, paper(num_experts=2))
    out = {}
    layer(torch.randn(1, 3, 4), out)
    assert auxiliary_loss(out) == 0 and layer.router.bias.abs().sum() == 0


def test_full_state_is_strict_and_plain_on_a_plain_model():
    layer, other = (MoE(4, 4, MoEConfig(num_experts=2), seed=seed) for seed in (0, 1))
    state = full_state_dict(layer)
    load_full_state_dict(other, state)
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match=r"lacks 1 of 9 .*experts.1.fc2.bias"):
        load_full_state_dict(other, {name: value for name, value in state.items() if name != "experts.1.fc2.bias"})
    with pytest.raises(ValueError, match=r"lacks, among them \['experts.2.fc1.bias'\]"):
        load_full_state_dict(other, state | {"experts.2.fc1.bias": torch.zeros(4)})


def test_what_makes_no_sense_is_refused():
    over_ranks = MoE(4, 4, MoEConfig(images_per_group=2))
    over_ranks.whole_groups = True  # as DeepSpeed's gate has it
    with pytest.raises(ValueError, match="3 images do not make groups of images_per_group = 2"):
        over_ranks(torch.zeros(3, 2, 4))
    with pytest.raises(ValueError, match="eval_capacity_factor must be above 0"):
        MoEConfig(eval_capacity_factor=0)
    with pytest.raises(ValueError, match="relu"):
        MoE(4, 4, MoEConfig(), act="relu")
