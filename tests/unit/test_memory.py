"""Activation memory worked out from shapes is what autograd keeps."""

from dataclasses import replace

import pytest
import timm
import torch

from models.flops import num_tokens
from models.memory import activation_bytes, expert_rows, kept_bytes
from models.moe.layer import MoEConfig
from models.vmoe.model import VMoE, VMoEConfig

SIZES = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}


def kept_by_autograd(model, images=None) -> int:
    """Bytes of every tensor that the backward pass of some images will read, parameters left out, each memory once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no memory is used twice
        return tensor

    if images is None:
        images = torch.randn(1, 3, SIZES["img_size"], SIZES["img_size"])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images).sum()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_what_is_kept_is_what_autograd_keeps(name):
    model = timm.create_model(name, **SIZES).train()
    measured = kept_by_autograd(model)
    assert activation_bytes(model, num_tokens(model)) == pytest.approx(measured, rel=0.1)


def test_half_the_bytes_in_bfloat16_and_about_four_times_the_patches_at_twice_the_size():
    model = timm.create_model("vit_tiny_patch16_224", **SIZES)
    assert activation_bytes(model, 17, 2) == activation_bytes(model, 17) / 2
    assert activation_bytes(model, 68) == pytest.approx(4 * activation_bytes(model, 17), rel=0.01)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("routing", ["capacity", "dropless", "many", "swiglu"])
def test_what_a_vmoe_keeps_is_what_autograd_keeps(routing, frozen):
    """Rows of experts and routing included; a frozen model that hands the gradient on keeps less."""
    config = {"num_experts": 32 if routing == "many" else 8, "k": 2}
    if routing != "dropless":
        config["capacity_factor"] = 1.05
    sizes = {"image_size": 64, "patch_size": 8, "width": 64, "depth": 3, "heads": 4, "mlp_dim": 256, "num_classes": 5}
    model = VMoE(VMoEConfig(**sizes, moe_blocks="1,2", moe=MoEConfig(**config), swiglu=routing == "swiglu")).train()
    images = torch.randn(8, 3, 64, 64)
    if frozen:
        model.requires_grad_(False)
        images.requires_grad_(True)
    planned = kept_bytes(model, 8, num_tokens(model), learns=not frozen)
    assert planned == pytest.approx(kept_by_autograd(model, images), rel=0.1)


def test_rows_of_experts_by_hand():
    """12 tokens an image, 2 choices: 24 rows an image."""
    even = MoEConfig(num_experts=4, k=2)
    assert expert_rows(even, images=8, tokens=12) == 192
    assert expert_rows(even, images=8, tokens=12, busiest=1.25) == 240
    # with room for 3 an image and expert, rounded up to 4: 16 an image; of four together 4 x 12, which is one
    tight = MoEConfig(num_experts=4, k=2, capacity_factor=0.5)
    assert expert_rows(tight, images=8, tokens=12) == 128
    assert expert_rows(replace(tight, images_per_group=4), images=8, tokens=12) == 96
    # room for 8 an image and expert, 32 in all, is more than is asked for, but not than the busiest rank may get
    roomy = MoEConfig(num_experts=4, k=2, capacity_factor=1.05)
    assert expert_rows(roomy, images=8, tokens=12) == 192
    assert expert_rows(roomy, images=8, tokens=12, busiest=1.25) == 240
    assert expert_rows(roomy, images=8, tokens=12, busiest=2.0) == 256
