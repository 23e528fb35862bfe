"""Why the likeliest wrong choices of a teacher cannot be cut into modules, and which family to take instead."""

from typing import Any

SUPPORTED = (
    "Supported, with or without a head: from transformers ViT, DeiT, DINOv2, DINOv3, CLIP, MetaCLIP 2, SigLIP, AIMv2, "
    "MAE, MSN, I-JEPA, BEiT and Data2Vec; from timm every model of its files vision_transformer, deit, eva and beit "
    "(docs/teachers.md)."
)
WINDOWS = "its blocks work on windows of a shrinking grid, so its tokens are not the same from block to block"
CONVOLUTIONS = "it is made of convolutions and has no tokens"
VIT_IDS = "a ViT of the same data, as timm/vit_base_patch16_224.augreg_in21k_ft_in1k"

# transformers model_type, file of timm or class of timm -> (family, why it cannot, the nearest one that works)
REFUSED = {
    "siglip2": (
        "SigLIP 2 NaFlex",
        "it packs images of every shape into one sequence",
        "google/siglip2-base-patch16-224",
    ),
    "siglip2_vision_model": (
        "SigLIP 2 NaFlex",
        "it packs images of every shape into one sequence",
        "google/siglip2-base-patch16-224",
    ),
    "naflexvit": (
        "NaFlex",
        "it packs images of every shape into one sequence",
        "the same of a fixed size, as timm/vit_base_patch16_siglip_224.v2_webli",
    ),
    "NaFlexVit": (
        "NaFlex",
        "it packs images of every shape into one sequence",
        "the same architecture without use_naflex",
    ),
    "sam": ("SAM", "most of its blocks look at windows of the image", "timm/vit_base_patch16_224.mae"),
    "sam2": ("SAM 2", WINDOWS, "timm/vit_base_patch16_224.mae"),
    "vision_transformer_sam": (
        "SAM",
        "most of its blocks look at windows of the image",
        "timm/vit_base_patch16_224.mae",
    ),
    "vitdet": ("ViTDet", "most of its blocks look at windows of the image", "timm/vit_base_patch16_224.mae"),
    "vision_transformer_relpos": (
        "relative-position ViT",
        "its relative positions are made inside each block by a network of its own",
        "a BEiT, as timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k",
    ),
    "vision_transformer_hybrid": (
        "hybrid ViT",
        "a ResNet stands before its blocks",
        "timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
    ),
    "levit": ("LeViT", WINDOWS, VIT_IDS),
    "cait": ("CaiT", "its class token joins in the last blocks only", "timm/deit3_base_patch16_224.fb_in1k"),
    "xcit": ("XCiT", "its class token joins in the last blocks only", "timm/deit3_base_patch16_224.fb_in1k"),
    "swin": ("Swin", WINDOWS, VIT_IDS),
    "swinv2": ("Swin v2", WINDOWS, VIT_IDS),
    "swin_transformer": ("Swin", WINDOWS, VIT_IDS),
    "swin_transformer_v2": ("Swin v2", WINDOWS, VIT_IDS),
    "pvt": ("PVT", WINDOWS, VIT_IDS),
    "pvt_v2": ("PVT v2", WINDOWS, VIT_IDS),
    "maxxvit": ("MaxViT", WINDOWS, VIT_IDS),
    "mvitv2": ("MViT v2", WINDOWS, VIT_IDS),
    "hiera": ("Hiera", WINDOWS, "timm/vit_base_patch16_224.mae"),
    "resnet": ("ResNet", CONVOLUTIONS, VIT_IDS),
    "convnext": ("ConvNeXt", CONVOLUTIONS, VIT_IDS),
    "convnextv2": ("ConvNeXt v2", CONVOLUTIONS, "timm/vit_base_patch16_224.mae"),
    "dinov3_convnext": ("DINOv3 ConvNeXt", CONVOLUTIONS, "timm/vit_small_patch16_dinov3.lvd1689m"),
    "efficientnet": ("EfficientNet", CONVOLUTIONS, VIT_IDS),
    "regnet": ("RegNet", CONVOLUTIONS, VIT_IDS),
}


def refusal(files: Any, what: str, family: str) -> str:
    """Why a checkpoint cannot be split, in one line.

    Args:
        files: the checkpoint.
        what: how config.json names it.
        family: a key of REFUSED, or anything else.
    """
    if family not in REFUSED:
        return (
            f"{files} ({what}) cannot be split into modules: it is not a vision transformer of this list. {SUPPORTED}"
        )
    name, reason, nearest = REFUSED[family]
    return (
        f"{files} ({what}) cannot be split into modules. {name}: {reason}. The nearest that works: {nearest}. "
        f"{SUPPORTED}"
    )
