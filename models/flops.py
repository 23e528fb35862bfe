"""Multiply-add counts from shapes: the one place every cost in a result or report comes from.

FLOPs = 2 x multiply-adds of every matrix product and convolution, attention scores included; normalisation,
activations, rotations of positions and softmax are left out, as torch.utils.flop_counter leaves them out. An MoE block
counts the k experts a token is sent to, not empty slots; what activation checkpointing computes again is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from timm.layers import AttentionPoolLatent
from torch import nn

from .moe.expert import LAYERS
from .moe.layer import MoE

ONE_TOKEN = ("head", "head_dist", "pre_logits")  # run on the pooled token, not on the sequence


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image through layers, by what they are spent on."""

    forward: int = 0
    to_input: int = 0  # backward: the gradient with respect to what the layers are given
    to_weights: int = 0  # backward: the gradient with respect to their parameters

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.to_input + other.to_input, self.to_weights + other.to_weights)

    @property
    def relaying(self) -> int:
        """Of frozen layers behind something that is trained: the forward, and the gradient they pass on."""
        return self.forward + self.to_input

    @property
    def trained(self) -> int:
        """Of trained layers: forward and both parts of the backward."""
        return self.forward + self.to_input + self.to_weights


def forward_flops(module: nn.Module, tokens: int) -> int:
    """FLOPs of one image forward through every layer of `module`; see flops."""
    return flops(module, tokens).forward


def flops(module: nn.Module, tokens: int) -> Flops:
    """FLOPs of one image through every layer of `module`, forward and backward.

    Args:
        module: a timm VisionTransformer, a Stage, a StudentModule or a MetaModel (layers are found by type), on plain
            torch or expert parallel. What it is given takes no gradient where that are images, or a student module.
        tokens: length of the token sequence T, prefix tokens included.
    """
    if hasattr(module, "count_flops"):
        # types of layers do not tell: it knows how often each is run
        return module.count_flops(tokens)
    if isinstance(module, MoE) or hasattr(module, "deepspeed_moe"):
        # T (D E + k L D H): the router, then k experts of L products each, two or (SwiGLU) three
        router = module.dim * module.config.num_experts
        experts = module.config.k * len(LAYERS[module.act]) * module.dim * module.hidden
        return with_weights(tokens * (router + experts))
    if isinstance(module, nn.Conv2d | nn.Linear):
        # a patch embedding is one product per patch
        return with_weights(tokens * module.weight.numel())
    if hasattr(module, "directions"):
        # a stitch tied to a basis: a product with weights that are fixed
        return replace(with_weights(tokens * module.directions.numel()), to_weights=0)
    if isinstance(module, AttentionPoolLatent):
        return _attention_pool(module, tokens)
    total = Flops()
    query = getattr(module, "qkv", None) or getattr(module, "q_proj", None)  # attention, in one layer or in three
    if query is not None:
        # T^2 D twice: scores q k^T, and the values they mix
        total += of_states(2 * tokens * tokens * query.in_features)
    for name, child in module.named_children():
        if name == "attn_pool" and not getattr(module, "pools", True):
            continue  # of a Stage without classes, which gives tokens
        if name in ONE_TOKEN:
            total += flops(child, 1)
        elif name == "patch_embed":
            # images take no gradient
            total += replace(flops(child, tokens - module.num_prefix_tokens), to_input=0)
        elif name == "pre" and not isinstance(child, nn.Sequential):
            # nor do the border states a student module is given; behind a LayerNorm that learns, they do
            total += replace(flops(child, tokens), to_input=0)
        else:
            total += flops(child, tokens)
    return total


def num_tokens(vit: nn.Module) -> int:
    """Length of the token sequence of a timm VisionTransformer, prefix tokens included, or of another student."""
    if not hasattr(vit, "patch_embed"):
        return vit.num_tokens
    return vit.patch_embed.num_patches + vit.num_prefix_tokens


def with_weights(multiply_adds: int) -> Flops:
    """y = x W^T: the gradients of x and of W are a product of the same size each."""
    return Flops(2 * multiply_adds, 2 * multiply_adds, 2 * multiply_adds)


def of_states(multiply_adds: int) -> Flops:
    """A product of two states that both want a gradient, whether any weights do or not."""
    return Flops(2 * multiply_adds, 4 * multiply_adds, 0)


def _attention_pool(pool: AttentionPoolLatent, tokens: int) -> Flops:
    """One learned query looks at all tokens."""
    total = flops(pool.kv, tokens) + flops(pool.proj, 1) + flops(pool.mlp, 1)
    # the query comes of parameters: all its gradients are for them, that of the scores too
    query = flops(pool.q, 1)
    total += Flops(query.forward, 0, query.to_input + query.to_weights)
    scores = 2 * tokens * pool.q.in_features
    total += Flops(scores, scores, scores)
    return total + of_states(tokens * pool.q.in_features)
