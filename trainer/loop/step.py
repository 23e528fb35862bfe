"""One optimiser step over its micro-batches, and the numbers of a metrics row, which stay on the device until then."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.moe.out import Out, routing_metrics
from trainer.config.gpus import peak_flops
from trainer.config.runtime import RunConfig
from trainer.data.loader import Batch, Data, make_mixup
from trainer.data.workers import FIRST_STEPS, MEASURED_STEPS, Limit, Times, spare_processors, workers_for
from trainer.distributed.engine import Engine
from trainer.distributed.ranks import Dist, seed_draws
from trainer.evaluation.accuracy import evaluate
from trainer.loop.lessons import Lessons
from trainer.loop.profile import part, waiting
from trainer.tracking.metrics import peak_memory


@dataclass(frozen=True)
class Task:
    """What the loop needs to know of a phase."""

    phase: str  # as in metrics rows
    description: str  # as in progress lines, e.g. "distill 2/4"
    epochs: int
    seed: int  # of this phase's draws (trainer.data.sampler.phase_seed)
    run: RunConfig
    evaluate_start: bool = False  # also before the first step
    kept_epochs: int = 0  # whose lessons are kept, and whose pictures are shown again (lessons.py); 0 = none
    evaluate: Callable[..., dict[str, float]] = evaluate  # takes what accuracy.evaluate takes


class TrainStep:
    """Runs the steps of a phase and sums up what the next metrics row says."""

    def __init__(self, engine: Engine, objective: Any, data: Data, task: Task, dist: Dist):
        self.engine = engine
        self.objective = objective
        self.data = data
        self.task = task
        self.dist = dist
        self.lessons: Lessons | None = None  # what the teacher told before; None = it is asked in every step
        self.mixup = make_mixup(data.augment, data.num_classes)
        for module in objective.frozen:
            module.to(dist.device, engine.dtype).eval().requires_grad_(False)
        objective.module.train()
        self.losses: list[dict[str, Tensor]] = []  # per micro-batch of the last step
        self.routing: list[dict[str, Tensor]] = []
        self.skipped: set[int] = set()
        self.workers = data.workers  # processes that load images now
        self.limit = Limit(spare_processors(dist.local_world))
        self.notes: list[str] = []  # lines for the log, to be taken
        self.peak = None  # FLOP/s that the device's data sheet promises
        if dist.device.type == "cuda" and engine.dtype == torch.bfloat16:
            self.peak = peak_flops(torch.cuda.get_device_name(dist.device))
        self._reset()

    def batches(self, done: int, per_epoch: int) -> Iterator[list[Batch]]:
        """The micro-batches of every optimiser step that is left after `done`."""
        if self.data.measure_workers and self.limit.spare:
            self.workers = 0
            times = Times()
            first_steps = itertools.islice(self._loaded(done, per_epoch), FIRST_STEPS + MEASURED_STEPS)
            yield from times.of(first_steps)
            done += len(times.waited)
            if len(times.waited) > FIRST_STEPS:
                self.workers = workers_for(times, self.limit.spare)
                self.notes.append(f"data.workers=null: it is {self.workers} from here on, as measured")
        loaded = self._loaded(done, per_epoch)
        yield from itertools.islice(loaded, 1)  # not waited for: the processes begin
        yield from self.limit.times.of(loaded)

    def take_notes(self) -> list[str]:
        """Lines for the log since the last call, about the loading of images."""
        notes = self.notes
        self.notes = []
        return notes

    def _loaded(self, done: int, per_epoch: int) -> Iterator[list[Batch]]:
        settings = self.engine.settings
        epoch, start = divmod(done, per_epoch)
        if epoch == self.task.epochs:
            return
        micro_batches = self.data.train_batches(
            seed=self.task.seed,
            epoch=epoch,
            start_step=start,
            epochs=self.task.epochs - epoch,
            micro_batch=settings.micro_batch,
            accumulation=settings.accumulation,
            world=self.dist.world,
            rank=self.dist.rank,
            cycle=self.task.kept_epochs,
            workers=self.workers,
            device=self.dist.device,
        )
        micro_batches = waiting(micro_batches)
        for first in micro_batches:
            yield [first, *itertools.islice(micro_batches, settings.accumulation - 1)]

    def run(self, done: int, micro_batches: list[Batch], *, total: int, row_due: bool) -> bool:
        """Forward and backward of each micro-batch; the weights change after the last.

        Args:
            done: optimiser steps before this one.
            total: optimiser steps of the phase.
            row_due: a metrics row comes next, which tells the routing of this step.

        Returns:
            Whether the weights were changed, the same on every rank. Not when the gradient of all ranks together is
            not finite: ZeRO looks at its norm first, and leaves weights, moments and counters as they are.
        """
        if not self.images:
            self.since = time.perf_counter()  # evaluations and saves between two intervals do not count as training
        self.losses = []
        self.routing = []
        shown = done if self.lessons is None else self.lessons.shown(done)  # the step whose pictures these are
        for turn, batch in enumerate(micro_batches):
            place = turn * self.dist.world + self.dist.rank
            images = batch.images
            target = batch.labels
            if self.mixup is not None:
                number = shown * len(micro_batches) * self.dist.world + place
                images, target = self.mixup(images, target, self.task.seed * 1_000_003 + number)
            seed_draws(self.task.seed, done, place)
            images = images.to(self.dist.device, self.engine.dtype, non_blocking=True)
            target = target.to(self.dist.device, non_blocking=True)
            out: Out = {}
            with part("forward"):
                if self.lessons is None:
                    loss, parts = self.objective(self.engine, images, target, done / total, out)
                else:
                    told = self.lessons.told(self.objective, images, shown, place)
                    loss, parts = self.objective.learn(self.engine, images, target, told, done / total, out)
            if row_due:
                self.routing.append(_routing(out))
            out.clear()  # what hangs on it would stay alive through the backward
            # a loss can overflow while its gradient is finite: times NaN, so that ZeRO sees it on every rank
            finite = torch.isfinite(loss.detach())
            with part("backward"):
                self.engine.backward(loss * torch.where(finite, 1.0, math.nan))
            with part("optimizer"):
                self.engine.step(done)
            self.losses.append({"loss": loss.detach(), **{f"loss/{name}": value for name, value in parts.items()}})
            self.images += len(images)
            self.skipped.update(batch.skipped)
        if not self.engine.deepspeed.was_step_applied():
            self.routing = []  # routed by what is not a number
            return False
        for name, mean in _means(self.losses).items():
            self.sums[name] = self.sums.get(name, 0) + mean
        self.steps += 1
        return True

    def cause(self) -> str:
        """What was not finite in the step that was just refused, and on which ranks (collective)."""
        broken = any(not bool(torch.isfinite(losses["loss"])) for losses in self.losses)
        ranks = [str(rank) for rank, is_broken in enumerate(self.dist.gather(broken)) if is_broken]
        if not ranks:
            return "the gradient"
        word = "ranks" if len(ranks) > 1 else "rank"
        return f"the loss of {word} {', '.join(ranks)}"

    def weights_are_finite(self) -> bool:
        """Whether every weight on every rank is (collective; waits for the device)."""
        broken = torch.stack([~torch.isfinite(p).all() for p in self.engine.module.parameters()]).any()
        return not bool(self.dist.sum(broken.float()))

    def take_metrics(self) -> dict[str, Any]:
        """Means over the steps since the last call and over all ranks, speed, gradient norm and routing; resets them.

        Speed is of all ranks together, but FLOPs (of the model, as it counts them) are per second and rank.

        The same at every number of ranks, but for the last digits: a step has the same images and groups of images.
        Empty when none of those steps was made. One all-reduce, plus the list of unreadable images where they are
        skipped.
        """
        seconds = time.perf_counter() - self.since
        steps = self.steps
        images = self.images
        means = {name: value / max(steps, 1) for name, value in self.sums.items()}
        metrics = _mean_over_ranks(means | _means(self.routing), self.dist)
        self._reset()
        self.notes += filter(None, [self.limit.remark(self.workers)])
        if not steps:
            return {}
        images_per_s = images * self.dist.world / seconds
        metrics["images_per_s"] = images_per_s
        metrics["tokens_per_s"] = images_per_s * self.objective.tokens
        metrics["flops_per_s"] = images_per_s * self.objective.flops_per_image / self.dist.world
        if self.peak is not None:
            # model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311)
            metrics["mfu"] = metrics["flops_per_s"] / self.peak
        metrics["grad_norm"] = self.engine.grad_norm()
        if self.data.skip_unreadable:
            metrics["skipped_images"] = len(set().union(*self.dist.gather(self.skipped)))
        return metrics

    def running(self) -> dict[str, Any]:
        """What a checkpoint between two metrics rows must hold, so that the next row is the same after a resume."""
        sums = {name: float(value) for name, value in self.sums.items()}
        return {"sums": sums, "steps": self.steps, "skipped": sorted(self.skipped)}

    def restore(self, saved: list[dict[str, Any]]) -> None:
        """Put back what running() returned on every rank then; the speed counts from here.

        On another number of ranks each takes the mean over those of then, which leaves the mean of the row the same.
        """
        if len(saved) == self.dist.world:
            saved = [saved[self.dist.rank]]
        for name in saved[0]["sums"]:
            mean = sum(running["sums"][name] for running in saved) / len(saved)
            self.sums[name] = torch.tensor(mean, device=self.dist.device)
        self.skipped = set().union(*(running["skipped"] for running in saved))
        self.steps = saved[0]["steps"]

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}  # of the means of every step that was made
        self.steps = 0
        self.images = 0
        self.since = 0.0


@contextmanager
def data_workers() -> Iterator[None]:
    """Say what to do when a data loading process dies under the block: torch raises wherever the block then is.

    Raises:
        OSError: instead of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(
            f"a data loading process died: {' '.join(str(error).split()).rstrip('.')}. Most often the machine was out "
            "of memory (see dmesg): lower data.workers, or give the job more memory. The same command goes on from the "
            "last checkpoint"
        ) from error


def _means(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means over the micro-batches of a step."""
    if not values:
        return {}
    means = {}
    for name in values[0]:
        stacked = torch.stack([each[name].float() for each in values])
        means[name] = stacked.mean(0)
    return means


def _mean_over_ranks(values: dict[str, Tensor], dist: Dist) -> dict[str, Any]:
    """Means of scalars and vectors, and "memory", the most of any rank; one all-reduce (collective)."""
    flat = [value.detach().double().flatten() for value in values.values()]
    peaks = torch.zeros(dist.world, dtype=torch.float64, device=dist.device)
    peaks[dist.rank] = peak_memory()  # a maximum in a sum: every rank has a place of its own
    total = dist.sum(torch.cat([*flat, peaks])).tolist()
    means: dict[str, Any] = {}
    start = 0
    for name, value in values.items():
        stop = start + value.numel()
        mean = [x / dist.world for x in total[start:stop]]
        if value.dim():
            means[name] = [round(x, 5) for x in mean]
        else:
            means[name] = mean[0]
        start = stop
    means["memory"] = int(max(total[start:]))
    return means


def _routing(out: Out) -> dict[str, Tensor]:
    """Routing of a forward: load (share per expert), kept fraction, sum of top-k gates."""
    metrics = {}
    for layer, values in routing_metrics(out).items():
        for name in ("load", "kept", "gate_sum"):
            metrics[f"{name}/{layer}"] = values[name].detach()
    return metrics
