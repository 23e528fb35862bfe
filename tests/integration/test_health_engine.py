"""What the watch over a training rests on: ZeRO refuses a gradient that is not finite, and its norm is the true one.

The functions without test_ in their name run on the ranks, in forks of one warm python.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from models.moe.out import auxiliary_loss
from tests.integration.test_engine import ADAM, BATCH, CLIP, MODEL, SGD, batches, build, engine_for
from trainer.distributed import zero_state
from trainer.distributed.engine import Engine
from trainer.distributed.ranks import Dist, start


def run_steps(engine: Engine, dist: Dist, inputs: list[tuple[int, torch.Tensor, torch.Tensor]]) -> list[bool]:
    """Optimiser steps (number, images, labels) of all ranks together; whether each was made."""
    micro, made = engine.settings.micro_batch, []
    engine.module.train()
    for number, images, labels in inputs:
        for part in range(engine.settings.accumulation):
            first = (part * dist.world + dist.rank) * micro
            out = {}
            logits = engine(images[first : first + micro].to(engine.dtype), out).float()
            loss = F.cross_entropy(logits, labels[first : first + micro]) + auxiliary_loss(out)
            engine.backward(loss)
            engine.step(number)
        made.append(engine.deepspeed.was_step_applied())
    return made


def everything(engine: Engine) -> dict[Any, torch.Tensor]:
    """Masters, moments and working weights of this rank."""
    pieces = {(p.kind, p.name, p.start): p.values.clone() for p in zero_state.pieces(engine.deepspeed)}
    assert len({kind for kind, *_ in pieces}) == 3, "masters and two moments"
    return pieces | {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def assert_same(state: dict, expected: dict, what: str) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), f"{what}: {name}"


def a_refused_step_changes_nothing() -> None:
    """One NaN pixel on the last rank: nothing changes on any rank, and the next step is as if it had never come."""
    dist = start()
    first, bad, last = [(number, *batch) for number, batch in enumerate(batches()[:3])]
    bad[1][-1, 0, 3, 3] = math.nan
    offload, bf16 = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, {"bf16": {"enabled": True}}
    for ep, zero, accumulation, more in ((1, 1, 1, {}), (2, 2, 2, bf16), (2, 1, 2, {}), (1, 2, 2, offload)):
        case = {"ep": ep, "zero": zero, "accumulation": accumulation}
        with engine_for(dist, MODEL, ADAM, **case, **more) as engine:
            assert run_steps(engine, dist, [first, last]) == [True, True]
            expected = everything(engine)
        with engine_for(dist, MODEL, ADAM, **case, **more) as engine:
            run_steps(engine, dist, [first])
            before = everything(engine)
            assert run_steps(engine, dist, [bad]) == [False]
            assert_same(everything(engine), before, f"{case} {more}, refused step")
            assert zero_state.optimizer_steps(engine.deepspeed) == 1
            assert run_steps(engine, dist, [last]) == [True]
            assert_same(everything(engine), expected, f"{case} {more}, step after it")


def enlarge_experts(module: torch.nn.Module) -> None:
    """Make the experts a good part of the gradient: theirs is 16 times what it was."""
    for name, parameter in module.named_parameters():
        if "experts." in name:
            parameter.register_hook(lambda gradient: 16 * gradient)


def plain_norm(dtype: torch.dtype, micro: int) -> tuple[float, float]:
    """Norm of the first global batch's gradient on plain torch, and the experts' share of its square."""
    model, sums = build(MODEL).to(dtype).train(), {}
    enlarge_experts(model)
    images, labels = batches()[0]
    for first in range(0, BATCH, micro):
        model.zero_grad()
        out = {}
        logits = model(images[first : first + micro].to(dtype), out).float()
        (F.cross_entropy(logits, labels[first : first + micro]) + auxiliary_loss(out)).backward()
        for name, parameter in model.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.grad.double() * micro / BATCH
    squares = {name: float(gradient.square().sum()) for name, gradient in sums.items()}
    experts = sum(square for name, square in squares.items() if "experts." in name)
    return math.sqrt(sum(squares.values())), experts / sum(squares.values())


def the_norm_counts_every_expert_once() -> None:
    """grad_norm at ep 1 and 2, with accumulation, clipping on and off, in fp32 and bf16, against plain torch."""
    dist = start()
    first = [(0, *batches()[0])]
    for dtype, more, off in ((torch.float32, {}, 1e-6), (torch.bfloat16, {"bf16": {"enabled": True}}, 5e-3)):
        for accumulation in (1, 2):
            norm, share = plain_norm(dtype, BATCH // dist.world // accumulation)
            assert share > 0.3  # left out or counted twice, experts would change the norm by 14% or more
            for ep, zero, clip in ((1, 1, 0.0), (1, 2, CLIP), (2, 1, CLIP), (2, 2, 0.0)):
                schedule = replace(SGD, clip=clip)
                with engine_for(dist, MODEL, schedule, ep=ep, zero=zero, accumulation=accumulation, **more) as engine:
                    enlarge_experts(engine.module)
                    run_steps(engine, dist, first)
                    seen = engine.grad_norm()
                case = f"{dtype}, ep {ep}, ZeRO-{zero}, accumulation {accumulation}, clip {clip}"
                assert abs(seen / norm - 1) < off, f"{case}: {seen} instead of {norm}"


@pytest.mark.parametrize("check", [a_refused_step_changes_nothing, the_norm_counts_every_expert_once])
def test_on_two_ranks(warm, check):
    finished = warm.call(f"tests.integration.test_health_engine:{check.__name__}", ranks=2)
    assert finished.code == 0, finished.output
