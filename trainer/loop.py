"""The one train loop and the one evaluation; they know no phase, only an objective, an engine and data."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.moe import routing_metrics
from models.preprocessing import Preprocessing
from trainer.checkpoint import Saver
from trainer.data.loader import Batch, eval_batches, make_mixup, steps_per_epoch, train_batches
from trainer.data.sources import ImageSource
from trainer.dist import Dist, seed_draws
from trainer.ds_config import Settings
from trainer.engine import Engine
from trainer.interrupt import HEARTBEAT, Interrupted, Interruption
from trainer.schema import AugmentConfig, RunConfig
from trainer.tracking import MetricsLog, Progress


@dataclass(frozen=True)
class Data:
    """Images of a run: two sources, what the teacher wants done to them, and the training transforms."""

    train: ImageSource
    val: ImageSource
    preprocessing: Preprocessing
    augment: AugmentConfig
    workers: int
    num_classes: int
    skip_unreadable: bool


@dataclass(frozen=True)
class Task:
    """What the loop needs to know of a phase."""

    phase: str  # as in metrics rows
    description: str  # as in progress lines, e.g. "distill 2/4"
    epochs: int
    seed: int
    run: RunConfig


@dataclass(frozen=True)
class Outcome:
    """What a phase's training came to; seconds and images count every run of it, resumed ones included."""

    evaluation: dict[str, float]
    seconds: float
    steps: int
    images_seen: int


class NonFiniteLoss(RuntimeError):
    """The loss stopped being a number; the message names the step."""


def fit(engine: Engine, objective: Any, data: Data, task: Task, folder: Path, dist: Dist) -> Outcome:
    """Train to the last epoch, resuming from the newest checkpoint of `folder`, and return the last evaluation.

    Writes FOLDER/metrics.jsonl and FOLDER/checkpoints. A run killed anywhere and started again ends with the same
    weights, because the images of a step depend only on (seed, epoch, step) and every rank's generators are saved.

    Raises:
        NonFiniteLoss: on all ranks; no checkpoint holds the damage.
        Interrupted: on all ranks, after a warning signal to any of them and a checkpoint of this very step.
    """
    per_epoch = epoch_length(data, engine.settings)
    saver = Saver(engine, folder, task.run, dist)
    resumed = saver.resume()
    done, state = (resumed.step, resumed.state) if resumed else (0, {"seconds": 0.0, "evaluation": {}})
    started = time.perf_counter() - state["seconds"]
    evaluation = state["evaluation"]
    monitor = _Monitor(folder, task, per_epoch, done, dist)
    step = _TrainStep(engine, objective, data, task, dist)
    if resumed:
        step.restore(resumed.own)
    interruption = Interruption(dist, done)
    for micro_batches in step.batches(done, per_epoch):
        step.run(done, micro_batches)
        done += 1
        HEARTBEAT.beat()
        epoch, inside = divmod(done, per_epoch)
        ended, last = inside == 0, done == task.epochs * per_epoch
        if done % task.run.log_every == 0 or ended:
            monitor.train_row(done, step.take_metrics(), engine.lr)
        if last or (ended and epoch % task.run.eval_every == 0):
            evaluation = evaluate(objective, data, engine.dtype, eval_batch(task.run, engine.settings), dist)
            monitor.eval_row(done, evaluation)
        stopping = interruption.agreed(done) and not last
        if last or stopping or done % task.run.save_every == 0 or (ended and epoch % task.run.save_epochs == 0):
            step.stop_if_not_finite()
            state = {"evaluation": evaluation, "seconds": time.perf_counter() - started}
            saver.save(done, state=state, own=step.running(), score=evaluation.get("accuracy"), wait=last or stopping)
        if stopping:
            monitor.close()
            raise Interrupted(f"{task.description}: interrupted, saved after step {done}; the same command continues")
    saver.close()
    monitor.close()
    return Outcome(evaluation, state["seconds"], done, done * engine.settings.global_batch)


def evaluate(objective: Any, data: Data, dtype: torch.dtype, batch: int, dist: Dist) -> dict[str, float]:
    """Accuracy (0..1) and mean cross-entropy of objective.predict over every validation image, each counted once.

    Collective: the ranks share the images and every rank gets the same numbers.
    """
    modules = [objective.module, *objective.frozen]
    training = [m.training for m in modules]
    for m in modules:
        m.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=dist.device)
    with torch.no_grad():
        for b in eval_batches(
            data.val, data.preprocessing, batch=batch, world=dist.world, rank=dist.rank, workers=data.workers
        ):
            HEARTBEAT.beat()
            logits = objective.predict(b.images.to(dist.device, dtype)).float()
            labels, mask = b.labels.to(dist.device), b.mask.to(dist.device)
            loss = F.cross_entropy(logits, labels, reduction="none")[mask].sum()
            correct = (logits.argmax(-1) == labels)[mask].sum()
            totals += torch.stack([correct, loss, mask.sum()]).to(totals.dtype)
    for m, mode in zip(modules, training):
        m.train(mode)
    correct, loss, images = dist.sum(totals).tolist()
    return {"accuracy": correct / images, "loss": loss / images, "images": int(images)}


def epoch_length(data: Data, settings: Settings) -> int:
    """Optimiser steps per epoch. Raises ValueError when the data is smaller than one global batch."""
    s = settings
    world = s.global_batch // (s.micro_batch * s.accumulation)
    return steps_per_epoch(len(data.train), micro_batch=s.micro_batch, accumulation=s.accumulation, world=world)


def eval_batch(run: RunConfig, settings: Settings) -> int:
    """Images per rank and forward in evaluation."""
    return run.eval_batch or settings.micro_batch


@dataclass
class Predictor:
    """The part of an objective that evaluation needs, for models that are not being trained."""

    module: nn.Module
    predict: Callable[[Tensor], Tensor]
    frozen: tuple[nn.Module, ...] = ()


class _TrainStep:
    """One optimiser step over its micro-batches, with running sums that stay on the device."""

    def __init__(self, engine: Engine, objective: Any, data: Data, task: Task, dist: Dist):
        self.engine, self.objective, self.data, self.task, self.dist = engine, objective, data, task, dist
        self.mixup = make_mixup(data.augment, data.num_classes)
        self.first_bad = torch.full((), torch.iinfo(torch.int64).max, device=dist.device)
        for m in objective.frozen:
            m.to(dist.device, engine.dtype).eval().requires_grad_(False)
        objective.module.train()
        self.skipped: set[int] = set()
        self._reset()

    def batches(self, done: int, per_epoch: int) -> Iterator[list[Batch]]:
        """The micro-batches of every optimiser step that is left after `done`."""
        s = self.engine.settings
        epoch, start = divmod(done, per_epoch)
        if epoch == self.task.epochs:
            return
        micro = train_batches(
            self.data.train, self.data.preprocessing, self.data.augment, seed=self.task.seed, epoch=epoch,
            start_step=start, epochs=self.task.epochs - epoch, micro_batch=s.micro_batch, accumulation=s.accumulation,
            world=self.dist.world, rank=self.dist.rank, workers=self.data.workers,
        )  # fmt: skip
        for first in micro:
            yield [first, *itertools.islice(micro, s.accumulation - 1)]

    def run(self, done: int, micro_batches: list[Batch]) -> None:
        """Forward and backward of each micro-batch; the weights change after the last. `done` = steps before."""
        if self.count == 0:
            self.since = time.perf_counter()  # evaluations and saves between two intervals do not count as training
        for part, batch in enumerate(micro_batches):
            images, target = batch.images, batch.labels
            place = part * self.dist.world + self.dist.rank
            if self.mixup is not None:
                number = done * len(micro_batches) * self.dist.world + place
                images, target = self.mixup(images, target, self.task.seed * 1_000_003 + number)
            seed_draws(self.task.seed, done, place)
            images = images.to(self.dist.device, self.engine.dtype, non_blocking=True)
            loss, parts = self.objective(self.engine, images, target.to(self.dist.device, non_blocking=True))
            self.engine.backward(loss)
            self.engine.step(done)
            self._add(done + 1, loss.detach(), parts, len(images))
            self.skipped.update(batch.skipped)

    def take_metrics(self) -> dict[str, Any]:
        """Means since the last call over all ranks, speed, gradient norm and routing; resets the sums."""
        self.stop_if_not_finite()
        seconds = time.perf_counter() - self.since
        names = list(self.sums)
        means = self.dist.sum(torch.stack([self.sums[n] for n in names])) / (self.count * self.dist.world)
        metrics = dict(zip(names, means.tolist()))
        metrics["images_per_s"] = self.images * self.dist.world / seconds
        metrics["grad_norm"] = self.engine.grad_norm()
        if self.data.skip_unreadable:
            metrics["skipped_images"] = len(set().union(*self.dist.gather(self.skipped)))
        self._reset()
        return metrics | _routing(self.engine.module, self.dist)

    def stop_if_not_finite(self) -> None:
        """Raise on all ranks when any rank has seen a loss that is not a number, naming the step."""
        first = self.dist.min(int(self.first_bad))
        if first < torch.iinfo(torch.int64).max:
            raise NonFiniteLoss(
                f"the loss of {self.task.description} is not finite at step {first}: stopped on all ranks, the last "
                "checkpoint is from before. Lower the phase's lr, set its clip, or look at the data"
            )

    def _add(self, number: int, loss: Tensor, parts: dict[str, Tensor], images: int) -> None:
        bad = torch.where(torch.isfinite(loss), self.first_bad, torch.full_like(self.first_bad, number))
        self.first_bad = torch.minimum(self.first_bad, bad)
        for name, value in {"loss": loss, **{f"loss/{k}": v for k, v in parts.items()}}.items():
            self.sums[name] = self.sums.get(name, 0) + value.float()
        self.count += 1
        self.images += images

    def running(self) -> dict[str, Any]:
        """What a checkpoint between two metrics rows must hold, so that the next row is the same after a resume."""
        sums = {name: float(value) for name, value in self.sums.items()}
        return {"sums": sums, "count": self.count, "skipped": sorted(self.skipped)}

    def restore(self, saved: list[dict[str, Any]]) -> None:
        """Put back what running() returned on every rank then; the speed counts from here.

        On another number of ranks each takes the mean over those of then, which leaves the mean of the row the same.
        """
        same = len(saved) == self.dist.world
        mine = [saved[self.dist.rank]] if same else saved
        for name in mine[0]["sums"]:
            mean = sum(own["sums"][name] for own in mine) / len(mine)
            self.sums[name] = torch.tensor(mean, device=self.dist.device)
        self.skipped = set().union(*(own["skipped"] for own in mine))
        self.count, self.since = mine[0]["count"], time.perf_counter()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count, self.images, self.since = 0, 0, 0.0


class _Monitor:
    """Rank 0's metrics.jsonl and progress; on other ranks it does nothing."""

    def __init__(self, folder: Path, task: Task, per_epoch: int, done: int, dist: Dist):
        self.task, self.per_epoch, self.main = task, per_epoch, dist.main
        if self.main:
            self.log = MetricsLog(folder / "metrics.jsonl", resume_step=done)
            self.progress = Progress(task.epochs * per_epoch, per_epoch, task.description, start_step=done)
            if done:
                self.progress.note(f"resumed after step {done}")

    def train_row(self, done: int, metrics: dict[str, Any], lr: float) -> None:
        if self.main:
            row = {"kind": "train", "phase": self.task.phase, "epoch": done // self.per_epoch, "step": done, "lr": lr}
            row |= metrics | {"time": time.time()}
            self.log.write(row)
            self.progress.update(done, row)

    def eval_row(self, done: int, evaluation: dict[str, float]) -> None:
        if self.main:
            row = {"kind": "eval", "phase": self.task.phase, "epoch": done // self.per_epoch, "step": done}
            self.log.write(row | evaluation | {"time": time.time()})
            if done == self.task.epochs * self.per_epoch:
                self.progress.note(f"accuracy {100 * evaluation['accuracy']:.1f}% on {evaluation['images']} images")

    def close(self) -> None:
        if self.main:
            self.progress.close()
            self.log.close()


def _routing(module: nn.Module, dist: Dist) -> dict[str, Any]:
    """Routing of the last micro-batch, mean over ranks: load (share per expert), kept fraction, sum of top-k gates."""
    rows = {}
    for layer, values in routing_metrics(module).items():
        load = dist.sum(values["load"].detach().float().clone()) / dist.world
        rows[f"load/{layer}"] = [round(v, 5) for v in load.tolist()]
        for name in ("kept", "gate_sum"):
            value = torch.as_tensor(values[name], dtype=torch.float32, device=dist.device).detach().clone()
            rows[f"{name}/{layer}"] = float(dist.sum(value) / dist.world)
    return rows
