"""What only a NAC has to tell of itself: its circuit, and what one image costs."""

from __future__ import annotations

from typing import Any

from ..flops import forward_flops
from .model import NAC


def details(model: NAC) -> dict[str, Any]:
    """Plain values for people and JSON, from shapes alone."""
    config = model.config
    return {
        "state_width": config.state_dim,
        "code_width": config.code_dim,
        "input_latents": config.input_latents,
        "mediators": config.mediator_latents,
        "output_latents": config.output_latents,
        "propagators": config.propagators,
        "graph": config.graph,
        "noisy_evaluation": config.noisy_evaluation,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_image": forward_flops(model, model.num_tokens),
    }
