"""transformers ViT and DeiT -> timm VisionTransformer; a ViT also back."""

import re
from functools import partial

import timm
import torch
from timm.layers import LayerNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# transformers renamed the parts of these models in memory (the second spelling is the older one, and the one on disk)
RENAMES = (
    (r"^(vit|deit)\.", ""),
    (r"^(layers|encoder\.layer)\.", "blocks."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.attention\.(attention\.)?(q|k|v)(_proj|uery|ey|alue)\.", r".attn.\2."),
    (r"(?<=\d)\.(mlp\.fc1|intermediate\.dense)\.", ".mlp.fc1."),
    (r"(?<=\d)\.(mlp\.fc2|output\.dense)\.", ".mlp.fc2."),
)
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
TOLERANCE = 1e-5  # of the logits, relative above 1


def to_timm(original: nn.Module) -> VisionTransformer:
    """A transformers ViT or DeiT classifier as a timm model with the same logits.

    Args:
        original: ViTForImageClassification, DeiTForImageClassification (its distillation token, which no head reads,
            becomes a register token) or DeiTForImageClassificationWithTeacher (two heads, averaged).

    Raises:
        ValueError: an activation or image shape that has no counterpart, or logits that are not finite.
        RuntimeError: the logits of both differ, so the conversion is wrong for this release of transformers or timm.
    """
    config = original.config
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"activation {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}.")
    if not (isinstance(config.image_size, int) and isinstance(config.patch_size, int)):
        raise ValueError(f"images and patches must be square, got {config.image_size} and {config.patch_size}.")
    distilled = hasattr(original, "distillation_classifier")
    model_class = VisionTransformerDistilled if distilled else VisionTransformer
    model = model_class(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        num_classes=config.num_labels,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=(config.intermediate_size + 0.5) / config.hidden_size,  # timm takes int(width * ratio)
        qkv_bias=config.qkv_bias,
        reg_tokens=int(config.model_type == "deit" and not distilled),
        norm_layer=partial(LayerNorm, eps=config.layer_norm_eps),
        act_layer=ACTIVATIONS[config.hidden_act],
        weight_init="skip",
    )
    state = {_renamed(name): value for name, value in original.state_dict().items()}
    if "embeddings.distillation_token" in state:
        timm_name = "dist_token" if distilled else "reg_token"
        state[timm_name] = state.pop("embeddings.distillation_token")
    model.load_state_dict(_fuse_qkv(state))
    _check_same_logits(original, model.eval())
    return model


def back_to_transformers(model: VisionTransformer, original: nn.Module) -> None:
    """Load the weights of a `to_timm` model into the transformers ViT it was made of, or one like it.

    Raises:
        RuntimeError: the logits of both differ.
    """
    timm_state = model.state_dict()
    state = {}
    for name in original.state_dict():
        timm_name = _renamed(name)
        part = re.search(r"\.attn\.([qkv])\.", timm_name)
        if part:
            fused = timm_state[timm_name.replace(part[0], ".attn.qkv.")]
            state[name] = fused.chunk(3)["qkv".index(part[1])]
        else:
            state[name] = timm_state[timm_name]
    original.load_state_dict(state)
    _check_same_logits(original, model.eval())


def _renamed(name: str) -> str:
    """timm's name, but query, key and value still apart: blocks.0.attn.q.weight."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _fuse_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value of each block (D, D) under one another as timm's qkv (3 D, D); biases likewise."""
    parts = {name: value for name, value in state.items() if re.search(r"\.attn\.[qkv]\.", name)}
    fused = {name: value for name, value in state.items() if name not in parts}
    for name in parts:
        if ".attn.q." in name:
            qkv = [parts[name.replace(".attn.q.", f".attn.{letter}.")] for letter in "qkv"]
            fused[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(qkv)
    return fused


@torch.no_grad()
def _check_same_logits(original: nn.Module, model: VisionTransformer) -> None:
    config = original.config
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, config.num_channels, config.image_size, config.image_size, generator=generator)
    expected = original.eval()(pixel_values=images).logits
    if not expected.isfinite().all():
        raise ValueError("its logits are not finite: check layer_norm_eps and the other settings of config.json.")
    difference = (model(images) - expected).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    if not difference <= allowed:  # a difference that is no number is refused too
        raise RuntimeError(
            f"the converted teacher's logits differ from the original's by {difference:.2g} (at most {TOLERANCE} "
            f"expected): timm {timm.__version__} and this release of transformers do not compute the same model."
        )
