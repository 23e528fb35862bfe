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

from models.moe.layer import MoEConfig
from models.moe.out import routing_metrics
from models.preprocessing import Preprocessing
from models.vmoe.model import VMoE, VMoEConfig
from trainer.config.ds_config import read_ds_config, resolve
from trainer.config.load import load_recipe, to_dict
from trainer.data.loader import Batch, Data
from trainer.data.sources import open_source
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
    waits = {name: _waits(work) for name, work in kinds.items()} if dist.device.type == "cuda" else {}
    if dist.main:
        print(f"{dist.world} ranks, micro-batch {len(batch.images)}, medians of {options.rounds} rounds of {STEPS}")
        for title, found in (("step", seconds), ("row", row_seconds)):
            for name, (wall, processor) in found.items():
                waited = f"  waits for the device {waits[name]} times" if name in waits else ""
                print(f"{title}  {name:<16} {1e3 * wall:8.3f} ms, processor {1e3 * processor:8.3f} ms{waited}")
        wall, processor = (watched / bare for watched, bare in zip(seconds["watched"], seconds["bare"]))
        print(f"a watched step takes {wall:.3f} of a bare one, {processor:.3f} of its processor time")
    dist.barrier()
    stop()


def _training(recipe_path: str, ds_config: str, dist: Dist) -> tuple[TrainStep, Batch]:
    """The demo's student in an engine, and one micro-batch of noise."""
    recipe = load_recipe(recipe_path, [])
    s, t = recipe.student, recipe.teacher
    sizes = {name: getattr(s, name) for name in ("patch_size", "width", "depth", "heads", "mlp_dim", "moe_blocks")}
    model = VMoE(VMoEConfig(image_size=t.image_size, num_classes=10, moe=MoEConfig(**to_dict(s.moe)), **sizes))
    settings = resolve(
        read_ds_config(ds_config), recipe.train, world=dist.world, local_world=dist.local_world,
        num_experts=s.moe.num_experts, phase="train",
    )  # fmt: skip
    engine = build_engine(model, recipe.train, settings, steps_per_epoch=STEPS, dist=dist)
    source, half = open_source(recipe.data, "train"), (0.5, 0.5, 0.5)
    data = Data(source, source, Preprocessing(t.image_size, half, half), recipe.augment, 0, 10, False)
    task = Task("train", "train", recipe.train.epochs, recipe.seed, recipe.run)
    count = settings.micro_batch
    labels = torch.arange(count) % 10
    batch = Batch(torch.randn(count, 3, t.image_size, t.image_size), labels, labels >= 0, labels)
    return TrainStep(engine, Classify(model, tokens=17), data, task, dist), batch


def _bare(step: TrainStep, batch: Batch) -> None:
    engine = step.engine
    images, labels = batch.images.to(step.dist.device, engine.dtype), batch.labels.to(step.dist.device)
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
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for round_ in range(rounds + 1):
        for name, work in kinds.items():
            begin, busy = time.perf_counter(), time.process_time()
            for _ in range(steps):
                work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:  # the first one warms up
                times[name].append(((time.perf_counter() - begin) / steps, (time.process_time() - busy) / steps))
    return {name: tuple(map(statistics.median, zip(*pairs))) for name, pairs in times.items()}


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
