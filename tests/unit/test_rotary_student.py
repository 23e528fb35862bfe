"""A V-MoE with the options of newer teachers, against timm's own models of the same weights: rotary positions, SwiGLU,
LayerScale, registers, no class token."""

import copy
import json
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import SwiGLU, SwiGLUPacked
from timm.models.eva import Eva
from vit_families import IMAGE_SIZE, images, scramble

from models.experts.dense_block import read_block
from models.experts.upcycle import norm_eps, upcycle
from models.modules.stages import assemble, split
from models.modules.tokens import Rope, token_layout
from models.moe.layer import SWIGLU, MoE, MoEConfig
from models.preprocessing import Preprocessing
from models.teacher.load import Teacher
from models.vmoe.model import VMoE, VMoEConfig

IMAGES = Preprocessing(IMAGE_SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
TINY = {"img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 4, "num_classes": 5}
# name -> (timm architecture, arguments that differ from TINY)
TEACHERS = {
    # SwiGLU in two layers, no bias of queries and keys, 5 prefix tokens, no learned positions
    "dinov3 plus": ("vit_small_plus_patch16_dinov3", {"global_pool": "token"}),
    # SwiGLU in one layer, queries, keys and values in three, learned positions beside the rotary ones
    "eva02": ("eva02_tiny_patch14_224", {"global_pool": "token", "num_classes": 0, "use_fc_norm": False}),
    # GELU; rotation by column and row
    "rope": ("vit_small_patch16_rope_224", {}),
    "rope and positions": ("vit_small_patch16_rope_ape_224", {}),
    # a register and no class token
    "rope gap": ("vit_mediumd_patch16_rope_reg1_gap_256", {"use_fc_norm": False}),
    "attention of timm's layers": ("vit_small_patch16_rope_224", {"attn_type": "rope"}),
    # not rotary: SwiGLU in one layer, LayerScale, 4 registers, no head
    "dinov2 giant": ("vit_giant_patch14_reg4_dinov2", {"num_classes": 0, "mlp_layer": SwiGLUPacked}),
}
# every option at once
ALL = VMoEConfig(
    image_size=IMAGE_SIZE,
    patch_size=8,
    width=24,
    depth=4,
    heads=3,
    mlp_dim=40,
    num_classes=5,
    moe_blocks="1,3",
    moe=MoEConfig(num_experts=4, k=2),
    class_token=False,
    reg_tokens=2,
    pool="mean",
    rope=Rope("cat", temperature=50.0, rotate_half=False, ref_feat_shape=(3, 3)),
    swiglu=True,
    layer_scale=0.1,
)
every_teacher = pytest.mark.parametrize("name", list(TEACHERS))


def teacher(name: str, **arguments) -> Teacher:
    architecture, differing = TEACHERS[name]
    model = timm.create_model(architecture, **{**TINY, **differing, **arguments}).eval()
    scramble(model)
    return Teacher(model, IMAGES, f"a {name}", None, model.num_classes)


def student(dense: Teacher, **changes) -> VMoE:
    """A student of the same sizes and kinds of layers."""
    model = dense.model
    layout = token_layout(model)
    values = {
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "width": 24,
        "depth": 4,
        "heads": 3,
        "mlp_dim": model.blocks[0].mlp.fc2.in_features,
        "num_classes": dense.num_classes,
        "moe_blocks": "every-2",
        "moe": MoEConfig(num_experts=4, k=2),
        "norm_eps": norm_eps(model),
        "class_token": layout.class_token,
        "reg_tokens": layout.reg_tokens,
        "pool": "token" if layout.class_token else "mean",
        "rope": layout.rope,
        "swiglu": read_block(model.blocks[0], 0).activation == SWIGLU,
    }
    return VMoE(VMoEConfig(**(values | changes))).eval()


def model_of(config: VMoEConfig) -> VMoE:
    """Nothing is zero, and no LayerScale the same in every channel."""
    model = VMoE(config).eval()
    scramble(model)
    return model


@every_teacher
@pytest.mark.parametrize("layer_scale", [0.0, 1e-5])
@pytest.mark.parametrize("routing", [{"k": 1}, {"k": 2}])
@torch.no_grad()
def test_copies_of_a_teacher_compute_its_features(name, layer_scale, routing):
    dense = teacher(name)
    model = student(dense, layer_scale=layer_scale, moe=MoEConfig(num_experts=4, **routing))
    assert upcycle(model, dense, range(4), IMAGES) == []
    x = images(4)
    wanted = dense.model.forward_features(x)
    assert wanted.std() > 0.1
    torch.testing.assert_close(model.forward_features(x), wanted, atol=2e-6 * wanted.abs().max().item(), rtol=0)
    wanted = dense.model.forward_head(wanted)
    found = model(x)
    if dense.num_classes:
        torch.testing.assert_close(found, wanted, atol=2e-6 * wanted.abs().max().item(), rtol=0)
