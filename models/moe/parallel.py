"""The MoE layers of a model spread over ranks, and its weights under their plain names whatever the ep size."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layer import MoE


def expert_parallel(model: nn.Module, ep_size: int) -> nn.Module:
    """Turn every MoE of `model`, in place, into DeepSpeed's MoE layer that keeps this rank's experts only.

    Needs torch.distributed (deepspeed.init_distributed). ep_size 1 is for whenever DeepSpeed trains the model: clipping
    and ZeRO then know the experts.

    Raises:
        ValueError: an ep_size that does not divide the world size or the number of experts.
    """
    from .deepspeed_layer import ParallelMoE  # only here, because it imports DeepSpeed

    if not dist.is_initialized():
        raise ValueError("expert_parallel needs a process group: call deepspeed.init_distributed first.")
    if ep_size < 1 or dist.get_world_size() % ep_size:
        raise ValueError(f"ep_size {ep_size} does not divide the world size {dist.get_world_size()}.")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, MoE):
                continue
            if child.config.num_experts % ep_size:
                raise ValueError(f"ep_size {ep_size} does not divide num_experts {child.config.num_experts}.")
            setattr(parent, name, ParallelMoE(child, ep_size))
    return model


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All weights under the names of the plain model, on the CPU, complete on every rank.

    Collective over the expert parallel group: every rank must call it.
    """
    names = plain_names(model)
    state = {}
    for key, value in model.state_dict().items():
        plain, _, group = names[key]
        values = [value]
        if len(plain) > 1:
            values = [torch.empty_like(value) for _ in plain]
            dist.all_gather(values, value.contiguous(), group=group)
        state.update((name, part.detach().cpu()) for name, part in zip(plain, values))
    return state


def load_full_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load plain names into either form of a model; strict.

    Raises:
        ValueError: missing or unexpected names.
    """
    names = plain_names(model)
    expected = {name for plain, _, _ in names.values() for name in plain}
    missing = sorted(expected - set(state))
    if missing:
        raise ValueError(f"the state lacks {len(missing)} of {len(expected)} tensors, among them {missing[:3]}.")
    unexpected = sorted(set(state) - expected)
    if unexpected:
        raise ValueError(f"the state has {len(unexpected)} tensors the model lacks, among them {unexpected[:3]}.")
    model.load_state_dict({key: state[plain[ours]] for key, (plain, ours, _) in names.items()})


def plain_names(model: nn.Module) -> dict[str, tuple[list[str], int, dist.ProcessGroup | None]]:
    """For every state-dict key: the plain names it has on the ranks of its group, which of them is ours, the group."""
    names = {key: ([key], 0, None) for key in model.state_dict()}
    for prefix, module in model.named_modules():
        if hasattr(module, "deepspeed_moe"):
            start = f"{prefix}." if prefix else ""
            for key, (plain, ours) in module.plain_names().items():
                prefixed = [start + name for name in plain]
                names[start + key] = (prefixed, ours, module.deepspeed_moe.ep_group)
    return names
