"""The NAC against numbers of the public code (tests/fixtures/nac, kamanphoebe/m2mKD 067fa1f), and what we add."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector
from torch.utils.flop_counter import FlopCounterMode

from models.flops import flops
from models.moe.out import auxiliary_loss
from models.nac import NAC, PRESETS, NACConfig, family, student_modules
from models.nac.attention import ModulatedAttention, ReadInAttention
from models.nac.circuit import circuit
from models.nac.family import OF_MODULES
from models.nac.graphs import Graph, fit_steps, fitted, quality
from models.nac.kernel import Kernel, distance, link_probability, log_sample
from models.nac.layers import ModFC, ModFFN, drop_path, noisy_codes
from models.nac.model import Exchange, ReadIn, pool
from models.nac.names import from_reference, our_name
from models.nac.regularisers import block_model_loss, graphon, hinge_repulsion, matched_rows
from trainer.config.student import NACConfig as Knobs
from trainer.objectives import Classify

FIXTURES = Path(__file__).parents[1] / "fixtures" / "nac"
EXACT = {"rtol": 0, "atol": 1e-9}  # float64
SINGLE = {"rtol": 0, "atol": 1e-4}  # float32
SMALL = {
    "image_size": 32,
    "num_classes": 5,
    "state_dim": 8,
    "code_dim": 6,
    "signature_dim": 6,
    "heads": 2,
    "head_dim": 4,
    "input_latents": 4,
    "mediator_latents": 12,
    "output_latents": 3,
    "propagators": 3,
    "ffn_factor": 2.0,
    "tokenizer": "nano",
    "grid_dim": 5,
    "fit_recall": 0.0,
    "seed": 3,
}
GRAPHS = {
    "ba_n256_m2": (Graph("scale-free", degree=2), 256),
    "ba_n768_m6": (Graph("scale-free", degree=6), 768),
    "planted_l8_k32_pin.9_pout.2": (Graph("planted-partition", clusters=8), 256),
    "planted_l12_k64_pin.9_pout.2": (Graph("planted-partition", clusters=12), 768),
    "ring_8x32": (Graph("ring-of-cliques", clusters=8), 256),
    "ring_12x64": (Graph("ring-of-cliques", clusters=12), 768),
    "erdos_n256_p.1": (Graph("erdos-renyi"), 256),
    "erdos_n768_p.1": (Graph("erdos-renyi"), 768),
    "watts_n256_k26_p.4": (Graph("watts-strogatz", degree=0, p=0.4), 256),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("M2MKD_CACHE", str(tmp_path / "cache"))
    fitted.cache_clear()


@pytest.fixture(scope="module")
def small():
    return NAC(NACConfig(**SMALL)).eval()


def of_file(name):
    return torch.load(FIXTURES / f"{name}.pt", weights_only=True)


def check(module, case, call, **tolerance):
    """Output and all gradients of sum(output * cotangent), under our names."""
    tolerance = tolerance or EXACT
    mediator = "layers.0.attn.gamma" in module.state_dict()
    # the reference saves neither codes nor states of its students: our buffers stay
    module.load_state_dict(from_reference(case["state_dict"], mediator) | dict(module.named_buffers()))
    inputs = {name: value.clone().requires_grad_() for name, value in case["inputs"].items()}
    output = call(module, inputs)
    torch.testing.assert_close(output, case["output"].reshape(output.shape), **tolerance)
    (output * case["cotangent"].reshape(output.shape)).sum().backward()
    for name, expected in case["grad_inputs"].items():
        torch.testing.assert_close(inputs[name].grad, expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    parameters = dict(module.named_parameters())
    expected = from_reference(case["grad_params"], mediator)
    assert expected.keys() == parameters.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(parameters[name].grad, gradient, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_modulated_linear_layers():
    for case in of_file("modfc")["cases"]:
        config = case["config"]
        # the public layer's defaults: layer norm, no 1, a fixed gain of 1
        layer = ModFC(
            config["in_features"],
            config["out_features"],
            config["context_features"],
            config["bias"],
            gain=config.get("scale_gain", 1.0),
            learn_gain=config.get("learnable_scale_gain", False),
            norm=config.get("scale_normalization_type", "layernorm"),
            add_one=config.get("add_one_to_scale", False),
        ).double()
        check(layer, case, lambda m, i: m(i["input"], i["context"]))


def test_read_in_in_its_absorbed_form():
    fixture = of_file("read_in")
    for case in fixture["attention_cases"]:
        c = case["config"]
        attention = ReadInAttention(
            c["input_dim"],
            c["state_dim"],
            c["code_dim"],
            c["num_heads"],
            c["head_dim"],
            residual=c["include_residual"],
            qkv_bias=c["qkv_bias"],
        ).double()
        # a bias of the keys would get no gradient: it is left out
        reference = case["grad_params"].get("key_compiler.native_bias", torch.zeros(1))
        assert reference.abs().max() < 1e-12
        check(attention, case, _read_in)
    c = fixture["block"]["config"]
    config = NACConfig(**{**SMALL, "state_dim": 8, "code_dim": c["code_dim"], "grid_dim": c["input_dim"] - 4})
    check(ReadIn(config).double(), fixture["block"], _read_in)


def _read_in(module, inputs):
    return module(inputs["receiver_states"], inputs["receiver_codes"], inputs["sender_states"])


def test_kernels():
    fixture = of_file("kernel")
    for case in fixture["cases"]:
        config = case["config"]
        receivers = case["receiver_signatures"].requires_grad_()
        senders = case["sender_signatures"].requires_grad_()
        kernel = Kernel(config["truncation"]).double()
        nn.init.constant_(kernel.bandwidth, config["bandwidth"])
        d = distance(receivers, senders)
        through = config["truncation_implementation"] == "masked" and config["straight_through"]
        link = link_probability(d, kernel.bandwidth, config["truncation"], straight_through=through)
        expected = case["outputs"]
        torch.testing.assert_close(d, expected["distance"], **EXACT)
        torch.testing.assert_close(link, expected["kernel"], **EXACT)
        torch.testing.assert_close(link / link.sum(-1, keepdim=True), expected["kernel_normalised"], **EXACT)
        if "log_kernel" in expected:
            torch.testing.assert_close(kernel(d), expected["log_kernel"], **EXACT)
            normalised = kernel(d).log_softmax(-1)
            torch.testing.assert_close(normalised, expected["log_kernel_normalised"], **EXACT)
        wanted = case["grad_of_kernel"]
        gradients = torch.autograd.grad(link, (receivers, senders, kernel.bandwidth), wanted["cotangent"])
        for gradient, name in zip(gradients, ("receiver", "sender", "bandwidth")):
            torch.testing.assert_close(gradient, wanted[name].reshape(gradient.shape), **EXACT)
    case = fixture["stochastic"]
    receivers, senders = case["receiver_signatures"].requires_grad_(), case["sender_signatures"].requires_grad_()
    kernel = Kernel(case["config"]["truncation"], case["config"]["temperature"])
    nn.init.constant_(kernel.bandwidth, case["config"]["bandwidth"])
    sample = kernel.sampled(distance(receivers, senders), case["uniform"])
    torch.testing.assert_close(sample.log_softmax(-1), case["log_sample_normalised"], **SINGLE)
    torch.testing.assert_close(sample, case["log_sample"], **SINGLE)
    wanted = case["grad"]
    gradients = torch.autograd.grad(sample.log_softmax(-1), (receivers, senders, kernel.bandwidth), wanted["cotangent"])
    for gradient, name in zip(gradients, ("receiver", "sender", "bandwidth")):
        torch.testing.assert_close(gradient, wanted[name].reshape(gradient.shape), **SINGLE)


class WithKernel(nn.Module):
    """An attention and its kernel under one roof, as the public code has them."""

    def __init__(self, config):
        super().__init__()
        sizes = (config["state_dim"], config["code_dim"], config["num_heads"], config["head_dim"])
        residual, shared, bias = config["include_residual"], config["share_layernorm"], config["qkv_bias"]
        self.attn = ModulatedAttention(*sizes, share_norm=shared, residual=residual, qkv_bias=bias)
        self.kernel = Kernel(config["truncation"], config.get("temperature", 0.5))

    def forward(self, inputs, uniform=None):
        d = distance(inputs["receiver_signatures"], inputs["sender_signatures"])
        log_kernel = self.kernel(d) if uniform is None else self.kernel.sampled(d, uniform)
        receivers = (inputs["receiver_states"], inputs["receiver_codes"])
        return self.attn(*receivers, inputs["sender_states"], inputs["sender_codes"], log_kernel)


def _one_roof(case):
    prefix = {"kernel.bandwidth": "latent_attention.kernel.bandwidth"}
    for part in ("state_dict", "grad_params"):
        case[part] = {prefix.get(name, f"latent_attention.{name}"): value for name, value in case[part].items()}
    return case


def test_attention_under_a_kernel():
    fixture = of_file("kernel_attention")
    for case in fixture["cases"]:
        check(WithKernel(case["config"]).double(), _one_roof(case), lambda m, i: m(i))
    case = fixture["stochastic"]
    check(WithKernel(case["config"]), _one_roof(case), lambda m, i: m(i, case["uniform"]), **SINGLE)


def test_student_modules():
    fixture = of_file("students")
    config = NACConfig(**{**SMALL, "num_classes": fixture["readout"]["config"]["output_dim"], "propagators": 1})
    modules = student_modules(NAC(config), (1, 1, 1), 10, seed=0)
    read_in, mediator, read_out = (module.double().eval() for module in modules)
    check(read_in, fixture["readin"], lambda m, i: m(i["image"], code=i["codes"], state=i["states"]))
    check(mediator, fixture["mediator"], lambda m, i: m(i["tokens"], code=i["codes"]))
    check(read_out, fixture["readout"], lambda m, i: m(i["tokens"], code=i["codes"], state=i["states"]))


class Pooling(nn.Module):
    """Pooling and head, apart from the NAC they are parts of."""

    def __init__(self, config, gumbel):
        super().__init__()
        self.confidence = nn.Linear(config["state_dim"], 1)
        self.head = nn.Linear(config["state_dim"], config["output_dim"])
        self.options = {"gumbel": gumbel, "temperature": config["temperature"]}
        self.options["hard"] = config["softmax_type"] == "gumbel-hard"

    def forward(self, states):
        return self.head(pool(states, self.confidence, **self.options))


def test_pooling():
    for case in of_file("output_pooling").values():
        check(Pooling(case["config"], case.get("gumbel")).double(), case, lambda m, i: m(i["states"]))


def test_a_read_out_with_a_head_by_hand(small):
    block = Exchange(small.config, Kernel(), 0.0, share_norm=False, residual=False, head=5)
    bare = Exchange(small.config, Kernel(), 0.0, share_norm=False, residual=False)
    for module in block.modules():
        if isinstance(module, ModFC):
            module.initialise(0, "any")
    bare.load_state_dict({name: value for name, value in block.state_dict().items() if "head" not in name})
    states, senders, codes = torch.randn(2, 3, 8), torch.randn(2, 7, 8), (torch.randn(3, 6), torch.randn(7, 6))
    arguments = (states, senders, codes, torch.rand(3, 7))
    expected = block.head(block.head_norm(bare(*arguments)), codes[0])
    assert torch.equal(block(*arguments), expected) and expected.shape == (2, 3, 5)


# of the README of the public numbers -> ours
NAMES = {
    "input_tokenizer.backbone.downsample_layers.0.0.weight": "tokenizer.stem.0.weight",
    "input_tokenizer.backbone.downsample_layers.1.1.bias": "tokenizer.stages.1.downsample.1.bias",
    "input_tokenizer.backbone.stages.1.0.dwconv.weight": "tokenizer.stages.1.blocks.0.conv_dw.weight",
    "input_tokenizer.backbone.stages.0.0.pwconv2.bias": "tokenizer.stages.0.blocks.0.mlp.fc2.bias",
    "input_tokenizer.backbone.stages.0.0.norm.weight": "tokenizer.stages.0.blocks.0.norm.weight",
    "input_tokenizer.backbone.stages.0.0.gamma": "tokenizer.stages.0.blocks.0.gamma",
    "input_tokenizer.positional_grid.grid": "tokenizer.grid",
    "input_latents.signatures_": "latents.input.signatures",
    "mediator_latents.codes_": "latents.mediator.codes",
    "latent_seeder.layernorm.weight": "seeder.norm.weight",
    "latent_seeder.code_to_state_mu.weight": "seeder.mu.weight",
    "latent_seeder.code_to_state_logvar.bias": "seeder.logvar.bias",
    "read_in.read_in_attention.query_compiler.native_weight": "read_in.attn.query.weight",
    "read_in.read_in_attention.sender_layernorm.bias": "read_in.attn.sender_norm.bias",
    "read_in.ffn.ffn.0.scale.weight": "read_in.ffn.fc1.scale.weight",
    "read_in.ffn.layernorm.weight": "read_in.ffn.norm.weight",
    "propagators.2.latent_attention.kernel.bandwidth": "propagators.2.kernel.bandwidth",
    "propagators.2.latent_attention.exit_layer.scale_gain": "propagators.2.attn.exit.gain",
    "propagators.2.latent_attention.receiver_layernorm.weight": "propagators.2.attn.norm.weight",
    "propagators.2.latent_attention.layer_scale.gamma": "propagators.2.attn.gamma",
    "propagators.2.ffn.ffn.2.native_bias": "propagators.2.ffn.fc2.bias",
    "propagators.2.ffn.layer_scale.gamma": "propagators.2.ffn.gamma",
    "read_out.latent_attention.kernel.bandwidth": "read_out.kernel.bandwidth",
    "output_tokenizer.confidence_scorer.weight": "confidence.weight",
    "output_tokenizer.to_logits.bias": "head.bias",
}


def test_names_of_the_public_code_become_ours(small):
    state = small.state_dict()
    for theirs, ours in NAMES.items():
        assert our_name(theirs) == ours
        assert ours in state
    assert our_name("read_out.head.0.module.weight") == "read_out.head_norm.weight"
    assert our_name("read_out.head.1.native_weight") == "read_out.head.weight"


def test_regularisers():
    fixture = of_file("regularisers")
    groups = [fixture[f"{group}_signatures"].requires_grad_() for group in ("input", "mediator", "output")]
    for radius, wanted in fixture["hinge"].items():
        loss = hinge_repulsion(torch.cat(groups), float(radius))
        torch.testing.assert_close(loss, wanted["loss"], **EXACT)
        for gradient, group in zip(torch.autograd.grad(loss, groups), ("input", "mediator", "output")):
            torch.testing.assert_close(gradient, wanted[f"grad_{group}"], **EXACT)
    wanted = fixture["sbm"]
    signatures = fixture["sbm_signatures_float32"].requires_grad_()
    target = graphon(8, wanted["num_clusters"], wanted["p_in"], wanted["p_out"])
    assert torch.equal(target, wanted["graphon"])
    kernel = Kernel(0.9)
    link = link_probability(distance(signatures, signatures), kernel.bandwidth, 0.9)
    assert torch.equal(matched_rows(link, target), wanted["assignment"])
    for kernels, name in (([kernel], "one_kernel"), ([kernel, kernel], "two_kernels")):
        loss = block_model_loss(signatures, kernels, target)
        torch.testing.assert_close(loss, wanted[f"loss_{name}_rows_only"], rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, signatures)
    torch.testing.assert_close(gradient, wanted["grad_mediator"], rtol=0, atol=1e-6)


def test_graphs_to_the_bit():
    fixture = np.load(FIXTURES / "graphs.npz")
    compared = [key for key in fixture if "|seed" in key and not key.endswith("|n")]
    assert len(compared) == 16
    for key in compared:
        name, seed = key.split("|seed")
        graph, count = GRAPHS[name]
        adjacency = graph.adjacency(count, int(seed)).numpy().astype(bool)
        assert np.array_equal(np.packbits(adjacency, axis=1), fixture[key]), key


@pytest.mark.parametrize(
    "preset, classes, image, whole, parts",
    [
        ("tiny-imagenet", 200, 64, 26_703_342, (4_093_286, 3_496_070, 3_389_423)),
        ("imagenet", 1000, 224, 37_589_294, (5_898_246, 4_725_510, 4_583_407)),
    ],
)
def test_parameter_counts(preset, classes, image, whole, parts):
    with torch.device("meta"):
        config = NACConfig(image_size=image, num_classes=classes, **PRESETS[preset])
        assert parameters_to_vector(NAC(config).parameters()).numel() == whole
        # the published students take 224 pixels and 1000 classes at either size
        teachers = NAC(replace(config, image_size=224, num_classes=1000))
        modules = student_modules(teachers, (1,) * 10, 1280, seed=0)
    counts = [sum(p.numel() for p in module.parameters()) for module in modules]
    assert counts == [parts[0], *[parts[1]] * 8, parts[2]]


def test_a_mediator_module_is_its_propagator_without_kernel_and_assembly_shares_its_weights(small):
    modules = student_modules(small, (1, 2, 1, 1), 10, seed=7)
    assert [len(module.layers) for module in modules[1:-1]] == [2, 1]
    assert modules[2].layers[0]["attn"] is small.propagators[2].attn
    again = student_modules(small, (1, 2, 1, 1), 10, seed=7)
    for module, twin in zip(modules, again):
        for name, value in module.state_dict().items():
            assert torch.equal(value, twin.state_dict()[name]), name
    assert "code" in modules[1].state_dict() and "state" in modules[3].state_dict()
    assert not torch.equal(modules[1].code, modules[2].code)


@pytest.mark.parametrize(
    "depths, message",
    [
        ((1, 1), "fewer|at least"),
        ((1, 1, 1, 1, 1, 1), "3 propagators"),
        ((1, 2, 1), "make 3 together"),
        ((2, 2, 1), "1 each"),
    ],
)
def test_modules_that_a_nac_has_not(small, depths, message):
    with pytest.raises(ValueError, match=message):
        student_modules(small, depths, 10, seed=0)


def test_one_mediator_layer_for_several_propagators(small):
    """Module 1 stands for propagators 0 and 1 by a layer of its own, module 2 for the last one."""
    nac = NAC(small.config)
    in_a_row = student_modules(nac, (1, 2, 1, 1), 10, seed=7)
    alone = student_modules(nac, (1, 1, 2, 1), 10, seed=7)[1]  # propagator 0
    modules = student_modules(nac, (1, 2, 1, 1), 10, seed=7, one_layer=True)
    one = modules[1]
    tokens = torch.randn(2, 5, 10)
    with torch.no_grad():
        assert torch.equal(one.eval()(tokens), alone.eval()(tokens))
    assert one.count_flops(5) == alone.count_flops(5) and len(one.layers) == 1 and len(modules[2].layers) == 1
    assert in_a_row[1].count_flops(5).trained > one.count_flops(5).trained
    first, second, third = nac.propagators
    assert not torch.equal(first.attn.query.weight, second.attn.query.weight)
    last = {name: value.clone() for name, value in third.state_dict().items()}
    with torch.no_grad():
        for parameter in one.parameters():
            parameter += 0.5  # learned
        second.kernel.bandwidth.fill_(0.3)
    assert family.assemble(modules, "drop", None) is nac
    for name, value in second.state_dict().items():
        is_equal = torch.equal(value, first.state_dict()[name])
        assert is_equal != (name == "kernel.bandwidth"), name
    assert all(torch.equal(value, last[name]) for name, value in third.state_dict().items())
    # each is its own from here on
    with torch.no_grad():
        first.attn.query.weight.zero_()
    assert second.attn.query.weight.abs().sum() > 0


def test_receivers_that_hear_nobody_get_a_zero_message():
    attention = ModulatedAttention(8, 6, 2, 4, share_norm=True, residual=True)
    nn.init.constant_(attention.exit.bias, 0.5)
    states, codes = torch.randn(2, 3, 8, requires_grad=True), torch.randn(3, 6)
    for layer in (attention.query, attention.key, attention.value, attention.exit):
        nn.init.normal_(layer.weight, std=0.3)
    log_kernel = torch.zeros(3, 3)
    log_kernel[1] = -torch.inf
    output = attention(states, codes, states, codes, log_kernel)
    # an empty sum, through the exit layer: gamma x its bias, 0.1 x 0.5
    torch.testing.assert_close(output[:, 1], states[:, 1] + 0.05)
    output.sum().backward()
    assert states.grad.isfinite().all()


def test_evaluation_is_deterministic_unless_the_published_one_is_asked_for(small):
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(small(images), small(images))
    noisy = NAC(replace(small.config, noisy_evaluation=True)).eval()
    noisy.load_state_dict(small.state_dict())
    assert not torch.equal(noisy(images), noisy(images))
    draws = {"seed.input": torch.zeros(2, 4, 8), "seed.mediator": torch.zeros(2, 12, 8)}
    draws |= {"seed.output": torch.zeros(2, 3, 8), "gumbel": torch.zeros(2, 3)}
    torch.testing.assert_close(noisy(images, draws=draws), small(images))
    moved = small(images, draws={"gumbel": torch.tensor([[9.0, 0, 0], [0, 0, 9.0]])})
    assert not torch.equal(moved, small(images))


def test_initial_values_hang_on_the_seed_alone(small):
    torch.rand(17)
    again, other = NAC(small.config), NAC(replace(small.config, seed=4))
    for name, value in small.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(other.head.weight, small.head.weight)
    assert small.read_in.attn.gamma.eq(1).all() and small.read_in.ffn.gamma.eq(torch.tensor(0.1)).all()
    assert small.seeder.logvar.bias.eq(-5).all()


def test_training_draws_links_codes_and_paths_and_tells_its_regularisers(small):
    nac = NAC(replace(small.config, graph="planted-partition", graph_clusters=4, block_model_weight=1.0)).train()
    images, out = torch.randn(2, 3, 32, 32), {}
    torch.manual_seed(0)
    first = nac(images, out)
    torch.manual_seed(1)
    assert not torch.equal(first, nac(images))
    assert out["regularisers"].keys() == {"hinge", "block_model"}
    (first.square().sum() + auxiliary_loss(out)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in nac.parameters())
    torch.testing.assert_close(auxiliary_loss(out), sum(out["regularisers"].values()))


def test_recomputed_propagators_give_the_same_gradient(small):
    images, gradients = torch.randn(2, 3, 32, 32), []
    for recompute in (False, True):
        nac = NAC(small.config).train()
        nac.set_grad_checkpointing(recompute)
        torch.manual_seed(0)
        nac(images).square().sum().backward()
        gradients.append(parameters_to_vector(p.grad for p in nac.parameters()))
    assert torch.equal(*gradients)


def test_path_drop_and_noise_of_codes_by_hand():
    change = torch.ones(3, 2, 4)
    # kept where floor(1 - 0.4 + u) = 1, so from u = 0.4 on; then divided by 0.6
    dropped = drop_path(change, 0.4, {"p": torch.tensor([0.1, 0.4, 0.9])}, "p")
    torch.testing.assert_close(dropped[:, 0, 0], torch.tensor([0, 1 / 0.6, 1 / 0.6]))
    code = torch.tensor([[2.0, -4.0]], requires_grad=True)
    # c + (2u - 1) 0.05 |c|: 2 + 0.1, -4 - 0.2
    noisy = noisy_codes(code, 0.05, {"c": torch.tensor([[1.0, 0.0]])}, "c")
    torch.testing.assert_close(noisy, torch.tensor([[2.1, -4.2]]))
    noisy.sum().backward()
    assert code.grad.eq(1).all()


def test_feed_forward_without_residual_and_with_plain_gelu():
    ffn = ModFFN(8, 6, 4 / 3, geglu=False, residual=False)
    assert ffn.fc1.weight.shape == (11, 8) and ffn.fc2.weight.shape == (8, 11)  # round(8 x 1.333) = 11
    nn.init.zeros_(ffn.fc2.weight)
    nn.init.constant_(ffn.fc2.bias, 2.0)
    nn.init.normal_(ffn.fc1.weight)
    nn.init.zeros_(ffn.fc1.bias)
    torch.testing.assert_close(ffn(torch.randn(1, 2, 8), torch.randn(1, 6)), torch.full((1, 2, 8), 0.2))


def test_pooling_by_hand():
    confidence = nn.Linear(2, 1)
    nn.init.zeros_(confidence.weight)
    nn.init.zeros_(confidence.bias)
    states = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(pool(states, confidence), torch.tensor([[0.5, 0.5]]))
    # softmax((0.7 ln 3, 0) / 0.7) = 3/4, 1/4
    gumbel = torch.tensor([[0.7 * np.log(3), 0.0]])
    torch.testing.assert_close(pool(states, confidence, gumbel, 0.7), torch.tensor([[0.75, 0.25]]))
    torch.testing.assert_close(pool(states, confidence, gumbel, 0.7, hard=True), torch.tensor([[1.0, 0.0]]))


def test_a_sample_by_hand():
    # u = 0.5 leaves log P - log(1 - P) = log 3; over 0.5 that is log 9, and sigmoid(log 9) = 0.9
    sample = log_sample(torch.tensor([[0.75]]), torch.full((1, 1, 1), 0.5), 0.5)
    torch.testing.assert_close(sample.exp(), torch.full((1, 1, 1), 0.9))


def test_signatures_are_fitted_until_the_graph_is_met_and_kept(tmp_path):
    config = NACConfig(**{**SMALL, "graph": "ring-of-cliques", "graph_clusters": 3, "fit_recall": 1.0})
    fit = config.fit()
    adjacency = config.graph_prior().adjacency(12, config.seed)
    assert quality(fit.signatures_NS, adjacency, config.truncation) == (1.0, 1.0)
    assert (fit.recall, fit.precision) == (1.0, 1.0)
    (kept,) = (tmp_path / "cache").iterdir()
    written = kept.stat().st_mtime_ns
    fitted.cache_clear()
    again = config.fit()
    assert torch.equal(again.signatures_NS, fit.signatures_NS) and kept.stat().st_mtime_ns == written


def test_published_fit_is_a_thousand_steps_of_adam():
    config = NACConfig(**{**SMALL, "fit_threshold": 0.8})
    fit = config.fit()
    assert fit.steps == 1000
    start = nn.init.orthogonal_(torch.empty(12, 6), generator=torch.Generator().manual_seed(3))
    adjacency = config.graph_prior().adjacency(12, 3)
    assert torch.equal(fit_steps(start, adjacency, 0.8, 1000), fit.signatures_NS)


# half of all pairs linked at random, in three dimensions
UNFIT = {
    "graph": "erdos-renyi",
    "graph_p": 0.5,
    "mediator_latents": 24,
    "signature_dim": 3,
    "fit_recall": 1.0,
    "fit_steps": 1000,
}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"signature_dim": 1}, "signature_dim must be at least 2"),
        ({"mediator_latents": 240, "signature_dim": 8}, "signature_dim 8 is too narrow"),
        (UNFIT, "not fitted within fit_steps 1000"),
        ({"graph": "planted-partition", "graph_clusters": 5}, "does not divide 12"),
        ({"graph": "hypercube"}, "power of two"),
        ({"graph": "star"}, "use one of scale-free"),
        ({"image_size": 36}, "image_size 36 makes no grid"),
        ({"block_model_weight": 1.0}, "block_model_weight"),
        ({"fit_threshold": 0.95}, "at most truncation"),
        ({"num_classes": 0}, "num_classes"),
        ({"graph_mediators": 20}, "kept must name each of the 12 mediators of a pruned circuit"),
        ({"kept": tuple(range(12))}, r"graph_mediators \(0\)"),
        ({"graph_mediators": 12, "kept": (0,) * 11 + (12,)}, "kept must name each"),
        ({"kept": 5}, "kept must name each"),
        ({"graph_mediators": 12, "kept": [[0]] * 12}, "kept must name each"),
        ({"graph_mediators": 10**12}, "graph_mediators must be a whole number from 0 to 100,000"),
        ({"graph_mediators": "12"}, "graph_mediators must be a whole number"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        NACConfig(**{**SMALL, **changes}).fit()


def test_pruned_to_some_mediators(small):
    keep = [0, 2, 5]
    pruned = small.pruned(keep)
    assert pruned.config.mediator_latents == 3
    images = torch.randn(2, 3, 32, 32)
    # by hand: the other mediators cut off from everything, as senders of the circuit and of the read-out
    whole = NAC(small.config).eval()
    whole.load_state_dict(small.state_dict())
    rows = [4 + m for m in range(12) if m not in keep]
    for block in (*whole.propagators, whole.read_out):
        block.kernel.forward = _deaf(block.kernel, rows)
    torch.testing.assert_close(pruned(images), whole(images))
    assert torch.equal(pruned.config.adjacency(), small.config.adjacency()[keep][:, keep])
    # with new weights it starts as what is left of the circuit as it starts, pruned once or twice
    anew = NAC(pruned.config.pruned([0, 2]))
    start = NAC(small.config).latents["mediator"].signatures
    assert torch.equal(anew.latents["mediator"].signatures, start[[0, 5]])
    best = small.connectivity().topk(2).indices.sort().values.tolist()
    assert torch.equal(small.pruned(2).latents["mediator"].codes, small.latents["mediator"].codes[best])
    for wrong in (0, 13, [1, 1], [12]):
        with pytest.raises(ValueError, match="mediators"):
            small.pruned(wrong)


def _deaf(kernel, rows):
    def forward(distance_UW):
        log_kernel = Kernel.forward(kernel, distance_UW)
        return log_kernel.index_fill(1, torch.tensor(rows), -torch.inf)

    return forward


def test_images_of_another_size_take_a_resampled_grid(small):
    assert small(torch.randn(1, 3, 48, 48)).shape == (1, 5)
    nn.init.constant_(small.tokenizer.grid.data, 2.0)
    tokens = small.tokenizer(torch.randn(1, 3, 48, 48))
    assert tokens.shape == (1, 36, 9)
    torch.testing.assert_close(tokens[..., 4:], torch.full((1, 36, 5), 2.0))


def test_read_in_has_no_tensor_of_tokens_receivers_and_a_width():
    attention = ReadInAttention(7, 8, 6, 2, 4)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal largest
            result = op(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else [result]:
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.numel())
            return result

    states, tokens = torch.randn(2, 50, 8, requires_grad=True), torch.randn(2, 90, 7)
    with Watch():
        attention(states, torch.randn(50, 6), tokens).sum().backward()
    assert largest <= 2 * 2 * 50 * 90  # scores: images x heads x receivers x tokens
    assert largest < 2 * 50 * 90 * 7


def test_flops_are_those_torch_counts(small):
    nac = NAC(replace(small.config, hinge_weight=0.0))
    # torch counts the backward of a convolution over single channels as if it were over all: a tokenizer without blocks
    plain = NAC(replace(small.config, hinge_weight=0.0, tokenizer="atto"))
    modules = student_modules(plain, (1, 1, 1, 1, 1), 10, seed=0, receivers=7)
    image, tokens = (3, 32, 32), (7, 10)
    assert flops(nac, 0).forward == _counted(nac, image, backward=False)
    for module, shape in ((plain, image), (modules[0], image), (modules[1], tokens), (modules[4], tokens)):
        assert flops(module, 7).trained == _counted(module, shape, backward=True), type(module).__name__


def _counted(module, shape, backward):
    """What two images cost more than one: codes are scaled, and signatures compared, once a batch."""
    counted = []
    for images in (1, 2):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = module(torch.randn(images, *shape))
            if backward:
                output.sum().backward()
        counted.append(counter.get_total_flops())
    return counted[1] - counted[0]


def test_training_end_to_end_counts_the_regularisers(small):
    nac = NAC(replace(small.config, hinge_radius=1.5)).train()
    classify = Classify(nac, tokens=nac.num_tokens)
    loss, parts = classify(nac, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    # all pairs are within a distance of 1.5: the repulsion is far from 0
    torch.testing.assert_close(parts["balance"], sum(nac.regularisers().values()))
    assert parts["balance"] < -0.1
    torch.testing.assert_close(loss, parts["label"] + parts["balance"])


def test_the_recipes_knobs_are_those_of_the_configuration():
    ours = {f.name: f.default for f in fields(NACConfig)}
    for knob in fields(Knobs):
        if knob.name in OF_MODULES:
            continue
        assert knob.name in ours
        assert knob.default in (None, ours[knob.name]), knob.name
    from_data = {"image_size", "in_chans", "num_classes", "drop_path_rate", "seed", "layer_scale"}
    of_pruning = {"graph_mediators", "kept"}
    assert ours.keys() - {knob.name for knob in fields(Knobs)} == from_data | of_pruning


def test_the_circuit_in_numbers(small):
    images, small = torch.randn(2, 3, 32, 32), NAC(small.config).eval()  # as it starts
    found = circuit(small, images)
    # untrained, it is what it starts as
    assert found["fit"] == found["trained"] and found["mass_before"] == found["mass_after"]
    adjacency = small.config.graph_prior().adjacency(12, small.config.seed)
    assert found["prior"] == adjacency.tolist() and found["edges"] == adjacency.sum() / 2
    # every mediator's attention adds up to 1 over 4 input latents and 12 mediators, and so does each image's use
    assert np.allclose(np.sum(found["mass_after"], axis=1), 1, atol=1e-3) and np.shape(found["mass_after"]) == (12, 16)
    assert np.allclose(np.sum(found["use"], axis=1), 1, atol=1e-3) and np.shape(found["use"]) == (2, 12)
    # its attention weights are those that the attention uses
    exchange = small.propagators[0]
    states, codes = torch.randn(2, 12, 8), small.latents["mediator"].codes
    log_kernel = exchange.kernel(distance(*[small.latents["mediator"].signatures] * 2))
    arguments = (states, codes, states, codes, log_kernel)
    value = exchange.attn.value(exchange.attn.norm(states), codes).unflatten(-1, (2, -1)).transpose(1, 2)
    message = (exchange.attn.weights(*arguments) @ value).transpose(1, 2).flatten(2)
    expected = states + exchange.attn.gamma * exchange.attn.exit(message, codes)
    torch.testing.assert_close(exchange.attn(*arguments), expected)
