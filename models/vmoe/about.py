"""What only a V-MoE has to tell of itself: its transformer, its experts, and what one token costs."""

from __future__ import annotations

from typing import Any

from ..flops import forward_flops, num_tokens
from ..moe.layer import MoE
from .config import moe_numbers
from .model import VMoE


def details(model: VMoE) -> dict[str, Any]:
    """Plain values for people and JSON, from shapes alone."""
    config = model.config
    return {
        "patch_size": config.patch_size,
        "width": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "expert_blocks": list(moe_numbers(config.moe_blocks, config.depth)),
        "experts": config.moe.num_experts,
        "experts_per_token": config.moe.k,
        "eval_capacity_factor": config.moe.eval_capacity_factor,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "active_parameters": active_parameters(model),
        "flops_per_image": forward_flops(model, num_tokens(model)),
    }


def active_parameters(model: VMoE) -> int:
    """Parameters that one token meets: of the experts, those of k."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, MoE):
            expert = sum(parameter.numel() for parameter in module.experts[0].parameters())
            total -= expert * (module.config.num_experts - module.config.k)
    return total
