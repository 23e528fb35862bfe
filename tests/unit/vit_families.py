"""Tiny models and checkpoints of every family a teacher can come from, for the tests of models/."""

import json
from pathlib import Path

import pytest
import timm
import torch
import transformers
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from transformers import DeiTConfig, ViTConfig, ViTImageProcessor

WIDTH, IMAGE_SIZE = 24, 32
# name -> (timm architecture, arguments that differ from TINY)
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit": ("deit_tiny_patch16_224", {}),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2 reg4": ("vit_small_patch14_reg4_dinov2", {"num_classes": 0}),
    "clip": ("vit_base_patch32_clip_224", {}),
    "gap reg4": ("vit_medium_patch16_reg4_gap_256", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "aimv2": ("aimv2_large_patch14_224", {"num_classes": 0}),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {"num_classes": 0}),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", {"num_classes": 0}),
    "rope mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beit, one bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
}
TINY = {"img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": WIDTH, "num_heads": 3, "num_classes": 5}

every_family = pytest.mark.parametrize("family", list(FAMILIES))


def tiny(family: str, depth: int = 4, seed: int = 0, **arguments) -> VisionTransformer:
    """A model in evaluation mode; no parameter keeps a value that would hide it (zero tokens, constant LayerScale)."""
    name, differing = FAMILIES[family]
    model = timm.create_model(name, **{**TINY, "depth": depth, **differing, **arguments}).eval()
    scramble(model, seed)
    return model


def taught(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What a model teaches: its logits (B, C), or the normalised tokens (B, T, D) of one without classes."""
    return model(images) if model.num_classes else model.forward_features(images)


@torch.no_grad()
def scramble(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def images(count: int = 2, seed: int = 7) -> torch.Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def save_transformers(directory: Path, name: str, processor=None, **changes) -> torch.nn.Module:
    config_class = ViTConfig if name.startswith("ViT") else DeiTConfig
    values = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 37}
    values |= {"image_size": 32, "patch_size": 8, "num_labels": 4, **changes}
    model = getattr(transformers, name)(config_class(**values)).eval()
    scramble(model)
    model.save_pretrained(directory)
    (processor or ViTImageProcessor(size={"height": 32, "width": 32})).save_pretrained(directory)
    return model


def save_timm(directory: Path, model: torch.nn.Module, **data_config) -> None:
    data_config = {"input_size": (3, 32, 32), **data_config}
    save_for_hf(model, directory, safe_serialization=True, data_config=data_config)


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
