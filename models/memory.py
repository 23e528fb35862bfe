"""Memory of activations from shapes: what the backward pass of a ViT or V-MoE needs of its forward.

Layers are found by type, as in flops.py. Kept are the inputs of every matrix product, normalisation and activation
function, and queries, keys, values and result of attention; the scores of attention are not (fused kernels). A frozen
layer that passes the gradient on keeps no input of its products: their weights are frozen.
"""

from __future__ import annotations

from torch import nn

from .flops import ONE_TOKEN
from .modules.attention import MOST_SCORED_TOKENS
from .moe.expert import LAYERS
from .moe.grouped import CHUNK_BYTES, GROUPED, LOOP
from .moe.layer import MoE, MoEConfig
from .moe.routing import capacity

FLOAT32 = 4  # bytes
INT64 = 8
ROUTER_COPIES = 2  # float32 tensors of tokens x experts that routing and its losses keep: logits, gates


def activation_bytes(module: nn.Module, tokens: int, bytes_per_number: int = FLOAT32) -> int:
    """Bytes that training `module` keeps of one image until its backward pass, without activation checkpointing.

    Args:
        module: a timm VisionTransformer or what behaves like one.
        tokens: length of the token sequence, prefix tokens included.
        bytes_per_number: 4 in float32, 2 in bfloat16.
    """
    return kept_bytes(module, 1, tokens, bytes_per_number, form=GROUPED)


def kept_bytes(
    module: nn.Module,
    images: int,
    tokens: int,
    bytes_per_number: int = FLOAT32,
    *,
    learns: bool = True,
    ep_size: int = 1,
    busiest: float = 1.0,
    form: str = LOOP,
) -> int:
    """Bytes that a forward of `images` images keeps for the backward pass, without activation checkpointing.

    Args:
        module: of plain torch: MoE layers are counted as `ep_size` ranks share them.
        learns: its weights are trained; else the gradient of its input alone is wanted.
        ep_size: ranks that share the experts.
        busiest: rows of the busiest of those ranks over the mean, see expert_rows.
        form: of the experts' products, see models/moe/grouped.py; LOOP means a CPU.
    """
    if hasattr(module, "count_kept"):
        # types of layers do not tell: it knows what it is run on
        return module.count_kept(images, tokens, bytes_per_number)
    if isinstance(module, MoE):
        return _moe_bytes(module, images, tokens, bytes_per_number, learns, ep_size, busiest, form)
    own = images * bytes_per_number * _own_numbers(module, tokens, learns)
    if hasattr(module, "tokens_of_windows"):
        # blocks whose attention looks at windows: what goes into it, q, k, v and what they come to twice
        further = module.tokens_of_windows(tokens) - tokens
        own += images * bytes_per_number * 6 * further * module.width * module.blocks_in_windows(tokens)
    on_cpu_in_bfloat16 = form == LOOP and bytes_per_number != FLOAT32
    if on_cpu_in_bfloat16 and hasattr(module, "routes") and tokens <= MOST_SCORED_TOKENS:
        # attention of a V-MoE's block, made of products, keeps its scores
        own += images * bytes_per_number * module.attn.num_heads * tokens**2
    if isinstance(module, nn.Conv2d | nn.Linear) or hasattr(module, "normalized_shape"):
        return own
    for name, child in module.named_children():
        length = 1 if name in ONE_TOKEN else tokens
        own += kept_bytes(
            child, images, length, bytes_per_number, learns=learns, ep_size=ep_size, busiest=busiest, form=form
        )
    return own


def widest_bytes(
    block: nn.Module,
    images: int,
    tokens: int,
    bytes_per_number: int,
    *,
    ep_size: int = 1,
    busiest: float = 1.0,
    form: str = LOOP,
) -> int:
    """Bytes that the largest layer inside a block needs while it runs backward, beside what is kept; see kept_bytes."""
    if isinstance(block, MoE):
        return _moe_workspace(block, images, tokens, bytes_per_number, ep_size, busiest, form)
    if isinstance(block, nn.Linear):
        return images * tokens * block.out_features * bytes_per_number
    needs = []
    for child in block.children():
        needs.append(widest_bytes(child, images, tokens, bytes_per_number, ep_size=ep_size, busiest=busiest, form=form))
    return max(needs, default=0)


def expert_rows(config: MoEConfig, images: int, tokens: int, busiest: float = 1.0) -> int:
    """Rows that the experts of a layer compute on one rank, at most, where every rank has so many images.

    Args:
        busiest: rows of the busiest rank over the mean, where several share the experts.
    """
    choices = round(images * tokens * config.k * busiest)
    if config.capacity_factor is None:
        return choices
    group = config.images_per_group or images
    slots = capacity(group * tokens, config.num_experts, config.k, config.capacity_factor, config.capacity_multiple)
    return min(choices, images // group * config.num_experts * min(slots, group * tokens))


def decided_bytes(moe: MoE, images: int, tokens: int) -> int:
    """What an MoE layer keeps of where its tokens go while its block is to be computed again in backward."""
    choices = images * tokens * moe.config.k
    # Choice: expert and slot; Dispatch: token and choice of each row, row of each choice
    return INT64 * (3 * choices + 2 * expert_rows(moe.config, images, tokens))


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
    moe: MoE,
    images: int,
    tokens: int,
    bytes_per_number: int,
    learns: bool,
    ep_size: int,
    busiest: float,
    form: str,
) -> int:
    """Of an MoE layer as models/moe/grouped.py computes it, on one rank or (deepspeed_layer.py) on several."""
    config = moe.config
    *first, _ = LAYERS[moe.act]
    all_tokens = images * tokens
    sent = expert_rows(config, images, tokens)
    rows = sent if ep_size == 1 else expert_rows(config, images, tokens, busiest)
    # what the experts are given: the tokens in the loop on one rank, else their rows; and rows into the activation
    numbers = all_tokens * moe.dim if form == LOOP and ep_size == 1 else rows * moe.dim
    numbers += rows * moe.hidden * len(first)
    if learns:
        numbers += rows * moe.hidden  # into the last product
    # what comes back from the experts, before it is weighted
    numbers += sent * moe.dim
    integers = 2 * rows + all_tokens * config.k
    if form != LOOP:
        if len(first) == 2:
            numbers += rows * moe.hidden  # silu(gate)
        # the stacked weights of this rank's experts
        numbers += config.num_experts // ep_size * len(LAYERS[moe.act]) * moe.dim * moe.hidden
        numbers += rows * config.num_experts // ep_size  # of which expert a row is, for the biases
    routing = ROUTER_COPIES * all_tokens * config.num_experts * FLOAT32
    if bytes_per_number != FLOAT32:
        routing += all_tokens * moe.dim * FLOAT32  # routing is float32 always
    return numbers * bytes_per_number + routing + INT64 * integers


def _moe_workspace(
    moe: MoE, images: int, tokens: int, bytes_per_number: int, ep_size: int, busiest: float, form: str
) -> int:
    """Of an MoE layer in backward: gradients of its experts here and of hidden rows, what is gathered and summed."""
    of_weights = moe.config.num_experts // ep_size * len(LAYERS[moe.act]) * moe.dim * moe.hidden * bytes_per_number
    rows = expert_rows(moe.config, images, tokens, 1.0 if ep_size == 1 else busiest)
    hidden_rows = rows * moe.hidden * bytes_per_number
    if form == LOOP and hidden_rows > CHUNK_BYTES:
        rows = rows * CHUNK_BYTES // hidden_rows
        hidden_rows = CHUNK_BYTES
    # rows of outputs and inputs, and the sums over a token's choices, in float32
    sums = 2 * rows * moe.dim * bytes_per_number + images * tokens * moe.dim * FLOAT32
    return of_weights + hidden_rows + sums
