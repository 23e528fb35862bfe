"""The one train loop; it knows no phase, only an objective, an engine and data."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from models.moe.layer import routed_layers
from trainer.checkpoint.saver import Saver
from trainer.config.ds_config import Settings
from trainer.data.loader import Data, steps_per_epoch
from trainer.distributed.engine import Engine
from trainer.distributed.interrupt import HEARTBEAT, Interrupted, Interruption
from trainer.distributed.ranks import Dist
from trainer.evaluation.accuracy import eval_batch, of_published
from trainer.evaluation.routing import Measures, RoutingWatch
from trainer.loop.lessons import Lessons
from trainer.loop.profile import StepProfiler
from trainer.loop.step import Task, TrainStep, data_workers
from trainer.tracking.health import Finding, Health, NonFiniteLoss
from trainer.tracking.measures import BESIDE, headline, measure_of, score_of
from trainer.tracking.metrics import MetricsLog, Progress


@dataclass(frozen=True)
class Outcome:
    """What a phase's training came to; seconds and images count every run of it, resumed ones included."""

    evaluation: dict[str, float]
    seconds: float
    steps: int
    images_seen: int
    start: dict[str, float] = field(default_factory=dict)  # the evaluation before the first step, where asked for
    health: dict[str, Any] = field(default_factory=dict)  # as from Health.summary
    earlier: float = 0.0  # of the seconds, those in processes before this one


def fit(engine: Engine, objective: Any, data: Data, task: Task, folder: Path, dist: Dist) -> Outcome:
    """Train to the last epoch, resuming from the newest checkpoint of `folder`, and return the last evaluation.

    Writes FOLDER/metrics.jsonl and FOLDER/checkpoints. A run killed anywhere and started again ends with the same
    weights, because the images and draws of a step depend only on (seed, epoch, step).

    Raises:
        NonFiniteLoss: on all ranks; no checkpoint holds the damage.
        Interrupted: on all ranks, after a warning signal to any of them and a checkpoint of this very step.
        OSError: on all ranks, a checkpoint cannot be written; on one rank, a data loading process died, or what the
            teacher told cannot be kept.
    """
    loop = _Loop(engine, objective, data, task, folder, dist)
    with data_workers():
        try:
            loop.train()
        except (NonFiniteLoss, Interrupted) as end:
            loop.saver.close()  # all ranks are here: a save in flight is brought to its end
            if isinstance(end, NonFiniteLoss):
                loop.monitor.warn(loop.done, Finding(str(end)))
            loop.monitor.close()
            raise
        finally:
            loop.profiler.close()
    loop.saver.close()
    loop.monitor.close()
    if loop.step.lessons is not None:
        loop.step.lessons.close()
    return Outcome(
        evaluation=of_published(loop.evaluation),
        seconds=loop.seconds,
        steps=loop.done,
        images_seen=loop.done * engine.settings.global_batch,
        start=loop.start,
        health=loop.health.summary(),
        earlier=loop.earlier,
    )


class _Loop:
    """The state of fit() between two steps."""

    def __init__(self, engine: Engine, objective: Any, data: Data, task: Task, folder: Path, dist: Dist):
        self.engine = engine
        self.objective = objective
        self.data = data
        self.task = task
        self.dist = dist
        self.per_epoch = epoch_length(data, engine.settings)
        self.saver = Saver(engine, folder, task.run, dist)
        self.step = TrainStep(engine, objective, data, task, dist)
        self.health = Health(task.run, task.description)
        self.routing = RoutingWatch(objective.module, len(data.val), dist)
        self.measures = Measures()  # of the routing, in the last evaluation
        self.done = 0  # optimiser steps
        self.seconds = 0.0  # of training, up to the last save
        self.start: dict[str, float] = {}  # the evaluation before the first step
        self.evaluation: dict[str, float] = {}  # the last one
        self.evaluated = 0  # after which step that was
        resumed = self.saver.resume()
        if resumed:
            self.done = resumed.step
            self.seconds = resumed.state["seconds"]
            self.evaluation = resumed.state["evaluation"]
            self.start = resumed.state["start"]
            self.health.restore(resumed.state["health"])
            self.step.restore(resumed.own)
            self.routing.restore([own["routing"] for own in resumed.own])
        if task.kept_epochs:
            kept_steps = task.kept_epochs * self.per_epoch
            self.step.lessons = Lessons(folder, kept_steps, self.done, engine.dtype, dist)
        self.profiler = StepProfiler(task.run.profile if dist.main else 0, folder / "profile")
        self.earlier = self.seconds
        self.started = time.perf_counter() - self.seconds
        with dist.together():  # a tracker that does not start is the end of all ranks
            self.monitor = _Monitor(folder, task, self.per_epoch, self.done, dist)
        if resumed:
            self.monitor.warn(self.done, *other_micro_batch(resumed.topology, engine.settings, objective.module))

    def train(self) -> None:
        """Every step that is left."""
        run = self.task.run
        interruption = Interruption(self.dist, self.done)
        total = self.task.epochs * self.per_epoch
        if self.task.evaluate_start and not self.done:
            self.start = self._evaluate()
            self.monitor.eval_row(0, self.start | self.measures.per_layer)
        for micro_batches in self.step.batches(self.done, self.per_epoch):
            number = self.done + 1
            epoch, steps_inside = divmod(number, self.per_epoch)
            epoch_ends = steps_inside == 0
            last = number == total
            row_due = epoch_ends or number % run.log_every == 0
            update_made = self.step.run(self.done, micro_batches, total=total, row_due=row_due)
            self.done = number
            self.profiler.step_done()
            HEARTBEAT.beat()
            reason = interruption.agreed(self.done, self.saver.failed)
            if reason == "failed":
                self.saver.close()  # raises on every rank what one of them has met
            stopping = reason == "warned" and not last
            save_due = number % run.save_every == 0 or (epoch_ends and epoch % run.save_epochs == 0)
            save = last or stopping or save_due
            self._look(update_made, row_due, saving=save)
            if last or (epoch_ends and epoch % run.eval_every == 0):
                self.evaluation = self._evaluate()
                self.evaluated = self.done
                self.monitor.eval_row(self.done, self.evaluation | self.measures.per_layer)
                findings = self.health.look_at_evaluation(self.done, self.evaluation, self.measures.layers)
                self.monitor.warn(self.done, *findings)
            if save:
                self._save(wait=last or stopping)
            if stopping:
                what = f"{self.task.description}: interrupted, saved after step {self.done}"
                raise Interrupted(f"{what}; the same command continues")

    def _look(self, update_made: bool, row_due: bool, saving: bool) -> None:
        """Write the metrics row, judge what happened, and go back to the newest checkpoint when that is the answer."""
        health = self.health
        findings = []
        if not update_made:
            findings.append(health.refused_step(self.done, self.step.cause()))
        row = self.step.take_metrics() if row_due else None
        if row:
            self.monitor.train_row(self.done, row | health.counts(), self.engine.lr)
            findings += health.look(self.done, row)
        self.monitor.note(*self.step.take_notes())
        broken = saving and not self.step.weights_are_finite()
        if broken:
            findings.append(health.broken_weights(self.done))
        if any(finding.roll_back for finding in findings):
            resumed = self.saver.resume()
            step = resumed.step if resumed else None
            findings.append(health.rolled_back(self.done, step, needed=broken))
        self.monitor.warn(self.done, *findings)

    def _evaluate(self) -> dict[str, float]:
        """Of the weights, and with train.ema of their average as well, as accuracy_ema, loss_ema and the like."""
        dtype = self.engine.dtype
        batch = eval_batch(self.task.run, self.engine.settings)
        evaluation = self.task.evaluate(
            self.objective, self.data, dtype, batch, self.dist, observe=self.routing.observe
        )
        self.measures = self.routing.take()
        evaluation |= self.measures.means
        if self.engine.average is not None:
            with self.engine.published():
                of_average = self.task.evaluate(self.objective, self.data, dtype, batch, self.dist)
            measure = measure_of(evaluation).key
            for name in (measure, BESIDE[measure]):
                evaluation[f"{name}_ema"] = of_average[name]
        return evaluation

    def _save(self, wait: bool) -> None:
        self.seconds = time.perf_counter() - self.started
        state = {
            "evaluation": self.evaluation,
            "start": self.start,
            "seconds": self.seconds,
            "health": self.health.state(),
        }
        evaluated = self.evaluated == self.done  # else it is that of older weights
        score = score_of(of_published(self.evaluation)) if evaluated else None
        own = self.step.running() | {"routing": self.routing.state()}
        self.saver.save(self.done, state=state, own=own, score=score, wait=wait)


def epoch_length(data: Data, settings: Settings) -> int:
    """Optimiser steps per epoch. Raises ValueError when the data is smaller than one global batch."""
    return steps_per_epoch(
        len(data.train),
        micro_batch=settings.micro_batch,
        accumulation=settings.accumulation,
        world=settings.global_batch // (settings.micro_batch * settings.accumulation),
    )


def other_micro_batch(saved: dict[str, Any], settings: Settings, module: nn.Module) -> list[Finding]:
    """What a resume with other micro-batches changes, at the same global batch; nothing where they are the same.

    Args:
        saved: the topology that the checkpoint was saved at.
        module: what is trained.
    """
    before = saved["micro_batch"]
    here = settings.micro_batch
    if before == here:
        return []
    changes = "mixup pairs other images, and dropout, drop path and routing noise are drawn differently"
    layers = routed_layers(module).values()
    if any(layer.config.images_per_group == 0 for layer in layers):
        changes += (
            "; with student.moe.images_per_group=0 other images are routed together, so that experts drop others and "
            "are balanced over others"
        )
    world = settings.global_batch // (here * settings.accumulation)
    accumulation, left_over = divmod(settings.global_batch, before * world)
    advice = f"use ranks whose number divides {settings.global_batch // before}"
    if not left_over:
        advice = (
            f'set "train_micro_batch_size_per_gpu" to {before} and "gradient_accumulation_steps" to {accumulation} in '
            "the DeepSpeed JSON"
        )
    message = (
        f"resumed with micro-batches of {here} images, saved with {before}: the images of a step are the same, but "
        f"{changes}. To go on as without a stop, {advice}"
    )
    return [Finding(message)]


class _Monitor:
    """Rank 0's metrics.jsonl and progress; on other ranks it does nothing."""

    def __init__(self, folder: Path, task: Task, per_epoch: int, done: int, dist: Dist):
        self.task = task
        self.per_epoch = per_epoch
        self.main = dist.main
        if self.main:
            self.log = MetricsLog(folder / "metrics.jsonl", resume_step=done, trackers=task.run.trackers)
            self.progress = Progress(task.epochs * per_epoch, per_epoch, task.description, start_step=done)
            if done:
                self.progress.note(f"resumed after step {done}")

    def train_row(self, done: int, metrics: dict[str, Any], lr: float) -> None:
        if self.main:
            row = self._head("train", done) | {"lr": lr, **metrics, "time": time.time()}
            self.log.write(row)
            self.progress.update(done, row)

    def eval_row(self, done: int, evaluation: dict[str, float]) -> None:
        if self.main:
            self.log.write(self._head("eval", done) | evaluation | {"time": time.time()})
            if done == self.task.epochs * self.per_epoch:
                published = of_published(evaluation)
                measure = measure_of(published)
                raw = ""
                if f"{measure.key}_raw" in published:
                    raw = f" (without averaging {measure.shown(published[f'{measure.key}_raw'])})"
                self.progress.note(f"{headline(published)}{raw} on {published['images']} images")

    def warn(self, done: int, *findings: Finding) -> None:
        if self.main:
            for finding in findings:
                row = self._head("warning", done) | finding.about
                self.log.write(row | {"message": finding.message, "time": time.time()})
                self.progress.note(f"warning: {finding.message}")

    def note(self, *texts: str) -> None:
        if self.main:
            for text in texts:
                self.progress.note(text)

    def _head(self, kind: str, done: int) -> dict[str, Any]:
        """What every metrics row begins with."""
        return {"kind": kind, "phase": self.task.phase, "epoch": done // self.per_epoch, "step": done}

    def close(self) -> None:
        if self.main:
            self.progress.close()
            self.log.close()
