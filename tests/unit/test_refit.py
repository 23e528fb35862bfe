"""Modules taught apart, fitted to each other when they are put together."""

import copy

import pytest
import torch
from timm.layers import LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.experts import refit as file
from models.experts.refit import refit, refit_flops
from models.flops import num_tokens
from models.modules.basis import Basis
from models.modules.stages import split
from models.modules.stitch import assemble_student, build_student_modules
from models.modules.tokens import Rope
from models.moe.layer import MoE, MoEConfig
from models.vmoe.model import VMoE, VMoEConfig

TEACHER_WIDTH = 32
DEPTHS = (1, 2, 1)


@pytest.fixture(autouse=True)
def same_models_every_time():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def images(count=48, batch=16):
    return list(torch.randn(count, 3, 32, 32).split(batch))


def pair(depths=DEPTHS, teacher_depths=(1, 1, 1), **changes):
    """The modules of a student between tied stitches, and those of its teacher; 17 tokens."""
    teacher = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=TEACHER_WIDTH, depth=3, num_heads=4, mlp_ratio=2, num_classes=5
    )
    values = {
        "image_size": 32,
        "patch_size": 8,
        "width": 24,
        "depth": sum(DEPTHS),
        "heads": 4,
        "mlp_dim": 40,
        "num_classes": 5,
        "moe_blocks": "every-2",
        "moe": MoEConfig(num_experts=4, k=2),
    }
    student = VMoE(VMoEConfig(**{**values, **changes}))
    for parameter in student.parameters():  # stands for teaching: no product is 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    directions = torch.linalg.qr(torch.randn(TEACHER_WIDTH, TEACHER_WIDTH)).Q
    basis = Basis(torch.randn(TEACHER_WIDTH), directions, torch.ones(TEACHER_WIDTH))
    modules = build_student_modules(student, depths, TEACHER_WIDTH, kind="tied", bases=[basis] * (len(depths) - 1))
    return modules, split(teacher.eval(), teacher_depths)


def states_behind(modules, batches):
    """Of the student that the modules make, behind each of its blocks."""
    student = assemble_student(modules).eval()
    out = {}
    with torch.no_grad():
        student(torch.cat(batches), out, states=range(sum(DEPTHS)))
    return [out["blocks"][str(number)]["state"] for number in range(sum(DEPTHS))]


def relative_error(states, wanted):
    return float((states - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"swiglu": True},
        {"moe": MoEConfig(num_experts=4, k=2, renormalize=False)},
        {"moe": MoEConfig(num_experts=4, k=1, eval_capacity_factor=0.5)},  # some tokens are dropped
        {"pool": "mean"},
        {"layer_scale": 0.1},
        {"num_classes": 0},
        {"rope": Rope(), "heads": 3},
    ],
    ids=["plain", "swiglu", "not renormalised", "capacity", "mean", "LayerScale", "no classes", "rotary"],
)
def test_the_student_comes_nearer_to_its_teacher_at_every_border(changes):
    modules, stages = pair(**changes)
    batches = images()
    before = states_behind(modules, batches)
    with torch.no_grad():
        first = stages[0](torch.cat(batches))
        wanted = [modules[1].pre(first), modules[2].pre(stages[1](first))]
    errors = refit(modules, stages, batches)
    after = states_behind(modules, batches)
    for border, block in enumerate((0, 2)):
        found = relative_error(after[block], wanted[border])
        assert found < 0.9 * relative_error(before[block], wanted[border])
        assert errors[border][str(block)] == pytest.approx(found, rel=1e-4)
    assert [sorted(of_module) for of_module in errors] == [["0"], ["1", "2"], ["3"]]


def test_nothing_changes_where_nothing_is_missing():
    modules, stages = pair(depths=(sum(DEPTHS),), teacher_depths=(3,))  # one module: it gets what it was taught on
    before = copy.deepcopy(modules[0].state_dict())
    errors = refit(modules, stages, images())
    assert all(torch.equal(value, before[name]) for name, value in modules[0].state_dict().items())
    assert set(errors[0].values()) == {0.0}


def test_what_is_written_is_the_least_squares_solution(monkeypatch):
    """What is still missing behind a block has nothing to do any more with what its last products read."""
    monkeypatch.setattr(file, "NEAR", 1e-9)
    modules, stages = pair(depths=(1, 3), teacher_depths=(1, 2), moe_blocks="none")
    batches = images(200, batch=50)  # 3,400 tokens
    refit(modules, stages, batches)
    block = modules[0].stage.blocks["0"]
    with torch.no_grad():
        x = torch.cat(batches)
        wanted = modules[1].pre(stages[0](x))
        real = states_behind(modules, batches)[0]
        read = {}
        hook = block.mlp.fc2.register_forward_pre_hook(lambda _, given: read.update(hidden=given[0]))
        modules[0](x)
        hook.remove()
    missing, hidden = ((state - state.mean((0, 1))).flatten(0, 1).double() for state in (wanted - real, read["hidden"]))
    assert (wanted - real).mean((0, 1)).abs().max() < 1e-4
    correlation = (hidden.T @ missing) / (hidden.norm(dim=0)[:, None] * missing.norm(dim=0))
    assert correlation.abs().max() < 1e-3


def test_the_class_token_that_the_head_reads_counts_as_much_as_all_others(monkeypatch):
    errors = {}
    for name in ("half", "like all"):
        torch.manual_seed(1)
        if name == "like all":
            monkeypatch.setattr(file, "class_token_half", lambda states: [None] * len(states))
        modules, stages = pair()
        batches = images(100, batch=50)
        with torch.no_grad():
            wanted = modules[2].stage.blocks["3"](modules[2].pre(stages[1](stages[0](torch.cat(batches)))))[:, 0]
        refit(modules, stages, batches)
        errors[name] = relative_error(states_behind(modules, batches)[3][:, 0], wanted)
    assert errors["half"] < errors["like all"]


@pytest.mark.parametrize("gamma", [0.3, 0.0])
def test_a_layer_scale_is_taken_into_account(gamma):
    """It is the student whose products have the scale in them, and one that is 0 stays as it is."""
    modules, stages = pair(layer_scale=1.0, moe_blocks="none")
    folded = copy.deepcopy(modules)
    for scaled, plain in zip(modules, folded):
        for block, other in zip(scaled.stage.blocks.values(), plain.stage.blocks.values()):
            for name, layer in (("ls1", other.attn.proj), ("ls2", other.mlp.fc2)):
                assert isinstance(getattr(block, name), LayerScale)
                getattr(block, name).gamma.data.fill_(gamma)
                getattr(other, name).gamma.data.fill_(1.0)
                layer.weight.data *= gamma
                layer.bias.data *= gamma
    batches = images()
    before = copy.deepcopy(modules[0].state_dict())
    refit(modules, stages, batches)
    if gamma == 0:
        assert all(torch.equal(value, before[name]) for name, value in modules[0].state_dict().items())
        return
    refit(folded, stages, batches)
    for scaled, plain in zip(states_behind(modules, batches), states_behind(folded, batches)):
        torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-3)


def test_an_expert_that_nobody_visits_stays_as_it_was_taught():
    modules, stages = pair(moe=MoEConfig(num_experts=4, k=1, router_bias=True))
    experts = []
    for module in modules:
        for block in module.stage.blocks.values():
            if isinstance(block.mlp, MoE):
                block.mlp.router.bias.data[2] = -100.0
                experts.append(block.mlp.experts[2])
    before = copy.deepcopy([expert.state_dict() for expert in experts])
    refit(modules, stages, images())
    for expert, old in zip(experts, before):
        assert all(torch.equal(value, old[name]) for name, value in expert.state_dict().items())


def test_the_teacher_and_the_modes_are_left_alone():
    modules, stages = pair()
    modules[0].train()
    modules[1].eval()
    before = copy.deepcopy([stage.state_dict() for stage in stages])
    refit(modules, stages, images())
    assert [module.training for module in modules[:2]] == [True, False]
    for stage, old in zip(stages, before):
        assert all(torch.equal(value, old[name]) for name, value in stage.state_dict().items())


@pytest.mark.parametrize("swiglu", [False, True])
def test_its_cost_is_what_torch_counts(swiglu):
    modules, stages = pair(swiglu=swiglu)
    batches = images(64, batch=32)
    tokens = num_tokens(modules[0].stage)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        refit(modules, stages, batches)
    assert sum(refit_flops(modules, stages, tokens)) * 64 == pytest.approx(counted.get_total_flops(), rel=0.02)
