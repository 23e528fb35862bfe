"""How vision transformers of transformers become timm's: one row per model type of config.json.

A row names transformers' class, the timm model of the same sizes, and what its tensors are called there. Names are
rewritten from those a loaded model has in memory, which transformers changes between releases (where a pattern has two
spellings the second is the older one). `convert.py` does the rest, and compares both models on a batch.
B images, T tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.layers import LayerNorm, RmsNorm, SwiGLU
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .pooling import ClassAndMean

Names = tuple[tuple[str, str], ...]  # regular expression -> what it becomes; all are tried in turn

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}

# query, key and value stay apart here (blocks.0.attn.q.weight) until convert.py joins them
VIT_NAMES: Names = (
    (r"^(vit|deit|dinov2|dinov2_with_registers|ijepa|beit|data2vec_vision)\.", ""),
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
DINOV2_NAMES: Names = (
    *VIT_NAMES,
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
BEIT_NAMES: Names = (
    *VIT_NAMES,
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"\.lambda_(\d)$", r".gamma_\1"),
    (r"^(shared_position_bias|encoder\.relative_position_bias)\.", "rel_pos_bias."),
    (r"(?<=\d)\.(attention\.attention\.)?relative_position_bias\.", ".attn."),
)
DINOV3_NAMES: Names = (
    (r"^(model\.)?layer\.", "blocks."),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.layer_scale(\d)\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
CLIP_NAMES: Names = (
    (r"^vision_model\.", ""),
    (r"^encoder\.layers\.", "blocks."),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn\.(q|k|v)_proj\.", r".attn.\1."),
)
SIGLIP_NAMES: Names = (
    (r"^(vision_model\.)?head\.probe$", "attn_pool.latent"),
    (r"^(vision_model\.)?head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"^(vision_model\.)?head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^(vision_model\.)?head\.layernorm\.", "attn_pool.norm."),
    (r"^(vision_model\.)?head\.mlp\.", "attn_pool.mlp."),
    *CLIP_NAMES,
)
AIMV2_NAMES: Names = (
    (r"^vision_model\.", ""),
    (r"^encoder\.layers\.", "blocks."),
    (r"^embeddings\.patch_embed\.", "patch_embed.proj."),
    (r"^embeddings\.rms_norm\.", "patch_embed.norm."),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^rms_norm\.", "norm."),
    (r"\.rms_norm(\d)\.", r".norm\1."),
    (r"\.attention\.out_proj\.", ".attn.proj."),
    (r"\.attention\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.ffn\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.ffn\.up_proj\.", ".mlp.fc1_x."),
    (r"\.ffn\.down_proj\.", ".mlp.fc2."),
)

# tensors of a checkpoint that its teacher has no use for: parts of pre-training, the text side, buffers of old releases
OF_PRETRAINING = r"(^|\.)(pooler|decoder|lm_head)\.|(^|\.)mask_token$"
OF_TEXT = (
    r"^(text_model|text_projection|visual_projection|logit_scale|logit_bias)(\.|$)|(^|\.)position_ids$|"
    r"^(vision_model\.)?head\.(cls_token|[kv]_proj\.|output_proj\.)"
)
OF_BEIT = r"(^|\.)(pooler\.dense|decode_head|auxiliary_head|lm_head)\.|(^|\.)mask_token$|relative_position_index$"


@dataclass(frozen=True)
class Layout:
    """One model type of transformers, as timm's."""

    family: str  # as people call it
    encoder: str  # transformers' class without a head
    names: Names
    build: Callable[[Any, int, nn.Module], nn.Module]  # configuration, number of classes, original -> a timm model
    whole: str = ""  # class whose `vision_model` is taken, where the encoder's does not read what such a model saves
    left_out: str = OF_PRETRAINING  # regular expression of tensors the teacher has no use for
    last_norm: str = ""  # part of the encoder that normalises its tokens, where its output is not normalised
    hides_patches: bool = False  # the encoder shuffles patches and leaves some out, unless it is told not to
    pools: bool = False  # the encoder's pooled output is what timm's model pools, too
    any_size: bool = False  # the original takes images of every size: its image processor says which
    same_at_other_sizes: bool = False  # original and timm make positions of another size alike

    @property
    def encoder_class(self) -> type[nn.Module]:
        import transformers  # slow to load, and teachers of timm do without

        return getattr(transformers, self.encoder)


def _plain(config: Any, num_classes: int, **changes: Any) -> VisionTransformer:
    """timm's VisionTransformer of a configuration's sizes.

    Args:
        changes: arguments of VisionTransformer that these sizes do not say.
    """
    image_size, patch_size = _square(config)
    hidden = changes.pop("hidden", None) or config.intermediate_size
    model_class = changes.pop("model_class", VisionTransformer)
    arguments = {
        "img_size": image_size,
        "patch_size": patch_size,
        "in_chans": config.num_channels,
        "num_classes": num_classes,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": _ratio(hidden, config.hidden_size),
        "qkv_bias": getattr(config, "qkv_bias", True),
        "weight_init": "skip",
    }
    if "act_layer" not in changes:
        arguments["act_layer"] = _activation(config)
    if "norm_layer" not in changes:
        arguments["norm_layer"] = partial(LayerNorm, eps=config.layer_norm_eps)
    return model_class(**arguments | changes)


def _vit(config: Any, num_classes: int, original: nn.Module) -> VisionTransformer:
    return _plain(config, num_classes)


def _deit(config: Any, num_classes: int, original: nn.Module) -> VisionTransformer:
    """Its distillation token is a register token where no head reads it, else a token with a head of its own."""
    if hasattr(original, "distillation_classifier"):
        return _plain(config, num_classes, model_class=VisionTransformerDistilled)
    return _plain(config, num_classes, reg_tokens=1)


def _ijepa(config: Any, num_classes: int, original: nn.Module) -> VisionTransformer:
    return _plain(config, num_classes, class_token=False, global_pool="avg", fc_norm=False)


def _dinov2(config: Any, num_classes: int, original: nn.Module) -> VisionTransformer:
    """With a head it reads class token and mean of the patches side by side; positions do not cover the registers."""
    hidden = int(config.hidden_size * config.mlp_ratio)
    changes: dict[str, Any] = {"init_values": config.layerscale_value}
    if config.use_swiglu_ffn:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8  # as Dinov2SwiGLUFFN computes it
        changes |= {"mlp_layer": SwiGLU, "act_layer": nn.SiLU}
    num_registers = getattr(config, "num_register_tokens", 0)
    if num_registers:
        changes |= {"reg_tokens": num_registers, "no_embed_class": True}
    if num_classes:
        changes["model_class"] = ClassAndMean
    return _plain(config, num_classes, hidden=hidden, **changes)


def _clip(config: Any, num_classes: int, original: nn.Module) -> VisionTransformer:
    """With a head it reads the mean of the patches before the last norm, without one the class token after it."""
    pooling: dict[str, Any] = {}
    if num_classes:
        pooling = {"global_pool": "avg", "final_norm": False}
    return _plain(config, num_classes, pre_norm=True, **pooling)


def _siglip(config: Any, num_classes: int, original: nn.Module) -> VisionTransformer:
    """With a head it reads the mean of the patches, without one its attention pooling does."""
    pooled_by_attention = getattr(config, "vision_use_head", True) and not num_classes
    pooling = "map" if pooled_by_attention else "avg"
    return _plain(config, num_classes, class_token=False, global_pool=pooling, fc_norm=False)


def _aimv2(config: Any, num_classes: int, original: nn.Module) -> VisionTransformer:
    """Its own attention pooling (of image-text checkpoints) has no counterpart: features are pooled by their mean."""
    norm = partial(RmsNorm, eps=config.rms_norm_eps)
    if config.hidden_act != "silu":
        raise ValueError(f"activation {config.hidden_act!r} is not silu, which the gated MLP of AIMv2 has.")
    return _plain(
        config,
        num_classes,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        proj_bias=config.qkv_bias or config.mlp_bias,
        norm_layer=norm,
        embed_norm_layer=norm,
        act_layer=nn.SiLU,
        mlp_layer=SwiGLU,
    )


def _dinov3(config: Any, num_classes: int, original: nn.Module) -> Eva:
    image_size, patch_size = _square(config)
    if config.key_bias:
        raise ValueError("its keys have a bias (key_bias true), which timm's rotary attention has no place for.")
    needed = "silu" if config.use_gated_mlp else "gelu"
    if config.hidden_act != needed:
        raise ValueError(f"activation {config.hidden_act!r} is not {needed}, which timm's blocks of this family have.")
    return Eva(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=config.num_channels,
        num_classes=num_classes,
        global_pool="token",
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=_ratio(config.intermediate_size, config.hidden_size),
        qkv_bias=config.query_bias or config.value_bias,
        swiglu_mlp=config.use_gated_mlp,
        swiglu_align_to=1,  # gate and value apart, of exactly that width
        init_values=config.layerscale_value,
        num_reg_tokens=config.num_register_tokens,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_temperature=config.rope_theta,
        rope_rotate_half=True,
        use_fc_norm=False,
        norm_layer=partial(LayerNorm, eps=config.layer_norm_eps),
    )


def _beit(config: Any, num_classes: int, original: nn.Module) -> Beit:
    """One that predicts words of pictures (BeitForMaskedImageModeling) has its norm before those, so on every token."""
    image_size, patch_size = _square(config)
    if config.hidden_act != "gelu":
        raise ValueError(f"activation {config.hidden_act!r} is not gelu, which timm's BEiT blocks have.")
    masked = predicts_words(original)
    if masked and not config.use_mean_pooling:
        raise ValueError("it has two norms after its last block (use_mean_pooling false); timm's BEiT has one.")
    beit = Beit(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=config.num_channels,
        num_classes=num_classes,
        global_pool="avg" if config.use_mean_pooling else "token",
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=_ratio(config.intermediate_size, config.hidden_size),
        norm_layer=partial(LayerNorm, eps=config.layer_norm_eps),
        init_values=config.layer_scale_init_value or None,
        use_abs_pos_emb=config.use_absolute_position_embeddings,
        use_rel_pos_bias=config.use_relative_position_bias,
        use_shared_rel_pos_bias=config.use_shared_relative_position_bias,
        use_fc_norm=config.use_mean_pooling and not masked,
    )
    names = original.state_dict().keys()
    if config.use_mean_pooling and not masked and not any("pooler.layernorm" in name for name in names):
        beit.fc_norm = nn.Identity()  # saved without the norm behind its pooling
    return beit


def predicts_words(original: nn.Module) -> bool:
    """Whether it is a BEiT with its head of pre-training, before which its last norm stands."""
    return hasattr(original, "lm_head")


def _ratio(hidden: int, width: int) -> float:
    return (hidden + 0.5) / width  # timm takes int(width * ratio)


def _activation(config: Any) -> str:
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"activation {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[config.hidden_act]


def _square(config: Any) -> tuple[int, int]:
    """Sides of image and patch in pixels."""
    if not (isinstance(config.image_size, int) and isinstance(config.patch_size, int)):
        raise ValueError(f"images and patches must be square, got {config.image_size} and {config.patch_size}.")
    return config.image_size, config.patch_size


_CLIP = {"names": CLIP_NAMES, "build": _clip, "left_out": OF_TEXT, "last_norm": "post_layernorm", "pools": True}
_SIGLIP = {"names": SIGLIP_NAMES, "build": _siglip, "left_out": OF_TEXT, "pools": True}
_AIMV2 = {"names": AIMV2_NAMES, "build": _aimv2, "left_out": OF_TEXT}
_BEIT = {"names": BEIT_NAMES, "build": _beit, "left_out": OF_BEIT, "pools": True, "any_size": True}
_DINO = {"pools": True, "any_size": True}

# model_type of config.json -> its row; whole image-text models have a row as well, of which the vision part is taken
LAYOUTS: Mapping[str, Layout] = {
    "vit": Layout("ViT", "ViTModel", VIT_NAMES, _vit),
    "deit": Layout("DeiT", "DeiTModel", VIT_NAMES, _deit),
    "vit_mae": Layout("MAE", "ViTMAEModel", VIT_NAMES, _vit, hides_patches=True),
    "vit_msn": Layout("MSN", "ViTMSNModel", VIT_NAMES, _vit),
    "ijepa": Layout("I-JEPA", "IJepaModel", VIT_NAMES, _ijepa),
    "dinov2": Layout("DINOv2", "Dinov2Model", DINOV2_NAMES, _dinov2, **_DINO),
    "dinov2_with_registers": Layout(
        "DINOv2", "Dinov2WithRegistersModel", DINOV2_NAMES, _dinov2, same_at_other_sizes=True, **_DINO
    ),
    "dinov3_vit": Layout("DINOv3", "DINOv3ViTModel", DINOV3_NAMES, _dinov3, same_at_other_sizes=True, **_DINO),
    "clip_vision_model": Layout("CLIP", "CLIPVisionModel", **_CLIP),
    "clip": Layout("CLIP", "CLIPVisionModel", **_CLIP),
    "metaclip_2_vision_model": Layout("MetaCLIP 2", "MetaClip2VisionModel", **_CLIP),
    "metaclip_2": Layout("MetaCLIP 2", "MetaClip2VisionModel", **_CLIP),
    "siglip_vision_model": Layout("SigLIP", "SiglipVisionModel", **_SIGLIP),
    "siglip": Layout("SigLIP", "SiglipVisionModel", **_SIGLIP),
    "aimv2_vision_model": Layout("AIMv2", "Aimv2VisionModel", **_AIMV2),
    "aimv2": Layout("AIMv2", "Aimv2VisionModel", whole="Aimv2Model", **_AIMV2),
    "beit": Layout("BEiT", "BeitModel", **_BEIT),
    "data2vec-vision": Layout("Data2Vec", "Data2VecVisionModel", **_BEIT),
}
