"""What the fits of a start (projection.py) and of modules put together (refit.py) share: parts of blocks, read and set.

B images, T tokens, D width, N tokens of all images, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..moe.expert import LAYERS, activate
from ..moe.layer import MoE


def hidden(expert: Mapping[str, nn.Linear] | nn.ModuleDict, activation: str, x: Tensor) -> Tensor:
    """What reaches the last layer of an MLP, (..., D) -> (..., H).

    Args:
        activation: a key of models.moe.expert.LAYERS.
    """
    return activate(activation, [expert[name](x) for name in LAYERS[activation][:-1]])


def gates(mlp: MoE, x_BTD: Tensor) -> Tensor:
    """The weight of each expert in a token's output, (N, E); 0 of those that it does not visit."""
    routing, _ = mlp.route_images(x_BTD)
    number_NK = routing.expert_GSK.flatten(0, 1)
    gates_NE = x_BTD.new_zeros(len(number_NK), mlp.config.num_experts)
    return gates_NE.scatter(1, number_NK, routing.weight_GSK.flatten(0, 1).to(gates_NE))


def set_layer(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Copy these values into a layer."""
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def class_token_half(states: Sequence[Tensor]) -> list[Tensor]:
    """Weights (B, T) by which the class token counts as much as all other tokens, of states (B, T, D) in batches: of
    what a head reads."""
    weights = []
    for state in states:
        weight = state.new_ones(state.shape[:2])
        weight[:, 0] = state.shape[1] - 1
        weights.append(weight)
    return weights
