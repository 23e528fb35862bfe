"""A plan against real steps on this machine: the peak of memory, and the time of a step from a calibration made here.

    python benchmarks/planner.py memory
    torchrun --nproc_per_node 2 benchmarks/planner.py memory
    nice -n -5 python benchmarks/planner.py time

The models are those of the recipe's phases, their weights random; the engine (DeepSpeed, ZeRO) and the step are the
trainer's own. Memory is what torch's CPU allocator hands out, as its profiler reports it, from before the first weight.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.config.ds_config import Settings, read_ds_config
from trainer.config.load import load_recipe
from trainer.context import Run
from trainer.data.loader import Batch
from trainer.distributed.engine import build_engine
from trainer.distributed.ranks import Dist, start
from trainer.loop.step import Task, TrainStep
from trainer.plan.footprint import Footprint, footprint
from trainer.plan.planner import settings_of
from trainer.plan.stand_ins import planned_run
from trainer.plan.traffic import Layout
from trainer.plan.work import Work, works

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes/demo.yaml"
DS_CONFIG = ROOT / "ds_configs/cpu_debug.json"
IMAGES = 1_000  # of an epoch, which nobody reads


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
        shape = (settings.micro_batch, size.in_chans, size.image_size, size.image_size)
        labels = torch.randint(len(run.labels), (settings.micro_batch,))
        everyone = torch.ones(len(labels), dtype=torch.bool)
        batch = Batch(torch.randn(shape), labels, everyone, torch.arange(len(labels)))
        self.batches = [batch] * settings.accumulation
        self.engine = build_engine(objective.module, work.schedule, settings, steps_per_epoch=10, dist=dist)
        task = Task(work.name, work.name, work.epochs, 0, run.recipe.run)
        self.step = TrainStep(self.engine, objective, run.data_for(size), task, dist)
        self.done = 0

    def __call__(self) -> None:
        self.step.run(self.done, self.batches, total=1_000, row_due=False)
        self.done += 1


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

    for module in {id(part): part for module in modules for part in module.modules()}.values():
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


def allocated_peak(words: list[str], name: str, dist: Dist, steps: int = 3) -> tuple[int, int | None, Footprint]:
    """Most bytes alive at one time of a step: as tensors, and as the allocator's profile says; and what was planned.

    The first steps also make the optimiser's moments, so the last one counts. The profile is None with several ranks:
    there gloo's own threads free tensors, which the profiler of this thread does not see.
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
    allocated = _profiled_peak(words, name, dist, steps) if dist.world == 1 else None
    return live.peak, allocated, expected


def _profiled_peak(words: list[str], name: str, dist: Dist, steps: int) -> int:
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
