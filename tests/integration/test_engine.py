"""The engine (DeepSpeed, ZeRO, experts over ranks) against a plain torch loop written here: the same weights.

The functions without test_ in their name run on the ranks, in forks of one warm python.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from models.moe.layer import MoEConfig
from models.moe.out import auxiliary_loss
from models.moe.parallel import full_state_dict
from models.vmoe.model import VMoE, VMoEConfig
from trainer.config.ds_config import resolve
from trainer.config.phases import ScheduleConfig
from trainer.distributed.engine import Engine, build_engine
from trainer.distributed.ranks import Dist, start

STEPS, BATCH, CLIP = 5, 8, 0.1
MOE = MoEConfig(num_experts=4, k=2, images_per_group=2, capacity_factor=0.75, capacity_multiple=1, batch_priority=True)
MODEL = VMoEConfig(image_size=16, patch_size=8, width=16, depth=3, heads=2, mlp_dim=24, num_classes=5,
                   moe_blocks="1,2", moe=MOE, seed=4)  # fmt: skip
SGD = ScheduleConfig(epochs=1, lr=8.0, min_lr=0.01, warmup_epochs=0.4, warmup_lr=0.02, optimizer="sgd",
                     weight_decay=0.1, momentum=0.9, global_batch=BATCH, clip=CLIP)  # fmt: skip
ADAM = replace(SGD, optimizer="adamw", lr=2.0, eps=1e-3)  # eps: the key bias has no gradient but rounding errors


def build(config: VMoEConfig = MODEL) -> VMoE:
    model = VMoE(config)
    torch.nn.init.normal_(model.head.weight, std=0.3, generator=torch.Generator().manual_seed(0))  # it starts at zero
    return model


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels of every optimiser step, all ranks together."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(BATCH, 3, 16, 16, generator=generator), torch.randint(5, (BATCH,), generator=generator))
            for _ in range(STEPS)]  # fmt: skip


def learning_rate(step: int, schedule: ScheduleConfig) -> float:
    """Linear warm-up over the first 2 of 5 steps, then the cosine, of lr x 8 / 512."""
    top = schedule.lr * BATCH / 512
    if step < 2:
        return schedule.warmup_lr + step * (top - schedule.warmup_lr) / 2
    return schedule.min_lr + (top - schedule.min_lr) * (1 + math.cos(math.pi * step / STEPS)) / 2


def decays(name: str) -> bool:
    """What gets weight decay, written out for this model."""
    return name.endswith(".weight") and "norm" not in name


def rate_of(name: str, layer_decay: float) -> float:
    """Learning rate of a parameter of this model of three blocks, relative to the head's."""
    embeddings = ("cls_token", "reg_token", "pos_embed", "patch_embed")
    blocks_after = 3 if name.startswith(embeddings) else 2 - int(name.split(".")[1]) if name.startswith("blocks") else 0
    return layer_decay**blocks_after


def train_plainly(
    config: VMoEConfig, schedule: ScheduleConfig, layer_decay: float = 1.0
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and gradient norms of a loop that knows nothing of DeepSpeed."""
    model = build(config).train()
    named = list(model.named_parameters())
    groups = [{"params": [p], "weight_decay": schedule.weight_decay if decays(n) else 0.0,
               "rate": rate_of(n, layer_decay)} for n, p in named]  # fmt: skip
    optimizer = (
        torch.optim.AdamW(groups, eps=1e-3) if schedule.optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.9)
    )
    norms = []
    for step, (images, labels) in enumerate(batches()):
        optimizer.zero_grad()
        out = {}
        (F.cross_entropy(model(images, out), labels) + auxiliary_loss(out)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip or math.inf)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule) * group["rate"]
        optimizer.step()
    return {name: p.detach().clone() for name, p in named}, norms


@contextmanager
def engine_for(dist: Dist, config: VMoEConfig, schedule: ScheduleConfig, *, ep: int, zero: int = 1,
               accumulation: int = 1, options: dict[str, float] | None = None,
               **values: Any) -> Iterator[Engine]:  # fmt: skip
    """`options` are those of build_engine, `values` more of the DeepSpeed JSON."""
    ours = {"ep_size": ep, "activation_checkpointing": values.pop("activation_checkpointing", False)}
    json = {"train_batch_size": "auto", "gradient_accumulation_steps": accumulation, "gradient_clipping": "auto",
            "zero_optimization": {"stage": zero} | values.pop("zero_optimization", {}), "trainer": ours}  # fmt: skip
    experts = 0 if config.moe_blocks == "none" else config.moe.num_experts
    settings = resolve(json | values, schedule, world=dist.world, local_world=dist.world, num_experts=experts,
                       phase="train")  # fmt: skip
    engine = build_engine(build(config), schedule, settings, steps_per_epoch=STEPS, dist=dist, **options or {})
    yield engine
    engine.close()


def train(engine: Engine, dist: Dist) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same five steps through the engine; micro-step a of rank r takes slice a x world + r, as the sampler does."""
    micro, accumulation, norms = engine.settings.micro_batch, engine.settings.accumulation, []
    engine.module.train()
    for step, (images, labels) in enumerate(batches()):
        for part in range(accumulation):
            first = (part * dist.world + dist.rank) * micro
            out = {}
            logits = engine(images[first : first + micro].to(engine.dtype), out).float()
            loss = F.cross_entropy(logits, labels[first : first + micro]) + auxiliary_loss(out)
            engine.backward(loss)
            engine.step(step)
        norms.append(engine.grad_norm())
    return engine.fp32_state(), norms


def assert_same_weights(state: dict, expected: dict, what: str, atol: float = 1e-6) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(state[name], value, rtol=0, atol=atol, msg=lambda m, name=name: f"{what}: {name}: {m}")


def equals_plain() -> None:
    """ZeRO 1 and 2, every ep size, with and without accumulation, clipping on and off, dense, recomputed, offloaded."""
    dist = start()
    expected, norms = train_plainly(MODEL, SGD)
    assert min(norms) > 2 * CLIP  # clipping bites in every step
    sizes = [ep for ep in (1, 2) if dist.world % ep == 0]
    cases = [{"ep": ep, "zero": zero, "accumulation": accumulation}
             for ep in sizes for zero in (1, 2) for accumulation in (1, 2)]  # fmt: skip
    largest = {"ep": sizes[-1]}
    cases += [largest | {"activation_checkpointing": True}]
    cases += [
        largest | {"zero": zero, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}} for zero in (1, 2)
    ]
    for case in cases:
        with engine_for(dist, MODEL, SGD, **case) as engine:
            assert engine.settings.ep_size == case["ep"]
            state, seen = train(engine, dist)
        assert_same_weights(state, expected, f"{case}")
        assert_close(seen, norms, rtol=1e-5, atol=0, msg=lambda m, case=case: f"{case}: gradient norms: {m}")

    dense, unclipped = replace(MODEL, moe_blocks="none"), replace(SGD, clip=0.0)
    for config, schedule in ((dense, SGD), (MODEL, unclipped), (MODEL, ADAM)):
        wanted, _ = train_plainly(config, schedule)
        with engine_for(dist, config, schedule, ep=1 if config is dense else sizes[-1]) as engine:
            state, _ = train(engine, dist)
        assert_same_weights(state, wanted, f"{config.moe_blocks}, {schedule.optimizer}, clip {schedule.clip}")
    assert (train_plainly(MODEL, unclipped)[0]["head.weight"] - expected["head.weight"]).abs().max() > 1e-3


def blocks_have_their_own_rates() -> None:
    """layer_decay at every ep size, with both optimisers, under warm-up and cosine; the rate reported is the head's."""
    dist = start()
    for schedule, ep in ((SGD, 1), (SGD, 2), (ADAM, 2)):
        expected, _ = train_plainly(MODEL, schedule, layer_decay=0.5)
        with engine_for(dist, MODEL, schedule, ep=ep, options={"layer_decay": 0.5}) as engine:
            state, _ = train(engine, dist)
            assert_close(engine.lr, learning_rate(STEPS - 1, schedule), rtol=1e-6, atol=0)
        assert_same_weights(state, expected, f"{schedule.optimizer}, ep {ep}")


def starts_from_the_same_model() -> None:
    """Every ep size begins with the weights of the plain model, exactly."""
    dist = start()
    for ep in (1, 2):
        with engine_for(dist, MODEL, SGD, ep=ep) as engine:
            held = [p for name, p in engine.module.named_parameters() if "deepspeed_experts" in name]
            assert len(held) == 2 * 4 * 4 // ep  # layers x experts x tensors
            assert_same_weights(engine.fp32_state(), build().state_dict(), f"ep {ep}", atol=0)


def bf16_keeps_masters() -> None:
    """The state of a bf16 run is the fp32 masters, for dense and expert weights of every rank alike."""
    dist = start()
    expected, _ = train_plainly(MODEL, SGD)
    before = build().state_dict()
    for ep, zero in ((1, 1), (2, 2)):
        with engine_for(dist, MODEL, SGD, ep=min(ep, dist.world), zero=zero, bf16={"enabled": True}) as engine:
            assert engine.dtype == torch.bfloat16
            state, _ = train(engine, dist)
            working = dict(engine.module.named_parameters())
            assert all(p.dtype == torch.bfloat16 for p in working.values())
            rounded = full_state_dict(engine.module)
        for name, master in state.items():
            assert master.dtype == torch.float32
            assert torch.equal(master.to(torch.bfloat16), rounded[name]), f"{name} is not what the model works with"
            assert not torch.equal(master, rounded[name].float()), f"{name} is the rounded working copy"
        # DeepSpeed's masters start from the rounded weights, so it is the way gone that compares
        gone = torch.cat([(state[n] - before[n].to(torch.bfloat16).float()).flatten() for n in state])
        wanted = torch.cat([(expected[n] - before[n]).flatten() for n in state])
        off = float((gone - wanted).norm() / wanted.norm())
        assert off < 0.1, f"ep {ep}, ZeRO-{zero}: {off:.2f} of its way off the fp32 run"


def decays_matrices_only() -> None:
    """With a loss of zero AdamW leaves the decay alone: what shrinks is what was in the decay group."""
    dist = start()
    schedule = replace(ADAM, warmup_epochs=0, weight_decay=0.5)
    config = replace(MODEL, reg_tokens=1)
    before = {name: p.detach().clone() for name, p in build(config).named_parameters()}
    with engine_for(dist, config, schedule, ep=dist.world) as engine:
        engine.module.train()
        engine.backward((engine(torch.zeros(BATCH // dist.world, 3, 16, 16)) * 0).sum())
        engine.step(0)
        after = engine.fp32_state()
    assert {"cls_token", "reg_token", "pos_embed"} <= before.keys()
    for name, value in before.items():
        factor = 1 - 0.5 * schedule.lr * BATCH / 512  # 1 - weight decay x learning rate
        wanted = value * factor if decays(name) else value
        assert_close(after[name], wanted, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("check", "ranks"),
    [("equals_plain", 1), ("equals_plain", 2), ("bf16_keeps_masters", 2), ("decays_matrices_only", 2),
     ("starts_from_the_same_model", 2), ("blocks_have_their_own_rates", 2)],
)  # fmt: skip
def test_engine(warm, check, ranks):
    finished = warm.call(f"tests.integration.test_engine:{check}", ranks=ranks)
    assert finished.code == 0, finished.output
