"""Student modules: stitch shapes and seeds, and what keeping or dropping the stitches makes of the student."""

import copy

import pytest
import torch
from torch import nn
from vit_families import images, scramble, tiny

from models.modules.meta import MetaModel, check_pair
from models.modules.stages import assemble, split
from models.modules.stitch import assemble_student, build_student_modules
from models.moe.layer import MoEConfig
from models.vmoe.model import VMoE, VMoEConfig

TEACHER_WIDTH = 24


def student(**changes) -> VMoE:
    values = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 4, "heads": 2, "mlp_dim": 20, "num_classes": 5}
    values |= {"moe_blocks": "1,3", "moe": MoEConfig(num_experts=3, k=2), "representation_size": 10, **changes}
    model = VMoE(VMoEConfig(**values)).eval()
    scramble(model)
    return model


def chain(modules, x):
    for module in modules:
        x = module(x)
    return x


@pytest.mark.parametrize("changes", [{}, {"pool": "mean", "class_token": False}, {"reg_tokens": 1}])
@pytest.mark.parametrize("depths", [[2, 2], [1, 1, 1, 1], [3, 1], [4]])
@torch.no_grad()
def test_vmoe_splits_exactly(depths, changes):
    model = student(**changes)
    stages = split(model, depths)
    expected = model(images())
    assert expected.std() > 0.05
    assert torch.equal(chain(stages, images()), expected)
    assembled = assemble(stages)
    assert type(assembled) is VMoE
    assert torch.equal(assembled(images()), expected)
    assert assembled.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(chain(copy.deepcopy(stages), images()), expected)


def test_vmoe_checkpointing_gives_the_same_gradients():
    model = student().train()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(images()).square().sum(), parameters, allow_unused=True)
    stages = split(model, [2, 2])
    for stage in stages:
        stage.set_grad_checkpointing()
    actual = torch.autograd.grad(chain(stages, images()).square().sum(), parameters, allow_unused=True)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(expected, actual))


@torch.no_grad()
def test_modules_speak_the_teachers_width():
    teacher = tiny("vit", depth=6)
    meta = MetaModel.from_teacher(teacher, 3, teacher_depths=[2, 1, 3]).eval()
    model = student()
    check_pair(teacher, model)
    modules = build_student_modules(model, [1, 2, 1], TEACHER_WIDTH)
    assert modules[0].pre is None and modules[-1].post is None
    assert modules[0](images()).shape == (2, 17, TEACHER_WIDTH)
    assert modules[1](torch.randn(2, 17, TEACHER_WIDTH)).shape == (2, 17, TEACHER_WIDTH)
    assert modules[2](torch.randn(2, 17, TEACHER_WIDTH)).shape == (2, 5)
    for i, module in enumerate(modules):
        assert meta.back(module(meta.front(images(), i)), i).shape == (2, 5)
    sizes = [
        [tuple(layer.weight.shape) for layer in part] for m in modules for part in (m.pre, m.post) if part is not None
    ]
    # post 0, pre 1, post 1, pre 2: LayerNorm of what comes in, Linear to the other width
    to_teacher, to_student = [(16,), (24, 16)], [(24,), (16, 24)]
    assert sizes == [to_teacher, to_student, to_teacher, to_student]
    # parameters of the blocks are the student's own
    assert modules[1].stage.blocks["1"].attn.qkv.weight is model.blocks[1].attn.qkv.weight


@torch.no_grad()
def test_modules_compute_pre_stage_post():
    first, second = build_student_modules(student(), [2, 2], TEACHER_WIDTH)
    h = torch.randn(2, 17, TEACHER_WIDTH)
    pre = nn.functional.layer_norm(h, (TEACHER_WIDTH,)) @ second.pre[1].weight.T + second.pre[1].bias
    assert torch.allclose(second(h), second.stage(pre), atol=1e-5)
    out = nn.functional.layer_norm(first.stage(images()), (16,)) @ first.post[1].weight.T
    assert torch.allclose(first(images()), out, atol=1e-5)


def test_stitches_are_seeded_by_border():
    def weights(seed):
        torch.manual_seed(torch.seed() % 2**31)  # what the process drew before must not matter
        modules = build_student_modules(student(), [1, 2, 1], TEACHER_WIDTH, seed=seed)
        return [modules[0].post[1].weight, modules[1].pre[1].weight, modules[1].post[1].weight]

    a, b, c = weights(0), weights(0), weights(1)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not any(torch.equal(x, y) for x, y in zip(a, c))
    assert not torch.equal(a[0], a[2])
    assert 0.015 < a[0].std().item() < 0.025


@torch.no_grad()
def test_drop_is_the_student_of_the_blocks():
    model = student()
    modules = build_student_modules(model, [1, 2, 1], TEACHER_WIDTH)
    dropped = assemble_student(modules)
    assert type(dropped) is VMoE
    assert dropped.config.stitch_blocks is None
    assert torch.equal(dropped(images()), model(images()))
    assert not torch.equal(dropped(images()), chain(modules, images()))
    assert dropped.state_dict().keys() == student().state_dict().keys()


@torch.no_grad()
def test_keep_computes_what_the_modules_compute(tmp_path):
    model = student()
    modules = build_student_modules(model, [1, 2, 1], TEACHER_WIDTH)
    for i, module in enumerate(modules):
        scramble(module, i)
    expected = chain(modules, images())
    kept = assemble_student(modules, "keep")
    assert torch.equal(kept(images()), expected)
    assert dict(kept.config.stitch_blocks) == {"1": TEACHER_WIDTH, "3": TEACHER_WIDTH}
    assert [name for name in kept.state_dict() if "stitch" in name][:2] == [
        "blocks.1.stitch.0.0.weight",
        "blocks.1.stitch.0.0.bias",
    ]
    # neither the modules nor the model they came from run a stitch twice now
    assert torch.equal(chain(modules, images()), expected)
    assert torch.equal(assemble_student(modules)(images()), model(images()))

    kept.save_pretrained(tmp_path)
    assert torch.allclose(VMoE.from_pretrained(tmp_path)(images()), expected, rtol=0, atol=1e-5)
    assert torch.equal(chain(split(kept, [1, 2, 1]), images()), expected)


def test_refusals():
    modules = build_student_modules(student(), [1, 2, 1], TEACHER_WIDTH)
    with pytest.raises(ValueError, match="stitches 'melt' is not one of drop, keep, fold"):
        assemble_student(modules, "melt")
    with pytest.raises(ValueError, match="do not make one model"):
        assemble_student(modules[1:])
    with pytest.raises(ValueError, match="do not split 4 blocks"):
        build_student_modules(student(), [1, 2], TEACHER_WIDTH)
