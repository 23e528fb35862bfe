"""Multiply-add counts from shapes: the one function every cost in a result or report comes from.

FLOPs = 2 x multiply-adds of every matrix product and convolution, attention scores included; normalisation,
activations, rotations of positions and softmax (under 2% at the sizes used) are left out. An MoE block counts the k
experts a token is sent to, not empty slots. Backward costs twice the forward; a frozen module that only passes
gradients on costs once more.
"""

from __future__ import annotations

from timm.layers import AttentionPoolLatent
from torch import nn

from .moe.layer import LAYERS, MoE

ONE_TOKEN = ("head", "head_dist", "pre_logits")  # run on the pooled token, not on the sequence


def forward_flops(module: nn.Module, tokens: int) -> int:
    """FLOPs of one image through every layer of `module`.

    Args:
        module: a timm VisionTransformer, a Stage, a StudentModule or a MetaModel (layers are found by type), on plain
            torch or expert parallel.
        tokens: length of the token sequence T, prefix tokens included.
    """
    if isinstance(module, MoE) or hasattr(module, "deepspeed_moe"):
        # T (D E + k L D H): the router, then k experts of L products each, two or (SwiGLU) three
        router = module.dim * module.config.num_experts
        experts = module.config.k * len(LAYERS[module.act]) * module.dim * module.hidden
        return 2 * tokens * (router + experts)
    if isinstance(module, nn.Conv2d | nn.Linear):
        # a patch embedding is one product per patch (the few prefix tokens are counted too)
        return 2 * tokens * module.weight.numel()
    if isinstance(module, AttentionPoolLatent):
        # one query looks at all tokens: keys and values of each, scores, and the values they mix
        of_tokens = 2 * module.kv.weight.numel() + 2 * 2 * module.q.in_features
        of_query = sum(forward_flops(part, 1) for part in (module.q, module.proj, module.mlp))
        return tokens * of_tokens + of_query
    total = 0
    query = getattr(module, "qkv", None) or getattr(module, "q_proj", None)  # attention, in one layer or in three
    if query is not None:
        # T^2 D twice: scores q k^T, and the values they mix
        total += 2 * 2 * tokens * tokens * query.in_features
    for name, child in module.named_children():
        total += forward_flops(child, 1 if name in ONE_TOKEN else tokens)
    return total


def num_tokens(vit: nn.Module) -> int:
    """Length of the token sequence of a timm VisionTransformer, prefix tokens included."""
    return vit.patch_embed.num_patches + vit.num_prefix_tokens
