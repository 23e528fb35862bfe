"""The only caller of deepspeed.initialize: parameter groups, MoE, schedule, and one optimiser step at a time.

The engine wraps only what is trained. Frozen models (teacher, meta model) stay outside and are merely moved here.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import group_parameters
from timm.scheduler import CosineLRScheduler
from torch import nn

from models.modules.positions import FAMILIES
from models.moe.parallel import expert_parallel, full_state_dict
from trainer.config.ds_config import Settings
from trainer.config.phases import ScheduleConfig
from trainer.distributed.average import WeightAverage
from trainer.distributed.ranks import Dist
from trainer.distributed.zero_state import AVERAGE, Flats

REFERENCE_BATCH = 512  # the learning rates of the recipes are meant for this global batch
# as in timm: tokens and what says where a token is
NO_DECAY_NAMES = ("pos_embed", "cls_token", "reg_token", "dist_token", "relative_position_bias_table", "freqs")


@dataclass
class Engine:
    """A DeepSpeed engine, its learning-rate schedule, its resolved settings, and the average of its weights if any."""

    deepspeed: Any  # deepspeed.DeepSpeedEngine
    schedule: CosineLRScheduler
    settings: Settings
    average: WeightAverage | None = None

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        return self.deepspeed.module

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights in the forward pass."""
        return working_type(self.settings)

    @property
    def lr(self) -> float:
        """Learning rate of the last step; the head's, where layers have their own."""
        return max(group["lr"] for group in self.deepspeed.optimizer.param_groups)

    @property
    def beside_masters(self) -> Flats:
        """What checkpoints hold beside weights and moments."""
        return {} if self.average is None else {AVERAGE: self.average.flats}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro-batch; DeepSpeed divides by the accumulation."""
        self.deepspeed.backward(loss)

    def step(self, number: int) -> None:
        """After each micro-batch; the weights change at the last one of an accumulation.

        Args:
            number: optimiser steps done before this one; sets the learning rate.
        """
        self.schedule.step_update(number)
        self.deepspeed.step()
        if self.average is not None and self.deepspeed.was_step_applied():
            self.average.update(number)

    def grad_norm(self) -> float:
        """Gradient norm of the last optimiser step before clipping, experts included; nan when not computed."""
        norm = self.deepspeed.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def fp32_state(self) -> dict[str, torch.Tensor]:
        """Canonical state dict in fp32 on the CPU, the masters under bf16 (collective, the same on every rank)."""
        if not self.settings.bf16:
            return full_state_dict(self.module)
        from deepspeed.utils import safe_get_full_fp32_param

        # safe_get_full_fp32_param is collective: all masters first, in one order on every rank
        masters = {name: safe_get_full_fp32_param(p) for name, p in self.module.named_parameters()}
        working = {name: p.data for name, p in self.module.named_parameters()}
        try:
            for name, p in self.module.named_parameters():
                master = masters[name]  # None = not trained
                p.data = p.data.float() if master is None else master
            return full_state_dict(self.module)
        finally:
            for name, p in self.module.named_parameters():
                p.data = working[name]

    @contextmanager
    def published(self) -> Iterator[None]:
        """Inside the block the weights are what the phase publishes: their average, if there is one (collective)."""
        if self.average is None:
            yield
            return
        with self.average.in_force():
            yield

    def close(self) -> None:
        """Free DeepSpeed's buffers and hooks, so that the next engine of this process starts clean."""
        self.deepspeed.destroy()


def working_type(settings: Settings) -> torch.dtype:
    """Type of the weights in a forward pass, of frozen models and images as well."""
    return torch.bfloat16 if settings.bf16 else torch.float32


def build_engine(
    module: nn.Module,
    schedule: ScheduleConfig,
    settings: Settings,
    *,
    steps_per_epoch: int,
    dist: Dist,
    layer_decay: float = 1.0,
    ema: float = 0.0,
) -> Engine:
    """Wrap a module for training.

    Args:
        module: everything that is trained, on the CPU, fp32; its MoE layers become expert parallel in place.
        schedule: the phase's optimiser and learning rate (lr x global batch / 512).
        settings: the resolved DeepSpeed JSON.
        steps_per_epoch: optimiser steps per epoch, for the cosine and the warm-up.
        layer_decay: learning rate of a block relative to the block after it; 1 = the same for all.
        ema: decay of the average of the weights; 0 = none is kept.
    """
    import deepspeed

    expert_parallel(module, settings.ep_size)
    _set_checkpointing(module, settings.activation_checkpointing)
    optimizer = build_optimizer(_groups(module, schedule, layer_decay), schedule, settings)
    with _without_compiler():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(settings.config))
    cosine = build_cosine(engine.optimizer, schedule, settings, steps_per_epoch)
    average = WeightAverage(engine, ema) if ema else None
    return Engine(engine, cosine, settings, average)


def compile_blocks(module: nn.Module, backend: str = "inductor") -> None:
    """torch.compile, in place, attention and dense MLP of every block in `module`; names of parameters stay.

    Not whole blocks: experts are as many products as there are experts, of sizes that change with every batch.

    Args:
        backend: of torch.compile.
    """
    for block in module.modules():
        if hasattr(block, "attn") and hasattr(block, "mlp"):
            block.attn.compile(dynamic=False, backend=backend)
            if not getattr(block, "routes", False):
                block.mlp.compile(dynamic=False, backend=backend)


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Inside the block torch.compile leaves functions as they are.

    deepspeed.initialize compiles functions of an optimiser we never use (Muon), which loads torch's compiler: 1 s and
    more. torch reads the variable whenever torch.compile is called, so after the block it compiles again.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def parameter_groups(module: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups with and without weight decay: none on 1-D parameters, tokens and position embeddings.

    With a layer_decay below 1 there is such a pair for every block, for the embeddings, and for norm and head together
    with the last block; the schedule multiplies their learning rate with "lr_scale".

    Source: the published recipe (docs/method.md), timm's no_weight_decay names; layer-wise rates as in BEiT
    (arXiv 2106.08254), but the last block has the head's rate.
    """
    after = blocks_after(module) if layer_decay < 1 else {}
    # (without weight decay, blocks after them) -> parameters
    members: dict[tuple[bool, int], list[nn.Parameter]] = defaultdict(list)
    for name, p in module.named_parameters():
        if p.requires_grad:
            undecayed = p.ndim <= 1 or name.split(".")[-1] in NO_DECAY_NAMES
            members[undecayed, after.get(name, 0)].append(p)
    groups = []
    for undecayed, blocks in sorted(members):
        group = {"params": members[undecayed, blocks], "weight_decay": weight_decay, "name": "decay"}
        if undecayed:
            group["weight_decay"] = 0.0
            group["name"] = "no_decay"
        if blocks:
            group["name"] += f"_{blocks}_before_the_end"
        if after:
            # rate of a block = layer_decay x the rate of the block after it
            group["lr_scale"] = layer_decay**blocks
        groups.append(group)
    return groups


def blocks_after(module: nn.Module) -> dict[str, int]:
    """For the parameters of a vision transformer in `module`: how many of its blocks come after them.

    All of them for the embeddings, none for the last block, norm and head; a stitch counts as its block.
    """
    after = {}
    for prefix, part in module.named_modules():
        if isinstance(part, FAMILIES):
            depth = len(part.blocks)
            layers = group_parameters(part, part.group_matcher(), reverse=True)  # 0 = embeddings, 1 = first block
            for name, layer in layers.items():
                full_name = f"{prefix}.{name}" if prefix else name
                after[full_name] = max(0, depth - layer)
    return after


def build_optimizer(
    groups: list[dict[str, Any]], schedule: ScheduleConfig, settings: Settings
) -> torch.optim.Optimizer:
    """Torch's own optimisers, in one pass over the numbers where there is such a form (fused).

    Correct under ZeRO and on offloaded CPU state, and nothing to compile.
    """
    lr = _scaled_lr(schedule, settings)
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=schedule.momentum)
    return torch.optim.AdamW(groups, lr=lr, betas=schedule.betas, eps=schedule.eps, fused=True)


def build_cosine(
    optimizer: Any, schedule: ScheduleConfig, settings: Settings, steps_per_epoch: int
) -> CosineLRScheduler:
    """The learning rate of each step: a linear warm-up, then a cosine."""
    lr = _scaled_lr(schedule, settings)
    return CosineLRScheduler(
        optimizer,
        t_initial=schedule.epochs * steps_per_epoch,
        lr_min=min(schedule.min_lr, lr),
        warmup_t=round(schedule.warmup_epochs * steps_per_epoch),
        warmup_lr_init=min(schedule.warmup_lr, lr),
        t_in_epochs=False,  # the published code changes the rate once per epoch; per step is smoother and as cheap
    )


def _scaled_lr(schedule: ScheduleConfig, settings: Settings) -> float:
    """Linear scaling: the recipe's rate is that of a batch of REFERENCE_BATCH."""
    return schedule.lr * settings.global_batch / REFERENCE_BATCH


def _groups(module: nn.Module, schedule: ScheduleConfig, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups as the optimiser takes them, experts apart."""
    from deepspeed.moe.utils import has_moe_layers, split_params_into_different_moe_groups_for_optimizer

    groups = parameter_groups(module, schedule.weight_decay, layer_decay)
    if has_moe_layers(module)[0]:
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
        groups = [group for group in groups if group["params"]]
    return groups


def _set_checkpointing(module: nn.Module, enable: bool) -> None:
    for part in module.modules():
        if hasattr(part, "grad_checkpointing"):
            part.grad_checkpointing = enable
