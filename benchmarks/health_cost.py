"""What the watch over a training costs: optimiser steps of the embedded demo's student, bare (forward, backward, step)
and through trainer/loop/step.py (loss guard, running sums, seeded draws), and a metrics row with one all-reduce
against one with three per MoE layer, in turn in one run. On a busy machine look at the processor's time.

    python benchmarks/health_cost.py
    python -m torch.distributed.run --nproc_per_node 2 benchmarks/health_cost.py

On a GPU it also counts the times a step waits for the device, with and without the watch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch
import torch

from benchmarks.trainer import model_and_data, tokens_of
from models.moe.out import routing_metrics
from trainer.config.ds_config import read_ds_config, resolve
from trainer.config.load import load_recipe
from trainer.data.loader import Batch
from trainer.distributed.engine import build_engine
from trainer.distributed.ranks import Dist, start, stop
from trainer.loop.step import Task, TrainStep
from trainer.objectives import Classify

STEPS = 25  # of one kind in a row


def main() -> None:
    """Measure and print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    parser.add_argument("--ds_config", default="ds_configs/cpu_debug.json")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    dist = start()
    step, batch = _training(options.recipe, options.ds_config, dist)
    kinds = {"bare": lambda: _bare(step, batch), "watched": lambda: step.run(0, [batch], total=1, row_due=False)}
    seconds = _in_turn(kinds, STEPS, options.rounds)
    step.run(0, [batch], total=1, row_due=True)
    out = {}
    step.engine(batch.images.to(dist.device, step.engine.dtype), out)
    layers = routing_metrics(out)
    rows = {"one all-reduce": step.take_metrics, "three per layer": lambda: _row_of_many(layers, dist)}
    row_seconds = _in_turn(rows, STEPS, options.rounds)
    waits = {}
    if dist.device.type == "cuda":
        waits = {name: _waits(work) for name, work in kinds.items()}
    if dist.main:
        print(f"{dist.world} ranks, micro-batch {len(batch.images)}, medians of {options.rounds} rounds of {STEPS}")
        _print_medians("step", seconds, waits)
        _print_medians("row", row_seconds, {})
        bare_wall, bare_processor = seconds["bare"]
        wall, processor = seconds["watched"]
        print(
            f"a watched step takes {wall / bare_wall:.3f} of a bare one, "
            f"{processor / bare_processor:.3f} of its processor time"
        )
    dist.barrier()
    stop()


def _print_medians(title: str, seconds: dict[str, tuple[float, float]], waits: dict[str, int]) -> None:
    for name, (wall, processor) in seconds.items():
        line = f"{title}  {name:<16} {1e3 * wall:8.3f} ms, processor {1e3 * processor:8.3f} ms"
        if name in waits:
            line += f"  waits for the device {waits[name]} times"
        print(line)


def _training(recipe_path: str, ds_config: str, dist: Dist) -> tuple[TrainStep, Batch]:
    """The demo's student in an engine, and one micro-batch of noise."""
    recipe = load_recipe(recipe_path, [])
    model, data = model_and_data(recipe)
    settings = resolve(
        read_ds_config(ds_config),
        recipe.train,
        world=dist.world,
        local_world=dist.local_world,
        num_experts=recipe.student.moe.num_experts,
        phase="train",
    )
    engine = build_engine(model, recipe.train, settings, steps_per_epoch=STEPS, dist=dist)
    task = Task("train", "train", recipe.train.epochs, recipe.seed, recipe.run)
    count = settings.micro_batch
    labels = torch.arange(count) % 10
    side = data.preprocessing.image_size
    batch = Batch(torch.randn(count, 3, side, side), labels, labels >= 0, labels)
    return TrainStep(engine, Classify(model, tokens=tokens_of(recipe)), data, task, dist), batch


def _bare(step: TrainStep, batch: Batch) -> None:
    """Forward, backward and step, and nothing else."""
    engine = step.engine
    images = batch.images.to(step.dist.device, engine.dtype)
    labels = batch.labels.to(step.dist.device)
    loss, _ = step.objective(engine, images, labels)
    engine.backward(loss)
    engine.step(0)


def _row_of_many(layers: dict, dist: Dist) -> None:
    """The routing part of a row with collectives of its own for every number."""
    for values in layers.values():
        for value in values.values():
            (dist.sum(value.detach().float().clone()) / dist.world).tolist()


def _in_turn(kinds: dict[str, Callable[[], object]], steps: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of one call per kind, wall and processor; the kinds take turns, as the machine may get busier."""
    wall: dict[str, list[float]] = {name: [] for name in kinds}
    processor: dict[str, list[float]] = {name: [] for name in kinds}
    for round_ in range(rounds + 1):
        for name, work in kinds.items():
            wall_before = time.perf_counter()
            processor_before = time.process_time()
            for _ in range(steps):
                work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:  # the first one warms up
                wall[name].append((time.perf_counter() - wall_before) / steps)
                processor[name].append((time.process_time() - processor_before) / steps)
    return {name: (statistics.median(wall[name]), statistics.median(processor[name])) for name in kinds}


def _waits(work: Callable[[], object]) -> int:
    """How often one call waits for the GPU, as torch notes it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(note.message) for note in noted)


if __name__ == "__main__":
    main()
