"""Costs: against torch's own counter, against the formula on paper, and against the published ratios."""

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vit_families import WIDTH, every_family, images, tiny

from models.flops import flops, forward_flops, num_tokens
from models.modules.meta import MetaModel
from models.modules.stages import split
from models.modules.stitch import assemble_student, build_student_modules
from models.modules.tokens import Rope
from models.moe.layer import MoEConfig
from models.vmoe.model import VMoE, VMoEConfig, decode_variant
from trainer.config.phases import DistillConfig, MetaConfig
from trainer.objectives import Classify, Distill, MatchTeacher

BATCH = 2


def student(**changes):
    """Every expert gets every token (k = num_experts), so that torch counts no empty rows."""
    values = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 4, "heads": 2, "mlp_dim": 20, "num_classes": 5}
    values |= {"moe_blocks": "1,3", "moe": MoEConfig(num_experts=2, k=2), **changes}
    return VMoE(VMoEConfig(**values)).eval()


def counted(module, x):
    """FLOPs of one image by torch: products and convolutions, attention through the kernel made of products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        module(x)
    return counter.get_total_flops() / BATCH


@every_family
def test_teachers_cost_what_torch_counts(family):
    model = tiny(family).requires_grad_(False)
    assert forward_flops(model, num_tokens(model)) == counted(model, images(BATCH))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_blocks": "all"},
        {"moe_blocks": "none"},
        {"representation_size": 10, "reg_tokens": 2},
        {"swiglu": True, "layer_scale": 0.1, "rope": Rope()},
    ],
)
def test_a_vmoe_costs_what_torch_counts(changes):
    model = student(**changes)
    assert forward_flops(model, num_tokens(model)) == counted(model, images(BATCH))


@every_family
@pytest.mark.parametrize("num_classes", [0, 5])
def test_stages_of_teachers_cost_what_torch_counts_with_their_backward(family, num_classes):
    """Trained from the images on; trained or frozen behind a module that is trained."""
    model = tiny(family, num_classes=num_classes)
    tokens = num_tokens(model)
    first, last = split(model, [2, 2])
    assert flops(first, tokens).trained == counted_with_backward(first, images(BATCH))
    h = torch.randn(BATCH, tokens, WIDTH, requires_grad=True)
    assert flops(last, tokens).trained == counted_with_backward(last, h)
    assert flops(last, tokens).relaying == counted_with_backward(last.requires_grad_(False), h)


def counted_with_backward(module, x):
    """FLOPs of one image by torch, forward and backward."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(x).square().mean().backward()
    return counter.get_total_flops() / BATCH


def test_an_moe_costs_the_experts_a_token_visits():
    # 3 experts, k = 2: router 16 x 3, then twice 16 x 20 and 20 x 16 per token; dense: once
    tokens, dense = 17, 2 * 17 * 2 * 16 * 20
    moe = student(moe_blocks="0", moe=MoEConfig(num_experts=3, k=2)).blocks[0].mlp
    assert forward_flops(moe, tokens) == 2 * tokens * (16 * 3 + 2 * 2 * 16 * 20)
    one = student(moe_blocks="0", moe=MoEConfig(num_experts=3, k=1)).blocks[0].mlp
    assert forward_flops(one, tokens) == 2 * tokens * 16 * 3 + dense
    assert forward_flops(student(moe_blocks="none").blocks[0].mlp, tokens) == dense


def test_a_vit_by_hand():
    T, D, H, C = 17, WIDTH, 4 * WIDTH, 5  # 16 patches of 8 x 8 and a class token
    block = T * D * 3 * D + T * D * D + 2 * T * T * D + 2 * T * D * H  # qkv, proj, scores and mixing, MLP
    total = 2 * ((T - 1) * 3 * 8 * 8 * D + 3 * block + D * C)
    model = tiny("vit", depth=3)
    assert num_tokens(model) == T
    assert forward_flops(model, T) == total


@pytest.mark.parametrize("model", [tiny("vit"), tiny("deit distilled"), student()], ids=["vit", "distilled", "vmoe"])
@pytest.mark.parametrize("depths", [[4], [1, 3], [1, 1, 1, 1]])
def test_stages_cost_together_what_the_model_costs(model, depths):
    tokens = num_tokens(model)
    assert sum(forward_flops(stage, tokens) for stage in split(model, depths)) == forward_flops(model, tokens)


def test_a_meta_model_costs_its_stages():
    teacher = tiny("vit", depth=6)
    meta, tokens = MetaModel.from_teacher(teacher, 3, teacher_depths=[2, 1, 3]), num_tokens(teacher)
    assert forward_flops(meta, tokens) == forward_flops(tiny("vit", depth=3), tokens)
    assert forward_flops(meta, tokens) == counted(meta.eval(), images(BATCH))


def test_stitches_count():
    model = student()
    tokens, plain = num_tokens(model), forward_flops(model, num_tokens(model))
    modules = build_student_modules(model, [2, 2], WIDTH)
    stitch = 2 * tokens * 16 * WIDTH
    parts = [forward_flops(module, tokens) for module in modules]
    assert sum(parts) == plain + 2 * stitch
    assert parts[0] == counted(modules[0], images(BATCH))
    assert parts[1] == counted(modules[1], torch.randn(BATCH, tokens, WIDTH))
    assert forward_flops(assemble_student(modules, "keep"), tokens) == plain + 2 * stitch
    assert forward_flops(assemble_student(modules, "drop"), tokens) == plain


@pytest.fixture(scope="module")
def published():
    """The published pair: ViT-L/16 and the m2mKD V-MoE-Base, in 4 modules, without memory."""
    with torch.device("meta"):
        teacher = timm.create_model("vit_large_patch16_224", pretrained=False)
        sizes = {"image_size": 224, "num_classes": 1000, **decode_variant("m2mkd-B/16")}
        return teacher, VMoE(VMoEConfig(**sizes))


def per_token(block):
    """Multiply-adds of a block on one token, attention scores left out."""
    return forward_flops(block, 1) / 2 - 2 * block.attn.qkv.in_features


def test_published_costs_of_a_block(published):
    teacher, vmoe = published
    assert per_token(teacher.blocks[0]) == 12 * 1024**2  # 12.6M
    # attention 4 D^2, router 8 D, two experts of 2 x D x 4D: 11.8M
    assert per_token(vmoe.blocks[0]) == 4 * 768**2 + 8 * 768 + 2 * 2 * 768 * 3072
    assert round(per_token(teacher.blocks[0]) / 1e6, 1) == 12.6
    assert round(per_token(vmoe.blocks[0]) / 1e6, 1) == 11.8


def test_published_costs_of_the_phases(published):
    """One end-to-end epoch of the student is the unit; embeddings, stitches and heads are within the tolerance."""
    teacher, vmoe = published
    tokens, depths = num_tokens(teacher), [6, 6, 6, 6]
    with torch.device("meta"):
        meta = MetaModel.from_teacher(teacher, 4, teacher_depths=depths)
        modules = build_student_modules(vmoe, [3, 3, 3, 3], teacher.embed_dim)
    stages, unit = split(teacher, depths), Classify(vmoe, tokens).flops_per_image
    assert unit / (2 * tokens * 425e6) == pytest.approx(1, abs=0.04)
    assert Classify(meta, tokens).flops_per_image / unit == pytest.approx(0.36, abs=0.01)
    pairs = [
        Distill(module, stage, meta, i, DistillConfig(), tokens).flops_per_image
        for i, (module, stage) in enumerate(zip(modules, stages))
    ]
    assert sum(pairs) / unit == pytest.approx(2.42, abs=0.07)  # and the stitches, and the way back through scores
    assert pairs[0] > pairs[3]  # three stages behind it take the gradient back, against three in front without
    # 6 blocks of meta model in front, 24 of teacher, 6 behind the teacher, 6 behind the student with the way back
    block, taught = flops(teacher.blocks[0], tokens), sum(flops(m, tokens).trained for m in modules)
    expected = (6 + 24 + 6) * block.forward + 6 * block.relaying
    assert sum(pairs) - taught == pytest.approx(expected, rel=0.02)
    # matching: the teacher once (24 blocks), then 4 and 3 blocks of the meta model forward and backward
    matching = MatchTeacher(meta, stages, MetaConfig(), tokens).flops_per_image
    assert matching / block.forward == pytest.approx(24 + 3 * 7, rel=0.02)
