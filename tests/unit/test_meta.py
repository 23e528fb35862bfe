"""The meta model: its stages stand in for the teacher's around any one teacher module."""

import pytest
import timm
import torch
from torch import nn
from vit_families import FAMILIES, TINY, every_family, images, taught, tiny

from models.modules.meta import MetaModel, check_pair
from models.modules.stages import assemble, split

DEPTHS = [2, 1, 3]


def states(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@every_family
@pytest.mark.parametrize("init", ["teacher", "scratch"])
@torch.no_grad()
def test_front_and_back_make_forward_and_fit_the_teacher(family, init):
    teacher = tiny(family, depth=6)
    meta = MetaModel.from_teacher(teacher, 3, init=init, teacher_depths=DEPTHS).eval()
    x = images()
    logits = meta(x)
    assert logits.shape == taught(teacher, x).shape
    outputs = meta.hidden_states(x)
    assert len(outputs) == meta.num_modules == 3
    assert torch.equal(outputs[-1], logits)
    assert meta.front(x, 0) is x
    assert meta.back(logits, 2) is logits
    for i in range(3):
        assert torch.equal(meta.back(meta.stages[i](meta.front(x, i)), i), logits)
        if i:
            assert torch.equal(meta.front(x, i), outputs[i - 1])
            assert torch.equal(meta.stages[i](outputs[i - 1]), outputs[i])
    for i, module in enumerate(split(teacher, DEPTHS)):
        hybrid = meta.back(module(meta.front(x, i)), i)
        assert hybrid.shape == logits.shape
        # a teacher module of one block is what the meta model copied
        assert torch.equal(hybrid, logits) == (init == "teacher" and DEPTHS[i] == 1)


@every_family
@torch.no_grad()
def test_teacher_start_copies_the_first_block_of_each_stage(family):
    teacher = tiny(family, depth=6).requires_grad_(False)
    meta = MetaModel.from_teacher(teacher, 3, teacher_depths=DEPTHS)
    assert meta.training and meta.stages[1].training and not teacher.training
    before = states(teacher)
    for i, block in enumerate((0, 2, 3)):  # depths 2, 1, 3 start at these
        assert equal_states(meta.stages[i].blocks[str(i)], teacher.blocks[block])
    assert torch.equal(meta.stages[0].patch_embed.proj.weight, teacher.patch_embed.proj.weight)
    assert equal_states(meta.stages[-1].norm, teacher.norm)
    for parameter in meta.parameters():
        assert parameter.requires_grad
        parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@torch.no_grad()
def test_as_deep_as_the_teacher_is_the_teacher():
    teacher = tiny("deit3", depth=6).requires_grad_(False)
    meta = MetaModel.from_teacher(teacher, 3, blocks_per_module=2, teacher_depths=[2, 2, 2]).eval()
    assert torch.equal(meta(images()), teacher(images()))
    assert list(meta.stages[1].blocks) == ["2", "3"]


@torch.no_grad()
def test_the_teacher_as_its_own_meta_model():
    teacher = tiny("deit3", depth=6).requires_grad_(False)
    meta = MetaModel.from_teacher(teacher, 3, blocks_per_module=0, teacher_depths=DEPTHS).eval()
    assert torch.equal(meta(images()), teacher(images()))
    assert [len(stage.blocks) for stage in meta.stages] == DEPTHS
    for i, module in enumerate(split(teacher, DEPTHS)):
        assert torch.equal(meta.back(module(meta.front(images(), i)), i), teacher(images()))
    for parameter in meta.parameters():  # a copy
        parameter.zero_()
    assert teacher.head.weight.any()
    with pytest.raises(ValueError, match="blocks_per_module 0 makes the teacher its own meta model"):
        MetaModel.from_teacher(teacher, 3, blocks_per_module=0, init="scratch", teacher_depths=DEPTHS)


@torch.no_grad()
def test_hidden_states_of_the_first_stages():
    teacher = tiny("vit", depth=6)
    meta = MetaModel.from_teacher(teacher, 3, teacher_depths=DEPTHS).eval()
    every = meta.hidden_states(images())
    assert meta.hidden_states(images(), 0) == []
    assert [torch.equal(a, b) for a, b in zip(meta.hidden_states(images(), 2), every)] == [True, True]
    assert len(meta.hidden_states(images(), 2)) == 2


def test_scratch_is_seeded_and_is_the_vit_initialisation():
    teacher = tiny("deit3", depth=6, weight_init="skip")

    def build(seed):
        return MetaModel.from_teacher(teacher, 3, init="scratch", teacher_depths=DEPTHS, seed=seed)

    torch.manual_seed(3)
    untouched = torch.get_rng_state()
    first = build(1)
    assert torch.equal(torch.get_rng_state(), untouched)
    torch.manual_seed(4)
    assert equal_states(first, build(1))
    assert not equal_states(first, build(2))
    weight = first.stages[1].blocks["1"].mlp.fc1.weight  # 24 x 96: torch's own initialisation would have std .118
    assert 0.018 < weight.std().item() < 0.022
    assert first.stages[1].blocks["1"].attn.qkv.bias.abs().max() == 0
    assert torch.equal(first.stages[1].blocks["1"].norm1.weight, torch.ones(24))
    assert torch.equal(first.stages[0].blocks["0"].ls1.gamma, torch.full((24,), 1e-6))


@every_family
def test_scratch_keeps_nothing_of_the_teacher(family):
    teacher = tiny(family, depth=6)
    meta = MetaModel.from_teacher(teacher, 3, init="scratch", teacher_depths=DEPTHS)
    whole = assemble(meta.stages).state_dict()
    assert type(assemble(meta.stages)) is type(teacher)
    for name, value in teacher.state_dict().items():
        shallow = whole.get(name)
        if shallow is not None and shallow.shape == value.shape:
            assert not torch.equal(shallow, value), name


@every_family
def test_scratch_has_the_initial_values_of_its_family(family):
    """As large as those of a model that timm has just built, parameter by parameter."""
    name, differing = FAMILIES[family]
    torch.manual_seed(0)
    built = timm.create_model(name, **{**TINY, "depth": 3, **differing}).state_dict()
    meta = MetaModel.from_teacher(tiny(family, depth=6), 3, init="scratch", teacher_depths=DEPTHS)
    for name, value in assemble(meta.stages).state_dict().items():
        expected = built[name].abs().mean().item()
        chance = 0.8 if value.numel() < 100 else 0.25
        assert value.abs().mean().item() == pytest.approx(expected, rel=chance, abs=1e-6), name


def test_frequencies_of_each_block_go_with_it():
    teacher = tiny("rope mixed", depth=6)
    meta = MetaModel.from_teacher(teacher, 3, teacher_depths=DEPTHS)
    assert torch.equal(meta.stages[0].rope.freqs, teacher.rope.freqs[:, [0, 2, 3]])
    meta(images()).sum().backward()
    assert (meta.stages[0].rope.freqs.grad.abs().sum((0, 2, 3)) > 0).all()
    assert teacher.rope.freqs.grad is None
    names = [name for name in meta.state_dict() if "rope" in name]
    assert names == ["stages.0.rope.freqs"]
    scratch = MetaModel.from_teacher(teacher, 3, init="scratch", teacher_depths=DEPTHS)
    assert not torch.isclose(scratch.stages[0].rope.freqs, meta.stages[0].rope.freqs).any()


def test_gradients_reach_through_the_back():
    teacher = tiny("vit", depth=6)
    meta = MetaModel.from_teacher(teacher, 3, teacher_depths=DEPTHS).requires_grad_(False)
    meta.set_grad_checkpointing()
    h = meta.front(images(), 1).requires_grad_()
    meta.back(meta.stages[1](h), 1).sum().backward()
    assert h.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in meta.parameters())


def test_refusals():
    teacher = tiny("vit", depth=6)
    meta = MetaModel.from_teacher(teacher, 3, teacher_depths=DEPTHS)
    for i in (-1, 3):
        with pytest.raises(ValueError, match=f"module {i} does not exist"):
            meta.front(images(), i)
        with pytest.raises(ValueError, match=f"module {i} does not exist"):
            meta.back(images(), i)
    with pytest.raises(ValueError, match="meta init 'random'"):
        MetaModel.from_teacher(teacher, 3, init="random", teacher_depths=DEPTHS)
    with pytest.raises(ValueError, match="one teacher depth per module"):
        MetaModel.from_teacher(teacher, 2, teacher_depths=DEPTHS)
    with pytest.raises(ValueError, match=r"blocks_per_module 2 .* smallest teacher module"):
        MetaModel.from_teacher(teacher, 3, blocks_per_module=2, teacher_depths=DEPTHS)
    with pytest.raises(ValueError, match="do not split 6 blocks"):
        MetaModel.from_teacher(teacher, 3, teacher_depths=[2, 2, 3])


def test_check_pair_names_both_token_counts():
    check_pair(tiny("vit"), tiny("deit3"))
    with pytest.raises(ValueError, match=r"18 tokens \(4x4 patches \+ 2 prefix.*17 tokens.*student\.reg_tokens"):
        check_pair(tiny("deit distilled"), tiny("vit"))
    with pytest.raises(ValueError, match=r"17 tokens.*student 65 tokens \(8x8.*student\.patch_size"):
        check_pair(tiny("vit"), tiny("vit", patch_size=4))
