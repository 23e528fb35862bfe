"""The trainer against loops without one: the embedded demo's student and images, all through the same loader.

    python benchmarks/trainer.py

Epochs of each, in turn: trainer/loop/fit.py as phase train runs it (DeepSpeed's engine, loss guard, metrics rows);
DeepSpeed's engine alone, as the JSON sets it up; and plain torch, which is the same loss, clipping and fused AdamW.
Seconds of a step are those between the first metrics row and the last, or the same steps of the other loops: building,
evaluation and the save at the end are left out. At these sizes a step is some thousand small operators, so whatever is
added is dear as nowhere else.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch
import torch
from torch import Tensor, nn

from benchmarks import timing
from models.moe.layer import MoEConfig
from models.preprocessing import Preprocessing
from models.vmoe.model import VMoE, VMoEConfig
from trainer.config.ds_config import Settings, read_ds_config, resolve
from trainer.config.load import load_recipe, to_dict
from trainer.config.recipe import Recipe
from trainer.data.loader import Batch, Data
from trainer.data.sources import open_source
from trainer.distributed.engine import build_engine, parameter_groups
from trainer.distributed.ranks import Dist, start, stop
from trainer.loop.fit import epoch_length, fit
from trainer.loop.step import Task
from trainer.objectives import Classify
from trainer.tracking.metrics import read_metrics


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/demo.yaml")
    parser.add_argument("--ds_config", default="ds_configs/cpu_debug.json")
    parser.add_argument("--epochs", type=int, default=4, help="of each kind in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to keep the results in")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, [f"train.epochs={options.epochs}"])
    dist = start()
    settings = resolve(
        read_ds_config(options.ds_config),
        recipe.train,
        world=dist.world,
        local_world=dist.local_world,
        num_experts=recipe.student.moe.num_experts,
        phase="train",
    )
    kinds = {"trainer": _trained, "DeepSpeed alone": _engine_alone, "plain torch": _plain}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for round_number in range(options.rounds + 1):
        for name, kind in kinds.items():
            of_a_step = kind(recipe, settings, dist)
            if round_number:  # the first one warms up
                seconds[name].append(of_a_step)
    facts = timing.machine()
    print(timing.describe(facts))
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:<16} {1e3 * median:7.1f} ms a step, {settings.global_batch / median:6.0f} images/s")
    ratios = {}
    for name, to in (("trainer", "plain torch"), ("trainer", "DeepSpeed alone"), ("DeepSpeed alone", "plain torch")):
        speed = 1 / timing.ratio(seconds, name, to)
        ratios[f"speed, {name} per {to}"] = speed
        print(f"{name} has {speed:.3f} of the speed of {to}, median of {options.rounds} rounds")
    timing.write(options.json, ratios, machine=facts, seconds=seconds)
    stop()


def _trained(recipe: Recipe, settings: Settings, dist: Dist) -> float:
    """Seconds of a step of the trainer."""
    model, data = model_and_data(recipe)
    per_epoch = epoch_length(data, settings)
    engine = build_engine(model, recipe.train, settings, steps_per_epoch=per_epoch, dist=dist)
    task = Task("train", "train", recipe.train.epochs, recipe.seed, recipe.run)
    with tempfile.TemporaryDirectory() as folder:
        fit(engine, Classify(model, tokens=tokens_of(recipe)), data, task, Path(folder), dist)
        rows = [row for row in read_metrics(Path(folder) / "metrics.jsonl") if row["kind"] == "train"]
    engine.close()
    return (rows[-1]["time"] - rows[0]["time"]) / (rows[-1]["step"] - rows[0]["step"])


def _engine_alone(recipe: Recipe, settings: Settings, dist: Dist) -> float:
    """Seconds of a step of a loop around DeepSpeed's engine, with the trainer's groups, optimiser and schedule."""
    model, data = model_and_data(recipe)
    per_epoch = epoch_length(data, settings)
    objective = Classify(model, tokens=tokens_of(recipe))
    engine = build_engine(model, recipe.train, settings, steps_per_epoch=per_epoch, dist=dist)
    model.train()

    def step(images: Tensor, labels: Tensor, done: int) -> None:
        loss, _ = objective(engine, images, labels)
        engine.backward(loss)
        engine.step(done)

    seconds = _seconds_of(step, recipe, settings, data, dist)
    engine.close()
    return seconds


def _plain(recipe: Recipe, settings: Settings, dist: Dist) -> float:
    """Seconds of a step of plain torch."""
    model, data = model_and_data(recipe)
    objective = Classify(model.to(dist.device).train(), tokens=tokens_of(recipe))
    groups = parameter_groups(model, recipe.train.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.train.lr, betas=recipe.train.betas, fused=True)

    def step(images: Tensor, labels: Tensor, done: int) -> None:
        loss, _ = objective(model, images, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.train.clip)
        optimizer.step()
        optimizer.zero_grad()

    return _seconds_of(step, recipe, settings, data, dist)


def _seconds_of(
    step: Callable[[Tensor, Tensor, int], None], recipe: Recipe, settings: Settings, data: Data, dist: Dist
) -> float:
    """Seconds of a step, from the one after which the trainer writes its first row to the last."""
    first = 0.0
    done = 0
    for batch in _batches(recipe, settings, data, dist):
        step(batch.images.to(dist.device), batch.labels.to(dist.device), done)
        done += 1
        if done == recipe.run.log_every:
            timing.wait(dist.device)
            first = time.perf_counter()
    timing.wait(dist.device)
    return (time.perf_counter() - first) / (done - recipe.run.log_every)


def _batches(recipe: Recipe, settings: Settings, data: Data, dist: Dist) -> Iterator[Batch]:
    return data.train_batches(
        seed=recipe.seed,
        epoch=0,
        start_step=0,
        epochs=recipe.train.epochs,
        micro_batch=settings.micro_batch,
        accumulation=settings.accumulation,
        world=dist.world,
        rank=dist.rank,
        workers=0,
        device=dist.device,
    )


def model_and_data(recipe: Recipe) -> tuple[VMoE, Data]:
    """The student of a recipe, new, and its images, which no process loads ahead."""
    student = recipe.student
    side = recipe.teacher.trained_size
    sizes = {
        name: getattr(student, name) for name in ("patch_size", "width", "depth", "heads", "mlp_dim", "moe_blocks")
    }
    train, val = open_source(recipe.data, "train"), open_source(recipe.data, "val")
    moe = MoEConfig(**to_dict(student.moe))
    model = VMoE(VMoEConfig(image_size=side, num_classes=len(train.labels), moe=moe, **sizes))
    half = (0.5, 0.5, 0.5)
    return model, Data(train, val, Preprocessing(side, half, half), recipe.augment, 0, len(train.labels), False)


def tokens_of(recipe: Recipe) -> int:
    """Tokens of an image, class token included."""
    return (recipe.teacher.trained_size // recipe.student.patch_size) ** 2 + 1


if __name__ == "__main__":
    main()
