"""How alike the experts of a layer are: 1 for copies, near 0 for experts that were drawn independently."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layer import MoE


@torch.no_grad()
def expert_similarity(model: nn.Module) -> dict[str, float]:
    """Mean cosine over the pairs of experts, each flattened to one vector of weights and biases, per MoE layer.

    The mean over pairs is (|sum of the unit vectors|^2 - E) / (E (E - 1)), so that with expert parallelism one vector
    of an expert's size is summed over the group, and no rank ever holds the others' experts. Layers of one expert are
    left out. Collective over the expert parallel group: every rank must call it.
    """
    cosines = {}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            experts = module.experts
            group = None
        elif hasattr(module, "deepspeed_moe"):
            experts = module.deepspeed_moe.experts.deepspeed_experts
            group = module.deepspeed_moe.ep_group
        else:
            continue
        E = module.config.num_experts
        if E == 1:
            continue
        total = sum(_direction(expert) for expert in experts)
        if group is not None:
            dist.all_reduce(total, group=group)
        # |sum u_e|^2 = E + sum over the E (E - 1) ordered pairs of their cosine
        cosines[name] = (total.square().sum() - E) / (E * (E - 1))
    return {name: float(value) for name, value in cosines.items()}


def _direction(expert: nn.Module) -> Tensor:
    """An expert's parameters as one vector of length 1, in float32."""
    flat = torch.cat([parameter.detach().float().flatten() for parameter in expert.parameters()])
    return flat / flat.norm()
