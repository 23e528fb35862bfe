"""A plan against real steps on this machine: the peak of memory, and the time of a step from a calibration made here.

    python benchmarks/planner.py memory
    torchrun --nproc_per_node 2 benchmarks/planner.py memory
    nice -n -5 python benchmarks/planner.py time [--out measured.json]

The models are those of the recipe's phases, their weights random; the engine (DeepSpeed, ZeRO) and the step are the
trainer's own.

memory: bytes of all tensors alive at one time, counted below the operators from before the first weight on, and beside
them what torch's profiler says that the CPU allocator has handed out.
time: three trainings calibrate this machine (rate of products, memory traffic of what is kept, that of the update); the
others are predicted by the planner and measured in turn, in CPU seconds of one thread, beside this machine's rate of a
product of 1024 x 1024. On one rank: what several ranks of one machine send each other tells nothing of a network.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.detection.detector import Target
from models.moe.grouped import LOOP
from trainer.config.ds_config import Settings, read_ds_config
from trainer.config.gpus import Gpu
from trainer.config.load import load_recipe
from trainer.context import Run
from trainer.data.boxes.batches import BoxBatch, Pictures, Targets
from trainer.data.loader import Batch
from trainer.distributed.engine import build_engine
from trainer.distributed.ranks import Dist, start, stop
from trainer.loop.step import Task, TrainStep
from trainer.plan.estimate import estimate, step_flops
from trainer.plan.footprint import Footprint, footprint, own_elements, state_bytes
from trainer.plan.planner import settings_of
from trainer.plan.stand_ins import planned_run
from trainer.plan.traffic import Layout
from trainer.plan.work import Work, works

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes/demo.yaml"
DS_CONFIG = ROOT / "ds_configs/cpu_debug.json"
IMAGES = 1_000  # of an epoch, which nobody reads
WARM_UP = 2  # steps that are not counted
SQUARE = 1024


def sized(width: int, *words: str, depth: int = 4, pixels: int = 64, experts: int = 4) -> list[str]:
    """The demo's recipe at other sizes, teacher and student of one width."""
    sizes = {"student.depth": depth, "student.moe.num_experts": experts, "teacher.image_size": pixels}
    for model in ("student", "teacher"):
        sizes |= {f"{model}.width": width, f"{model}.mlp_dim": 4 * width}
    return [f"{key}={value}" for key, value in sizes.items()] + ["student.moe.capacity_factor=1.05", *words]


TOGETHER = ("distill.epochs=0", "refine.epochs=2", "refine.order=together", "meta.blocks_per_module=0")
# (result, words, images of a rank's micro-batch)
MEMORY = (
    ("train", sized(128), 32),
    ("train", sized(256, experts=8), 8),
    ("train", sized(128, "ds.trainer.activation_checkpointing=true"), 32),
    ("train", sized(128, "ds.bf16.enabled=true", "ds.zero_optimization.stage=2"), 32),
    ("train", sized(128, "train.optimizer=sgd", "train.ema=0.9", experts=32), 16),
    ("distill_1", sized(128), 32),
    ("refine", sized(128, *TOGETHER), 32),
    ("meta", sized(128), 32),
    ("teacher", sized(128), 32),
)
DETECT = ["detect.epochs=1", "detect.width=64", "detect.mlp_dim=128", "detect.heads=4", "detect.queries=50"]
DETECT += ["detect.groups=4", "detect.shorter_side=96", "detect.longest_side=128", "detect.jitter=[1.0,1.0]"]
MEMORY += (
    ("detect", sized(128, *DETECT, "detect.masks=true"), 8),
    ("detect", sized(128, *DETECT, "detect.window=6", "detect.global_blocks=1"), 8),
)
CALIBRATION = (("train", sized(96), 16), ("train", sized(192, experts=16), 16), ("teacher", sized(192), 16))
DEMO = ["student.moe.capacity_factor=1.05"]
PREDICTED = (
    ("train", DEMO, 64),
    ("distill_1", DEMO, 64),
    ("train", sized(128), 16),
    ("train", sized(192), 16),
    ("train", sized(192, depth=6, pixels=96), 16),
    ("train", sized(256), 8),
    ("train", sized(192, "ds.trainer.activation_checkpointing=true"), 16),
    ("distill_1", sized(192), 16),
    ("meta", sized(192), 16),
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "time"))
    parser.add_argument("--rounds", type=int, default=7, help="of time: steps of each training, in turn")
    parser.add_argument("--out", type=Path, help="of time: where the calibrated machine is written, for --gpu FILE")
    options = parser.parse_args()
    dist = start()
    if options.what == "memory":
        show_memory(dist)
    else:
        show_time(dist, options.rounds, options.out)
    stop()


def show_memory(dist: Dist) -> None:
    """A line for each training, of the first rank."""
    for name, words, images in MEMORY:
        words = with_batch(name, words, images, dist)
        live, expected = live_peak(words, name, dist)
        beside = ""
        if dist.world == 1:  # with more, gloo's own threads free tensors, which the profiler of this one does not see
            beside = f", allocator {profiled_peak(words, name, dist) / 1e6:.1f}"
        if dist.main:
            figures = f"planned {expected.peak / 1e6:6.1f} MB, tensors {live / 1e6:6.1f}{beside}"
            print(f"{name:9} {figures}: {expected.peak / live:.3f}   {_differs(words)}", flush=True)


def show_time(dist: Dist, rounds: int, out: Path | None) -> None:
    """Calibrate, predict, measure; all trainings are stepped in turn."""
    trainings = [(name, with_batch(name, words, images, dist)) for name, words, images in (*CALIBRATION, *PREDICTED)]
    steps = []
    for name, words in trainings:
        run, work, settings, _ = planned(words, name, dist)
        steps.append(RealStep(run, work, settings, dist))
    for step in steps:
        for _ in range(WARM_UP):
            step()
    square = torch.randn(SQUARE, SQUARE)
    products: list[float] = []
    measured: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        products.append(min(_cpu_seconds(lambda: square @ square) for _ in range(3)))
        for times, step in zip(measured, steps):
            times.append(_cpu_seconds(step))
    seconds = [statistics.median(times) for times in measured]
    rate = 2 * SQUARE**3 / statistics.median(products)
    # the engines have changed the models: planned once more
    plans = [planned(words, name, dist)[1:] for name, words in trainings]
    machine = calibrated(plans[: len(CALIBRATION)], seconds, rate)
    print(f"{rounds} rounds, a product of {SQUARE} x {SQUARE}: {rate / 1e9:.1f} GFLOP/s; calibrated: {machine}")
    for (name, words), plan, times, median in zip(trainings, plans, measured, seconds):
        kind = "calibration" if plan in plans[: len(CALIBRATION)] else "prediction"
        expected = estimate(*plan, machine, 1.0).seconds.total
        figures = f"planned {1e3 * expected:5.0f} ms, measured {1e3 * median:5.0f} ({1e3 * min(times):.0f}-"
        figures += f"{1e3 * max(times):.0f})"
        print(f"{kind:11} {name:9} {figures}: {expected / median:.2f}   {_differs(words)}", flush=True)
    if out is not None:
        out.write_text(json.dumps(dataclasses.asdict(machine), indent=2) + "\n")


def calibrated(plans: Sequence[tuple[Work, Settings, Layout]], seconds: Sequence[float], rate: float) -> Gpu:
    """The machine on which these trainings take so many seconds a step.

    Three unknowns, three equations, each divided by its seconds:
    seconds = FLOPs / rate + bytes of states x touched / speed + weights x bytes / speed.

    Args:
        rate: of products, FLOP/s, which its share refers to.
    """
    speed = 1.0  # GB/s, which cancels out: only bytes over speed count
    rows = []
    for work, settings, layout in plans:
        passed = state_bytes(work, settings, layout)
        rows.append((step_flops(work, settings, 1.0), passed / 1e9, own_elements(work, layout) / 1e9))
    times = torch.tensor(seconds[: len(plans)], dtype=torch.float64).unsqueeze(1)
    counts = torch.tensor(rows, dtype=torch.float64)
    per_flop, touched, updated = torch.linalg.lstsq(counts / times, torch.ones_like(times)).solution.flatten().tolist()
    share = 1 / (per_flop * rate)
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    figures = {"memory_gb": round(ram, 1), "memory_gb_s": speed, "node_gb_s": 1.0, "network_gb_s": 1.0}
    return Gpu(
        "this machine",
        rate / 1e12,
        source="benchmarks/planner.py time",
        share=share,
        touched=touched,
        updated_bytes=updated,
        form=LOOP,
        **figures,
    )


def with_batch(name: str, words: list[str], images: int, dist: Dist) -> list[str]:
    """The same with a global batch of one micro-batch of so many images on every rank."""
    section = name.partition("_")[0]
    return [*words, f"{section}.global_batch={images * dist.world}"]


def _differs(words: list[str]) -> str:
    """What tells a training from the others."""
    same = ("student.mlp_dim", "teacher.width", "teacher.mlp_dim", "student.moe.capacity_factor")
    return " ".join(word for word in words if not word.startswith(same))


def _cpu_seconds(work: Callable[[], Any]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def planned(words: list[str], name: str, dist: Dist) -> tuple[Run, Work, Settings, Layout]:
    """A training of the demo's recipe with some words changed, as the planner sees it."""
    recipe = load_recipe(RECIPE, [word for word in words if not word.startswith("ds.")])
    ds_values = read_ds_config(DS_CONFIG, [word for word in words if word.startswith("ds.")])
    run = planned_run(recipe, ds_values, ROOT / "unused", 1, dist.world, images=IMAGES, classes=10)
    work = next(work for work in works(run) if work.name == name)
    settings = settings_of(recipe, work, ds_values, Layout(1, dist.world))
    return run, work, settings, Layout(1, dist.world, settings.ep_size)


class RealStep:
    """The trainer's step of a planned training, on random images."""

    def __init__(self, run: Run, work: Work, settings: Settings, dist: Dist):
        objective = work.objective
        work.objective.flops_per_image  # noqa: B018  counted on the plain module
        _materialise([objective.module, *objective.frozen])
        size = run.teacher.preprocessing
        torch.manual_seed(dist.rank)
        batch = _boxed_batch(run, settings) if work.by_itself else _labelled_batch(run, settings)
        self.batches = [batch] * settings.accumulation
        self.engine = build_engine(
            objective.module,
            work.schedule,
            settings,
            steps_per_epoch=10,
            dist=dist,
            layer_decay=work.layer_decay,
            ema=getattr(work.schedule, "ema", 0.0),
        )
        task = Task(work.name, work.name, work.epochs, 0, run.recipe.run)
        self.step = TrainStep(self.engine, objective, run.data_for(size), task, dist)
        self.done = 0

    def __call__(self) -> None:
        self.step.run(self.done, self.batches, total=1_000, row_due=False)
        self.done += 1


def _labelled_batch(run: Run, settings: Settings) -> Batch:
    size = run.teacher.preprocessing
    shape = (settings.micro_batch, size.in_chans, size.image_size, size.image_size)
    labels = torch.randint(len(run.labels), (settings.micro_batch,))
    everyone = torch.ones(len(labels), dtype=torch.bool)
    return Batch(torch.randn(shape), labels, everyone, torch.arange(len(labels)))


def _boxed_batch(run: Run, settings: Settings) -> BoxBatch:
    """Images of the largest size, an object on each."""
    detect = run.recipe.detect
    shape = (3, detect.shorter_side, detect.longest_side)
    masks = torch.ones(1, *shape[1:], dtype=torch.uint8) if detect.masks else None
    target = Target(torch.zeros(1, dtype=torch.int64), torch.full((1, 4), 0.5), masks)
    images = settings.micro_batch * (torch.randint(256, shape, dtype=torch.uint8),)
    return BoxBatch(Pictures(images, run.teacher.preprocessing), Targets(settings.micro_batch * (target,)))


def _materialise(modules: list[nn.Module]) -> None:
    """Small random weights in place of the shapes of the meta device; what is shared stays shared."""
    real: dict[int, Tensor] = {}

    def made(tensor: Tensor) -> Tensor:
        if id(tensor) not in real:
            values = torch.zeros(tensor.shape, dtype=tensor.dtype)
            if tensor.is_floating_point():
                values.normal_(std=0.02)
            if isinstance(tensor, nn.Parameter):
                values = nn.Parameter(values, requires_grad=tensor.requires_grad)
            real[id(tensor)] = values
        return real[id(tensor)]

    parts = {id(part): part for module in modules for part in module.modules()}
    for module in parts.values():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = made(tensor)
        if hasattr(module, "normalized_shape") and module.weight is not None:
            with torch.no_grad():
                module.weight.fill_(1.0)


class LiveTensors(TorchDispatchMode):
    """Bytes of all storages that operators have put out and that are still alive; the most of them since `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def reset(self) -> None:
        self.peak = self.now

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def live_peak(words: list[str], name: str, dist: Dist, steps: int = 3) -> tuple[int, Footprint]:
    """Most bytes of tensors alive at one time of a step, and what was planned.

    The first steps also make the optimiser's moments, so the last one counts.
    """
    run, work, settings, layout = planned(words, name, dist)
    expected = footprint(work, settings, layout)
    live = LiveTensors()
    with live:
        step = RealStep(run, work, settings, dist)
        del work  # it remembers the experts that other ranks keep
        for _ in range(steps - 1):
            step()
        gc.collect()
        live.reset()
        step()
    step.engine.close()
    return live.peak, expected


def profiled_peak(words: list[str], name: str, dist: Dist, steps: int = 3) -> int:
    """Most bytes that the CPU allocator had handed out at one time of a step, as torch's profiler says."""
    run, work, settings, _ = planned(words, name, dist)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step = RealStep(run, work, settings, dist)
        for _ in range(steps - 1):
            step()
        gc.collect()
        with torch.profiler.record_function("the step"):
            step()
    step.engine.close()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begun = next(event.start_ns() for event in events if event.name() == "the step")
    now, peak = 0, 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            if event.start_ns() >= begun:
                peak = max(peak, now)
    return peak


if __name__ == "__main__":
    main()
