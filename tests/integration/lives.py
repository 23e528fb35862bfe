"""One life of a phase on warm ranks, with faults done to them for real.

    life = Life(warm, out, run={"on_nonfinite": "skip"}, faults={"nan": [8]})

`fit` runs on the ranks; Life starts it and reads what it left.
"""

import errno
import functools
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.scheduler import CosineLRScheduler
from torch import Tensor

from models.preprocessing import Preprocessing
from models.vmoe.model import VMoE
from tests.integration.test_engine import ADAM, MODEL, engine_for
from trainer.config.data import AugmentConfig, DataConfig
from trainer.config.runtime import RunConfig
from trainer.data.loader import Batch, Data
from trainer.data.sources import DigitsSource
from trainer.distributed import interrupt
from trainer.distributed.ranks import Dist, start
from trainer.loop.fit import fit as fit_phase
from trainer.loop.step import Task, TrainStep
from trainer.objectives import Classify
from trainer.tracking.health import NonFiniteLoss
from trainer.tracking.metrics import read_metrics

TEN_CLASSES = replace(MODEL, num_classes=10, moe=replace(MODEL.moe, router_bias=True))
SCHEDULE = replace(ADAM, epochs=2, lr=0.5)  # 24 steps: two epochs of 96 images in batches of 8
TIMING = ("time", "images_per_s", "tokens_per_s", "flops_per_s", "mfu", "memory")


def prepare(dist: Dist, faults: dict[str, Any]) -> None:
    """What will be done to this rank; numbers are those of optimiser steps, 1 = the first, before which it is done."""
    pids, now = dist.gather(os.getpid()), 0
    last = dist.rank == dist.world - 1

    def spoiled(original: Callable) -> Callable:
        def batches(step: TrainStep, done: int, per_epoch: int) -> Iterator[list[Batch]]:
            nonlocal now
            for number, micro_batches in enumerate(original(step, done, per_epoch), start=done + 1):
                now = number
                if number in faults.get("nan", ()) and last:
                    micro_batches[-1].images[-1, 0, 3, 3] = math.nan
                if number == faults.get("kill"):
                    time.sleep(0.3)  # the other rank ends the step before
                    os.kill(os.getpid(), signal.SIGKILL)
                if number == faults.get("kill worker"):
                    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
                yield micro_batches

        return batches

    def distorted(original: Callable) -> Callable:
        def objective(*arguments: Any) -> Any:
            loss, parts = original(*arguments)
            if now == faults.get("inf") and last:
                loss = loss + math.inf  # its gradient stays finite
            return loss * (1000 if now == faults.get("steep") else 1), parts

        return objective

    def misled(original: Callable) -> Callable:
        def step_update(cosine: CosineLRScheduler, number: int) -> None:
            original(cosine, number)
            if number + 1 == faults.get("huge rate"):
                for group in cosine.optimizer.param_groups:
                    group["lr"] *= faults.get("factor", 1000)

        return step_update

    def without_expert(original: Callable) -> Callable:
        def build(*arguments: Any) -> VMoE:
            model = original(*arguments)
            model.blocks[1].mlp.router.bias.data[faults["idle expert"]] = -1e4
            return model

        return build

    replaced("trainer.loop.step:TrainStep.batches", spoiled)
    replaced("trainer.objectives:Classify.__call__", distorted)
    replaced("timm.scheduler:CosineLRScheduler.step_update", misled)
    if "idle expert" in faults:
        replaced("tests.integration.test_engine:build", without_expert)
    if "stop in" in faults and last:
        replaced(faults["stop in"], at_call(2, lambda: stop_myself(pids[0])))
    if "full disk" in faults:
        interrupt.ASK_EVERY = 0.0  # steps are so quick here that the run would be over within a second
    if "full disk" in faults and last:
        replaced("trainer.checkpoint.writer:write_tensors", at_call(faults["full disk"], full_disk))
    if "stuck image" in faults:
        replaced("trainer.data.base:ImageSource.image", at_call(faults["stuck image"], lambda: time.sleep(20)))


def fit(out: str, options: dict[str, Any]) -> None:
    """One life of a phase in folder `out`; its end, for the test to read, in out/rank_N.json.

    Args:
        options: run = knobs of RunConfig, faults (see prepare), schedule = changes to SCHEDULE, workers (None =
            measured), accumulation, engine = options of build_engine.
    """
    dist = start()
    prepare(dist, options.get("faults", {}))
    schedule = replace(SCHEDULE, **options.get("schedule", {}))
    digits = DataConfig(limit=96)
    workers = options.get("workers", 0)
    data = Data(
        DigitsSource(digits, "train"),
        DigitsSource(digits, "val"),
        Preprocessing(16, (0.5,) * 3, (0.5,) * 3),
        AugmentConfig(),
        workers or 0,
        10,
        False,
        workers is None,
    )
    often = {"log_every": 4, "save_every": 3, "save_epochs": 9, "keep": 9, "trackers": ()}
    config = RunConfig(**often | options.get("run", {}))
    end: dict[str, Any] = {}
    accumulation = options.get("accumulation", 2 // dist.world)
    with engine_for(
        dist, TEN_CLASSES, schedule, ep=dist.world, accumulation=accumulation, options=options.get("engine")
    ) as engine:
        objective = Classify(engine.module, tokens=5)
        interrupt.HEARTBEAT.watch(config.hang_seconds)
        try:
            outcome = fit_phase(engine, objective, data, Task("train", "train", 2, 0, config), Path(out), dist)
            end = {"health": outcome.health, "evaluation": outcome.evaluation}
        except (NonFiniteLoss, interrupt.Interrupted, OSError) as error:
            end = {"error": str(error)}
        end["weights"] = digest_of(engine.fp32_state())
        with engine.published():
            end["published"] = digest_of(engine.fp32_state())
    (Path(out) / f"rank_{dist.rank}.json").write_text(json.dumps(end))


def digest_of(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for _, value in sorted(state.items()):
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def replaced(place: str, make: Callable[[Callable], Callable]) -> None:
    """Put make(original) where module:function or module:Class.function is, in this process."""
    module, path = place.split(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    setattr(owner, name, make(getattr(owner, name)))


def at_call(number: int, harm: Callable[[], None]) -> Callable[[Callable], Callable]:
    """What does harm before the n-th call of a function."""
    calls = itertools.count(1)

    def make(original: Callable) -> Callable:
        def harmed(*arguments: Any, **options: Any) -> Any:
            if next(calls) == number:
                harm()
            return original(*arguments, **options)

        return harmed

    return make


def stop_myself(first: int) -> None:
    """SIGSTOP; a child of ours ends this rank for good once rank 0 (a pid) is gone, so that the test need not wait."""
    wait = f"while kill -0 {first}; do sleep 0.1; done; kill -9 {os.getpid()}"
    subprocess.Popen(["sh", "-c", wait], stderr=subprocess.DEVNULL)
    os.kill(os.getpid(), signal.SIGSTOP)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class Life:
    """What one life of fit() left in its folder."""

    def __init__(self, warm, out: Path, *, ranks: int = 2, code: int = 0, **arguments: Any):
        out.mkdir(exist_ok=True)
        for old in out.glob("rank_*.json"):
            old.unlink()
        finished = warm.call(f"{__name__}:fit", str(out), arguments, ranks=ranks)
        assert finished.code == code, finished.output
        self.out, self.output = out, finished.output
        self.ends = [json.loads(path.read_text()) for path in sorted(out.glob("rank_*.json"))]

    @property
    def weights(self) -> str:
        """Digest of the weights, the same on every rank."""
        (digest,) = {end["weights"] for end in self.ends}
        return digest

    @property
    def published(self) -> str:
        """The same of what a phase would publish."""
        (digest,) = {end["published"] for end in self.ends}
        return digest

    @property
    def error(self) -> str:
        """What fit() raised, the same on every rank."""
        (text,) = {end["error"] for end in self.ends}
        return text

    @property
    def health(self) -> dict[str, Any]:
        assert all(end["health"] == self.ends[0]["health"] for end in self.ends)
        return self.ends[0]["health"]

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Metrics rows without what depends on the clock."""
        rows = read_metrics(self.out / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k not in TIMING} for row in rows if row["kind"] == kind]
