"""Memory of activations from shapes: what the backward pass of a ViT needs of its forward.

Layers are found by type, as in flops.py. Kept are the inputs of every matrix product, normalisation and activation
function, and queries, keys, values and result of attention; the scores of attention are not (fused kernels).
"""

from __future__ import annotations

from torch import nn

from .flops import ONE_TOKEN

FLOAT32 = 4  # bytes


def activation_bytes(module: nn.Module, tokens: int, bytes_per_number: int = FLOAT32) -> int:
    """Bytes that training `module` keeps of one image until its backward pass, without activation checkpointing.

    Args:
        module: a timm VisionTransformer or what behaves like one, without experts.
        tokens: length of the token sequence, prefix tokens included.
        bytes_per_number: 4 in float32, 2 in bfloat16.
    """
    return bytes_per_number * _numbers(module, tokens)


def _numbers(module: nn.Module, tokens: int) -> int:
    if isinstance(module, nn.Conv2d):  # the patches themselves
        return tokens * module.in_channels * module.kernel_size[0] * module.kernel_size[1]
    if isinstance(module, nn.Linear):
        return tokens * module.in_features
    if hasattr(module, "normalized_shape"):  # LayerNorm, RMSNorm
        return tokens * module.normalized_shape[-1]
    total = 0
    if hasattr(module, "num_heads") and hasattr(module, "proj"):
        total += 4 * tokens * module.proj.in_features  # q, k, v and what they come to
    if hasattr(module, "fc1") and hasattr(module, "fc2"):
        total += tokens * module.fc1.out_features  # into the activation function
    if hasattr(module, "gamma"):  # LayerScale
        total += tokens * module.gamma.numel()
    for name, child in module.named_children():
        total += _numbers(child, 1 if name in ONE_TOKEN else tokens)
    return total
