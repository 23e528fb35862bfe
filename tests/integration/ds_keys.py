"""Steps of the real engine under a DeepSpeed JSON against a plain torch loop on the same images; runs on every rank."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from models.moe.layer import MoEConfig
from models.moe.out import auxiliary_loss
from models.vmoe.model import VMoE, VMoEConfig
from trainer.config.ds_config import read_ds_config, resolve
from trainer.config.phases import ScheduleConfig
from trainer.distributed.engine import build_engine, parameter_groups
from trainer.distributed.ranks import Dist

STEPS = 2
ACCUMULATION = 2
MICRO_BATCH = 4
SCHEDULE = ScheduleConfig(epochs=1, lr=4.0, optimizer="sgd", momentum=0.9, weight_decay=0.01, warmup_epochs=0)
STUDENT = VMoEConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_dim=24, num_classes=5,
                     moe_blocks="1", seed=4, moe=MoEConfig(num_experts=4, k=2, noise_std=0.0))  # fmt: skip


def student() -> VMoE:
    """A student whose head is not zero, so that every weight has a gradient."""
    model = VMoE(STUDENT)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return model


def loss_of(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Something with a large gradient for every parameter, routers included."""
    out: dict = {}
    return model(images, out).square().mean() + auxiliary_loss(out)


def deviation(dist: Dist, values: Mapping[str, Any], ep_size: int, clip: float) -> float:
    """How far the weights after STEPS steps are from the plain loop's, as a share of the way they went (collective).

    Args:
        values: of the DeepSpeed JSON, beside batch, clipping and ep size.
    """
    values = copy.deepcopy(dict(values)) | {"trainer": {"ep_size": ep_size}}
    values.setdefault("zero_optimization", {}).setdefault("stage", 1)
    values |= {"train_micro_batch_size_per_gpu": MICRO_BATCH, "gradient_accumulation_steps": ACCUMULATION}
    schedule = replace(SCHEDULE, clip=clip, global_batch=None)
    settings = resolve(
        read_ds_config(values), schedule, world=dist.world, local_world=dist.world, num_experts=4, phase="train"
    )
    shape = (STEPS, ACCUMULATION, dist.world, MICRO_BATCH, 3, 16, 16)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    engine = build_engine(student(), schedule, settings, steps_per_epoch=STEPS, dist=dist)
    rates = []
    try:
        engine.module.train()
        for step in range(STEPS):
            for part in range(ACCUMULATION):
                engine.backward(loss_of(engine, images[step, part, dist.rank].to(engine.dtype)))
                engine.step(step)
            rates.append(engine.lr)
        trained = engine.fp32_state()
    finally:
        engine.close()
    plain = plain_loop(images, rates, clip)
    start = student().state_dict()
    return max(
        float((trained[name] - plain[name]).abs().max() / (plain[name] - start[name]).abs().max().clamp_min(1e-12))
        for name in plain
    )


def plain_loop(images: torch.Tensor, rates: list[float], clip: float) -> dict[str, torch.Tensor]:
    """The same steps by torch alone, one micro-batch of every rank after another."""
    model = student().train()
    sgd = torch.optim.SGD(parameter_groups(model, SCHEDULE.weight_decay), lr=1.0, momentum=SCHEDULE.momentum)
    for step, rate in enumerate(rates):
        for group in sgd.param_groups:
            group["lr"] = rate
        micro_batches = images[step].flatten(0, 1)
        for micro_batch in micro_batches:
            (loss_of(model, micro_batch) / len(micro_batches)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        sgd.step()
        sgd.zero_grad()
    return {name: value.detach() for name, value in model.state_dict().items()}
