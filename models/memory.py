"""Memory of activations from shapes: what the backward pass of a ViT or V-MoE needs of its forward.

Layers are found by type, as in flops.py. Kept are the inputs of every matrix product, normalisation and activation
function, and queries, keys, values and result of attention; the scores of attention are not (fused kernels). A frozen
layer that passes the gradient on keeps no input of its products: their weights are frozen.
"""

from __future__ import annotations

from torch import nn

from .flops import ONE_TOKEN
from .moe.layer import LAYERS, MoE, MoEConfig
from .moe.routing import capacity

FLOAT32 = 4  # bytes
INT64 = 8
ROUTER_COPIES = 4  # float32 tensors of tokens x experts that routing and its losses keep: logits, gates, ranks


def activation_bytes(module: nn.Module, tokens: int, bytes_per_number: int = FLOAT32) -> int:
    """Bytes that training `module` keeps of one image until its backward pass, without activation checkpointing.

    Args:
        module: a timm VisionTransformer or what behaves like one.
        tokens: length of the token sequence, prefix tokens included.
        bytes_per_number: 4 in float32, 2 in bfloat16.
    """
    return kept_bytes(module, 1, tokens, bytes_per_number)


def kept_bytes(
    module: nn.Module,
    images: int,
    tokens: int,
    bytes_per_number: int = FLOAT32,
    *,
    learns: bool = True,
    ep_size: int = 1,
    busiest: float = 1.0,
) -> int:
    """Bytes that a forward of `images` images keeps for the backward pass, without activation checkpointing.

    Args:
        module: of plain torch: MoE layers are counted as `ep_size` ranks share them.
        learns: its weights are trained; else the gradient of its input alone is wanted.
        ep_size: ranks that share the experts; each keeps the stacked weights of its own.
        busiest: tokens of the busiest expert over the mean, see expert_rows.
    """
    if isinstance(module, MoE):
        return _moe_bytes(module, images, tokens, bytes_per_number, learns, ep_size, busiest)
    own = images * bytes_per_number * _own_numbers(module, tokens, learns)
    if isinstance(module, nn.Conv2d | nn.Linear) or hasattr(module, "normalized_shape"):
        return own
    for name, child in module.named_children():
        length = 1 if name in ONE_TOKEN else tokens
        own += kept_bytes(child, images, length, bytes_per_number, learns=learns, ep_size=ep_size, busiest=busiest)
    return own


def widest_bytes(block: nn.Module, images: int, tokens: int, bytes_per_number: int, busiest: float = 1.0) -> int:
    """Bytes of the largest state inside a block: while it runs backward, one gradient of that size lies beside it."""
    if isinstance(block, MoE):
        rows = block.config.num_experts * expert_rows(block.config, images, tokens, busiest)
        return rows * block.hidden * bytes_per_number
    if isinstance(block, nn.Linear):
        return images * tokens * block.out_features * bytes_per_number
    return max(
        (widest_bytes(child, images, tokens, bytes_per_number, busiest) for child in block.children()), default=0
    )


def expert_rows(config: MoEConfig, images: int, tokens: int, busiest: float = 1.0) -> int:
    """Rows of each expert's batch for the tokens of `images` images, empty ones included.

    Args:
        busiest: where nothing is dropped, every expert's batch has the rows of the busiest expert of any rank: so many
            times the mean.
    """
    group = config.images_per_group or images
    if config.capacity_factor is None:
        mean = images * tokens * config.k / config.num_experts
        return min(images * tokens, round(mean * busiest))
    slots = capacity(group * tokens, config.num_experts, config.k, config.capacity_factor, config.capacity_multiple)
    return images // group * min(slots, group * tokens)


def _own_numbers(module: nn.Module, tokens: int, learns: bool) -> int:
    """What a layer keeps itself of one image, without its children."""
    if isinstance(module, nn.Conv2d):  # the patches themselves
        return learns * tokens * module.in_channels * module.kernel_size[0] * module.kernel_size[1]
    if isinstance(module, nn.Linear):
        return learns * tokens * module.in_features
    if hasattr(module, "normalized_shape"):  # LayerNorm, RMSNorm
        return tokens * module.normalized_shape[-1]
    numbers = 0
    if hasattr(module, "num_heads") and hasattr(module, "proj"):
        numbers += 4 * tokens * module.proj.in_features  # q, k, v and what they come to
    if hasattr(module, "fc1") and hasattr(module, "fc2"):
        numbers += tokens * module.fc1.out_features  # into the activation function
    if hasattr(module, "fc1_g"):
        numbers += 3 * tokens * module.fc1_g.out_features  # SwiGLU: gate, value, silu(gate)
    if hasattr(module, "gamma"):  # LayerScale
        numbers += learns * tokens * module.gamma.numel()
    return numbers


def _moe_bytes(
    moe: MoE, images: int, tokens: int, bytes_per_number: int, learns: bool, ep_size: int, busiest: float
) -> int:
    """Of an MoE layer as models/moe/layer.py computes it: batched products of stacked weights on padded rows."""
    config = moe.config
    *first, _ = LAYERS[moe.act]
    all_tokens = images * tokens
    rows = config.num_experts * expert_rows(config, images, tokens, busiest)
    # rows into the activation function; SwiGLU is given two, and keeps silu(gate) too
    numbers = rows * moe.hidden * (1 if len(first) == 1 else 3)
    if learns:
        # rows into the first products and into the last one
        numbers += rows * (moe.dim + moe.hidden)
    # what every token gets back from its k experts, before it is weighted
    numbers += all_tokens * config.k * moe.dim
    # the stacked weights of this rank's experts
    numbers += config.num_experts // ep_size * len(LAYERS[moe.act]) * moe.dim * moe.hidden
    routing = ROUTER_COPIES * all_tokens * config.num_experts * FLOAT32
    if bytes_per_number != FLOAT32:
        routing += all_tokens * moe.dim * FLOAT32  # routing is float32 always
    places = INT64 * (rows + all_tokens * config.k)
    return numbers * bytes_per_number + routing + places
