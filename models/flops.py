"""Multiply-add counts from shapes: the one function every cost in a result or report comes from.

FLOPs = 2 x multiply-adds of every matrix product and convolution, attention scores included; normalisation,
activations and softmax (under 2% at the sizes used) are left out. An MoE block counts the k experts a token is sent
to, not empty slots. Backward costs twice the forward; a frozen module that only passes gradients on costs once more.
"""

from __future__ import annotations

from torch import nn

from .moe.layer import MoE

ONE_TOKEN = ("head", "head_dist", "pre_logits")  # run on the pooled token, not on the sequence


def forward_flops(module: nn.Module, tokens: int) -> int:
    """FLOPs of one image through every layer of `module`.

    Args:
        module: a timm VisionTransformer, a Stage, a StudentModule or a MetaModel (layers are found by type); on plain
            torch, so before it is made expert parallel.
        tokens: length of the token sequence T, prefix tokens included.
    """
    if isinstance(module, MoE):  # router, then k experts of two products each
        return 2 * tokens * (module.dim * module.config.num_experts + module.config.k * 2 * module.dim * module.hidden)
    if isinstance(module, nn.Conv2d):  # a patch embedding: one product per patch (the few prefix tokens counted too)
        return 2 * tokens * module.weight.numel()
    if isinstance(module, nn.Linear):
        return 2 * tokens * module.weight.numel()
    scores = 2 * 2 * tokens * tokens * module.qkv.in_features if hasattr(module, "qkv") else 0
    return scores + sum(
        forward_flops(child, 1 if name in ONE_TOKEN else tokens) for name, child in module.named_children()
    )


def num_tokens(vit: nn.Module) -> int:
    """Length of the token sequence of a timm VisionTransformer, prefix tokens included."""
    return vit.patch_embed.num_patches + vit.num_prefix_tokens
