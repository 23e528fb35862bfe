"""How long a checkpoint keeps training waiting: a phase of the embedded demo with no save, with saves in the
background, and with saves that are waited for, 100 steps each in turn; beside it the floor, one copy of the same bytes.

    python benchmarks/save_overhead.py --phase teacher
    python -m torch.distributed.run --nproc_per_node 2 benchmarks/save_overhead.py --phase train

Images are noise of the demo's size, so that data loading does not hide the save.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch
import torch

from trainer.checkpoint.saver import Saver
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe
from trainer.context import Run
from trainer.distributed.engine import Engine, build_engine
from trainer.distributed.ranks import seed_everything, start, stop
from trainer.objectives import Classify
from trainer.teaching.students import scratch_student
from trainer.teaching.teachers import new_teacher_of, planned_teacher, trained_preprocessing

STEPS = 100  # of an interval: one save
KINDS = ("none", "background", "waited for")


def main() -> None:
    """Measure and print a table on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=("teacher", "train"), default="train")
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    parser.add_argument("--ds_config", default="ds_configs/cpu_debug.json")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    run = Run(load_recipe(options.recipe, []), read_ds_config(options.ds_config), Path("unused"), start(), "benchmark")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(run.dist.gather(scratch)[0])  # rank 0's, for all
        engine, step = _training(run, options.phase)
        lines = _measure(run, engine, step, folder / options.phase, options.rounds)
        if run.dist.main:
            print("\n".join(lines))
        run.dist.barrier()
    stop()


def _training(run: Run, phase: str) -> tuple[Engine, Callable[[int], None]]:
    """The engine of a phase and one optimiser step on noise."""
    t = run.recipe.teacher
    images = trained_preprocessing(t)
    seed_everything(0, 0, deterministic=False)
    if phase == "train":
        module = scratch_student(run.with_teacher(planned_teacher(t, run.labels)))
    else:
        module = new_teacher_of(t, run.labels)
    schedule = getattr(run.recipe, phase)
    settings = run.settings(phase)
    objective = Classify(module, (t.image_size // t.patch_size) ** 2 + 1)
    engine = build_engine(module, schedule, settings, steps_per_epoch=STEPS, dist=run.dist)
    noise = torch.randn(settings.micro_batch, images.in_chans, images.image_size, images.image_size)
    noise = noise.to(run.dist.device, engine.dtype)
    labels = torch.arange(settings.micro_batch, device=run.dist.device) % len(run.labels)

    def step(number: int) -> None:
        for _ in range(settings.accumulation):
            loss, _ = objective(engine, noise, labels)
            engine.backward(loss)
            engine.step(number)

    module.train()
    return engine, step


def _measure(run: Run, engine: Engine, step: Callable[[int], None], folder: Path, rounds: int) -> list[str]:
    """The table: per kind the least disturbed interval, and the median of what training waited."""
    saver = Saver(engine, folder, run.recipe.run, run.dist)
    steps_done = 0
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    waited: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_ in range(rounds + 1):
        for kind in KINDS:
            run.dist.barrier()
            started = time.perf_counter()
            blocked = _interval(saver, step, steps_done, kind)
            steps_done += STEPS
            if round_:  # the first one warms up
                seconds[kind].append(time.perf_counter() - started)
                waited[kind].append(blocked)
    copied = saver.host_bytes
    saver.close()
    alone = min(seconds["none"])
    floor = _copy_seconds(copied)
    lines = [
        f"{run.dist.world} ranks, {copied:,} bytes copied per rank and save, a save every {STEPS} steps",
        "saves        seconds   training waits (ms)   share of it   longer by",
    ]
    for kind in KINDS:
        whole = min(seconds[kind])
        wait = statistics.median(waited[kind])
        lines.append(f"{kind:<11} {whole:8.3f}   {1e3 * wait:19.2f}   {wait / alone:11.2%}   {whole / alone - 1:9.2%}")
    lines.append(f"one copy    {'':8}   {1e3 * floor:19.2f}   {floor / alone:11.2%}   the floor")
    return lines


def _interval(saver: Saver, step: Callable[[int], None], steps_done: int, kind: str) -> float:
    """STEPS optimiser steps with one save after the first of them; seconds that training waited for it."""
    step(steps_done)
    blocked = 0.0
    if kind != "none":
        asked = time.perf_counter()
        saver.save(steps_done + 1, state={}, own={}, wait=kind == "waited for")
        blocked += time.perf_counter() - asked
    for number in range(steps_done + 1, steps_done + STEPS):
        step(number)
    if kind != "none":
        asked = time.perf_counter()
        saver.save(steps_done + 1, state={}, own={})  # saved already: waits for it, as the next save would
        blocked += time.perf_counter() - asked
    return blocked


def _copy_seconds(count: int) -> float:
    """Median seconds of copying `count` bytes in memory."""
    source = torch.ones(count, dtype=torch.uint8)
    target = torch.empty(count, dtype=torch.uint8)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
