"""What timm's families of vision transformers do before their blocks, and which positions each block takes.

| family | before the blocks | every block takes |
|---|---|---|
| VisionTransformer | patches, prefix tokens, learned positions | nothing |
| Eva | the same, and the rotary embedding | `rope`: one for all blocks, or one each (`rope_mixed`) |
| Beit | patches, class token, positions where it has them | `shared_rel_pos_bias`, where the model has one |

A rotary embedding and a relative bias are functions of the patch grid, so every part of a model can compute its own.
B images, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.layers import RotaryEmbeddingMixed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

FAMILIES = (VisionTransformer, Eva, Beit)  # timm's classes whose models can be cut into stages

Positions = Mapping[str, Mapping[str, Any]]  # number of a block -> arguments of its forward


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Images (B, C, H, W) -> what the first block is fed, (B, T, D); the same steps as in the model's own forward."""
    x_BTD = model.patch_embed(images)
    if isinstance(model, Beit):  # has no method for this
        class_token = model.cls_token.expand(len(x_BTD), -1, -1)
        x_BTD = torch.cat((class_token, x_BTD), dim=1)
        if model.pos_embed is not None:
            x_BTD = x_BTD + model.pos_embed
        return model.pos_drop(x_BTD)
    if isinstance(model, Eva):
        x_BTD, _ = model._pos_embed(x_BTD)  # its rotary embedding is that of block_positions
        return model.norm_pre(x_BTD)
    return model.norm_pre(model.patch_drop(model._pos_embed(x_BTD)))


def block_positions(
    rope: nn.Module | None, rel_pos_bias: nn.Module | None, grid: tuple[int, int], numbers: Iterable[str]
) -> Positions:
    """What each block takes beside its tokens.

    Args:
        rope: the model's part of this name, one of timm's rotary embeddings.
        rel_pos_bias: the model's part of this name, shared by the blocks of a Beit.
        grid: patches down and across.
        numbers: of the blocks in the whole model.
    """
    if rel_pos_bias is not None:
        bias = rel_pos_bias()
        return {number: {"shared_rel_pos_bias": bias} for number in numbers}
    if rope is None:
        return {}
    # timm keeps the embedding of a fixed grid; without one it is computed for the grid at hand
    fixed = getattr(rope, "feat_shape", None) is not None
    embedding = rope.get_embed() if fixed else rope.get_embed(shape=grid)
    per_block = learned_per_block(rope)
    return {number: {"rope": embedding[int(number)] if per_block else embedding} for number in numbers}


def learned_per_block(rope: nn.Module | None) -> bool:
    """Whether a rotary embedding has frequencies of its own for every block, learned (`rope_mixed`)."""
    return isinstance(rope, RotaryEmbeddingMixed)
