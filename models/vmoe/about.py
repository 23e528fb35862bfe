"""What a saved V-MoE is, from its config.json and the names in its weights: sizes, experts, cost, images, classes."""

from __future__ import annotations

from typing import Any

import torch

from ..files.hub import CheckpointFiles, Weights
from ..files.saved import read, read_versions
from ..flops import forward_flops, num_tokens
from ..moe.layer import MoE
from .config import moe_numbers
from .files import FORMAT, check_counts
from .model import VMoE


def about(source: str, revision: str | None = None) -> dict[str, Any]:
    """Plain values for people and JSON; no weight is read.

    Raises:
        ValueError: see VMoE.from_pretrained.
    """
    files = CheckpointFiles(source, revision)
    config, preprocessing, labels = read(FORMAT, files)
    weights = Weights(files)
    weights.unwrap()
    check_counts(config, weights)
    with torch.device("meta"):
        model = VMoE(config)
    weights.check(model.state_dict())
    return {
        "source": str(files),
        "saved_by": read_versions(FORMAT, files).get("m2mkd_version"),
        "image_size": config.image_size,
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
        "classes": config.num_classes,
        "labels": labels,
        "preprocessing": preprocessing and preprocessing.to_dict(),
    }


def active_parameters(model: VMoE) -> int:
    """Parameters that one token meets: of the experts, those of k."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, MoE):
            expert = sum(parameter.numel() for parameter in module.experts[0].parameters())
            total -= expert * (module.config.num_experts - module.config.k)
    return total
