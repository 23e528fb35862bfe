"""Which form of attention is quick where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MOST_SCORED_TOKENS = 512  # up to which attention made of products keeps its scores


@contextmanager
def quick_attention(attention: nn.Module, x_BTD: Tensor) -> Iterator[None]:
    """Inside, timm's attention of bfloat16 on a CPU is made of products, where its scores are few enough to be kept.

    torch's fused kernel took 2.3 times as long there, forward and backward of 197 tokens; in float32 it is as fast.
    """
    slow = x_BTD.device.type == "cpu" and x_BTD.dtype == torch.bfloat16 and x_BTD.shape[1] <= MOST_SCORED_TOKENS
    if not (slow and attention.fused_attn):
        yield
        return
    attention.fused_attn = False
    try:
        yield
    finally:
        attention.fused_attn = True
