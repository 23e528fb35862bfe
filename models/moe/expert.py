"""What one expert computes: the MLP of a dense block, by the names its layers have there."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

GELU = {"erf": "none", "tanh": "tanh"}  # our name -> F.gelu's `approximate`; timm and transformers use erf
SWIGLU = "swiglu"
# what an MLP computes between its layers -> its linear layers by timm's names: fc2(gelu(fc1(x))), or of SwiGLU (Shazeer
# 2020, arXiv 2002.05202) fc2(silu(fc1_g(x)) * fc1_x(x))
LAYERS = {**dict.fromkeys(GELU, ("fc1", "fc2")), SWIGLU: ("fc1_g", "fc1_x", "fc2")}


def new_expert(dim: int, hidden: int, act: str) -> nn.ModuleDict:
    """The linear layers of one expert, by the names a dense MLP has for them."""
    *first, last = LAYERS[act]
    layers = nn.ModuleDict({name: nn.Linear(dim, hidden) for name in first})
    layers[last] = nn.Linear(hidden, dim)
    return layers


def activate(act: str, outputs: Sequence[Tensor]) -> Tensor:
    """What reaches the last layer of an MLP, from the outputs of the layers before it in the order of LAYERS[act]."""
    if act == SWIGLU:
        gate, value = outputs
        return F.silu(gate) * value
    return F.gelu(outputs[0], approximate=GELU[act])
