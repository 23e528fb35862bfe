"""Activation memory worked out from shapes is what autograd keeps."""

import pytest
import timm
import torch

from models.flops import num_tokens
from models.memory import activation_bytes

SIZES = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}


def kept_by_autograd(model) -> int:
    """Bytes of every tensor that the backward pass of one image will read, parameters left out, each memory once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no memory is used twice
        return tensor

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
