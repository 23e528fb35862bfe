"""A vision transformer of transformers as a timm model that gives the same; a ViT also back.

What differs between model types stands in layouts.py. Every import is checked: normalised tokens, and pooled features
and logits where both models have them, on one batch of images of the model's own size.
"""

import re
from typing import Any

import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .layouts import LAYOUTS, VIT_NAMES, Layout, Names, predicts_words

TOLERANCE = 1e-5  # of what both models give, relative above 1
Outputs = dict[str, Tensor]  # "tokens" (B, T, D), "pooled" (B, F), "logits" (B, C), as far as a model has them


def to_timm(original: nn.Module) -> nn.Module:
    """A vision transformer of transformers as a timm model with the same tokens and logits.

    Args:
        original: of a model type in LAYOUTS, an encoder or a classifier. A plain DeiT's distillation token, which no
            head reads, becomes a register token; DeiTForImageClassificationWithTeacher has two heads, averaged.

    Raises:
        ValueError: a setting that has no counterpart, or outputs that are not finite.
        RuntimeError: both models differ, so the conversion is wrong for this release of transformers or timm.
    """
    encoder, layout = _encoder_of(original)
    num_classes = original.config.num_labels if has_classes(original) else 0
    model = layout.build(encoder.config, num_classes, original)
    model.load_state_dict(_timm_state(original, layout, model))
    check_same(original, model.eval())
    return model


def back_to_transformers(model: VisionTransformer, original: nn.Module) -> None:
    """Load the weights of a `to_timm` model into the transformers ViT it was made of, or one like it.

    Raises:
        RuntimeError: what both give differs.
    """
    timm_state = model.state_dict()
    state = {}
    for name in original.state_dict():
        timm_name = renamed(name, VIT_NAMES)
        part = re.search(r"\.attn\.([qkv])\.", timm_name)
        if part:
            fused = timm_state[timm_name.replace(part[0], ".attn.qkv.")]
            state[name] = fused.chunk(3)["qkv".index(part[1])]
        else:
            state[name] = timm_state[timm_name]
    original.load_state_dict(state)
    check_same(original, model.eval())


def check_same(original: nn.Module, model: nn.Module) -> None:
    """Compare both models on two images of the timm model's size.

    Raises:
        ValueError: what the original gives is not finite.
        RuntimeError: the two differ.
    """
    for name, difference in differences(original, model).items():
        if not difference <= TOLERANCE:  # a difference that is no number is refused too
            raise RuntimeError(
                f"the converted teacher's {name} differ from the original's by {difference:.2g} (at most {TOLERANCE} "
                f"expected): timm {timm.__version__} and this release of transformers do not compute the same model."
            )


@torch.no_grad()
def differences(original: nn.Module, model: nn.Module) -> dict[str, float]:
    """Largest difference of what both models give for two images of the timm model's size, relative above 1.

    Returns:
        by name: normalised tokens, pooled features and logits, as far as both have them.

    Raises:
        ValueError: what the original gives is not finite.
    """
    size = model.patch_embed.img_size[0]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.in_chans, size, size, generator=generator)
    expected = _outputs_of_original(original.eval(), images)
    given = _outputs_of_timm(model, images)
    found = {}
    for name, value in expected.items():
        if name not in given:
            continue
        if not value.isfinite().all():
            raise ValueError(f"its {name} are not finite: check layer_norm_eps and the other settings of config.json.")
        largest = (given[name] - value).abs().max().item()
        found[name] = largest / max(1.0, value.abs().max().item())
    return found


def has_classes(original: nn.Module) -> bool:
    """Whether it is a classifier and not an encoder."""
    return isinstance(getattr(original, "classifier", getattr(original, "cls_classifier", None)), nn.Linear)


def computes_positions(original: nn.Module) -> bool:
    """Whether its positions are a function of the grid, made in every forward: AIMv2 of native resolution."""
    return getattr(original.config, "is_native", False)


def computed_positions(model: VisionTransformer) -> Tensor:
    """Sines and cosines of the places across, then of those down, of a model's grid (1, T, D), as AIMv2 has them."""
    grid = list(model.patch_embed.grid_size)
    down_then_across = build_sincos2d_pos_embed(grid, model.embed_dim, interleave_sin_cos=True)
    return down_then_across.roll(model.embed_dim // 2, dims=1)[None]


def _encoder_of(original: nn.Module) -> tuple[nn.Module, Layout]:
    """The part of a model without its heads, and the row of LAYOUTS it belongs to."""
    layout = LAYOUTS[original.config.model_type]
    if isinstance(original, layout.encoder_class):
        return original, layout
    part = "vision_model" if hasattr(original, "vision_model") else original.base_model_prefix
    return getattr(original, part), layout


def _outputs_of_original(original: nn.Module, images: Tensor) -> Outputs:
    """What a model of transformers gives; its encoder runs once."""
    encoder, layout = _encoder_of(original)
    if has_classes(original):
        seen = []
        handle = encoder.register_forward_hook(lambda module, arguments, output: seen.append(output.last_hidden_state))
        logits = original(pixel_values=images).logits
        handle.remove()
        return {"tokens": seen[0], "logits": logits}  # a classifier of CLIP does not use the norm behind the blocks
    given = _unmasked(encoder, images) if layout.hides_patches else encoder(pixel_values=images)
    tokens = given.last_hidden_state
    if layout.last_norm:
        tokens = getattr(encoder, layout.last_norm)(tokens)
    if predicts_words(original):
        return {"tokens": original.layernorm(tokens)}
    if layout.pools and given.pooler_output is not None:
        return {"tokens": tokens, "pooled": given.pooler_output}
    return {"tokens": tokens}


def _unmasked(encoder: nn.Module, images: Tensor) -> Any:
    """The output of a MAE that sees all patches, in their own order."""
    in_order = torch.arange(encoder.embeddings.patch_embeddings.num_patches, dtype=torch.float32)
    ratio = encoder.config.mask_ratio
    encoder.config.mask_ratio = 0.0
    try:
        return encoder(pixel_values=images, noise=in_order.expand(len(images), -1))
    finally:
        encoder.config.mask_ratio = ratio


def _outputs_of_timm(model: nn.Module, images: Tensor) -> Outputs:
    tokens = model.forward_features(images)
    outputs = {"tokens": tokens, "pooled": model.forward_head(tokens, pre_logits=True)}
    if model.num_classes:
        outputs["logits"] = model.forward_head(tokens)
    return outputs


def _timm_state(original: nn.Module, layout: Layout, model: nn.Module) -> dict[str, Tensor]:
    """The original's tensors under the names and in the shapes of `model`."""
    state = {}
    expected = model.state_dict()
    for name, value in original.state_dict().items():
        timm_name = renamed(name, layout.names)
        if "fc1_x" in timm_name and timm_name not in expected:  # DINOv3 has one name for both its kinds of MLP
            timm_name = timm_name.replace("fc1_x", "fc1")
        if timm_name.startswith("norm.") and timm_name not in expected:  # CLIP's classifier reads what comes before it
            continue
        if value.numel() and not re.search(layout.left_out, name):  # no register tokens are a tensor of none
            state[timm_name] = value
    state = _fuse_qkv(state, "blocks.0.attn.q_bias" in expected)
    if "embeddings.distillation_token" in state:
        timm_name = "dist_token" if "dist_token" in expected else "reg_token"
        state[timm_name] = state.pop("embeddings.distillation_token")
    for name in ("cls_token", "pos_embed"):
        if name in state:  # an embedding table (T, D) or a vector (D,) in some
            state[name] = state[name].reshape(1, -1, model.embed_dim)
    if getattr(model, "no_embed_class", False) and "pos_embed" in state:
        # the class token's position goes into the token, as timm's filter does it for DINOv2 with registers
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    if "pos_embed" in expected and "pos_embed" not in state:
        state["pos_embed"] = computed_positions(model)
    state = _split_pooling(state) if getattr(model, "attn_pool", None) is not None else _without_pooling(state)
    for name in expected.keys() - state.keys():
        if name.endswith("bias"):  # timm has biases in all of a block's layers or in none
            state[name] = torch.zeros_like(expected[name])
    return state


def renamed(name: str, names: Names) -> str:
    """timm's name, but query, key and value still apart: blocks.0.attn.q.weight."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def _fuse_qkv(state: dict[str, Tensor], biases_apart: bool) -> dict[str, Tensor]:
    """Query, key and value of each block (D, D) under one another as timm's qkv (3 D, D); biases likewise.

    Args:
        biases_apart: Eva and Beit keep q_bias and v_bias as they are, and have none for the key.
    """
    parts = {name: value for name, value in state.items() if re.search(r"\.attn\.[qkv]\.", name)}
    fused = {name: value for name, value in state.items() if name not in parts}
    for name, value in parts.items():
        letter = re.search(r"\.attn\.([qkv])\.", name)[1]
        if biases_apart and name.endswith(".bias"):
            fused[name.replace(f".attn.{letter}.bias", f".attn.{letter}_bias")] = value
        elif letter == "q":
            qkv = [parts[name.replace(".attn.q.", f".attn.{each}.")] for each in "qkv"]
            fused[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(qkv)
    return fused


def _split_pooling(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An attention pooling's query, key and value in one (3 D, D) as timm's q (D, D) and kv (2 D, D)."""
    split = dict(state)
    for leaf in ("weight", "bias"):
        fused = split.pop(f"attn_pool.qkv.{leaf}")
        query, key, value = fused.chunk(3)
        split[f"attn_pool.q.{leaf}"] = query
        split[f"attn_pool.kv.{leaf}"] = torch.cat((key, value))
    return split


def _without_pooling(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a classifier reads is not what its encoder's attention pooling gives: that one is left out."""
    return {name: value for name, value in state.items() if not name.startswith("attn_pool.")}
