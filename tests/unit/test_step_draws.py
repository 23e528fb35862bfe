"""What a step draws: every micro-batch its own noise and mixing, the same however ranks and accumulation cut it."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.preprocessing import Preprocessing
from trainer.config.data import AugmentConfig, DataConfig
from trainer.config.runtime import RunConfig
from trainer.data.loader import Batch, Data
from trainer.data.sources import DigitsSource
from trainer.distributed.ranks import Dist, seed_draws
from trainer.loop.step import Task, TrainStep

PLACES = 4  # micro-batches of an optimiser step, over all ranks
HALF = (0.5, 0.5, 0.5)


class Recorder:
    """An objective that learns nothing and keeps what it was given and what it drew."""

    def __init__(self) -> None:
        self.frozen = []
        self.module = torch.nn.Linear(1, 1)
        self.draws = []  # (python's, numpy's and torch's next number), per micro-batch
        self.mixed = []  # (images, targets) after mixup, per micro-batch

    def __call__(self, engine, images, target, progress, out):
        self.draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        self.mixed.append((images.clone(), target.clone()))
        return self.module.weight.sum(), {}


def recorded(world: int, rank: int, done: int, seed: int = 3) -> Recorder:
    """What one rank sees in the step after `done`. All micro-batches have the same images: only the mixing differs."""
    source = DigitsSource(DataConfig(limit=8), "train")
    augment = AugmentConfig(mixup=0.8)  # cutmix of so small images has few different boxes
    data = Data(source, source, Preprocessing(8, HALF, HALF), augment, 0, 10, False)
    task = Task("train", "train", epochs=1, seed=seed, run=RunConfig())
    engine = SimpleNamespace(
        dtype=torch.float32,
        backward=lambda loss: None,
        step=lambda done: None,
        deepspeed=SimpleNamespace(was_step_applied=lambda: True),
    )
    recorder = Recorder()
    step = TrainStep(engine, recorder, data, task, Dist(rank, world, rank, world, torch.device("cpu")))
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = []
    for _ in range(PLACES // world):
        batches.append(Batch(images.clone(), torch.arange(4), torch.ones(4, dtype=torch.bool), torch.arange(4)))
    step.run(done, batches, total=10, row_due=False)
    return recorder


def by_place(world: int, done: int) -> Recorder:
    """The micro-batches of all ranks in the order of their places: the first of every rank, then the second."""
    ranks = [recorded(world, rank, done) for rank in range(world)]
    ordered = Recorder()
    for part in range(PLACES // world):
        for rank in ranks:
            ordered.draws.append(rank.draws[part])
            ordered.mixed.append(rank.mixed[part])
    return ordered


def test_no_two_micro_batches_draw_the_same_noise():
    draws = by_place(2, done=0).draws + by_place(2, done=1).draws
    for kind in range(3):
        assert len({draw[kind] for draw in draws}) == 2 * PLACES


def test_no_two_micro_batches_are_mixed_alike():
    mixed = by_place(2, done=0).mixed + by_place(2, done=1).mixed
    for number, (images, targets) in enumerate(mixed):
        for other_images, other_targets in mixed[:number]:
            assert not torch.equal(images, other_images)
            assert not torch.equal(targets, other_targets)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_instead_of_accumulation_draw_and_mix_the_same(world):
    alone = by_place(1, done=5)
    together = by_place(world, done=5)
    assert together.draws == alone.draws
    for (images, targets), (own_images, own_targets) in zip(together.mixed, alone.mixed, strict=True):
        assert torch.equal(images, own_images)
        assert torch.equal(targets, own_targets)


@pytest.mark.parametrize("changed", [(1, 2, 3), (0, 3, 3), (0, 2, 4)], ids=["seed", "step", "place"])
def test_noise_depends_on_seed_step_and_place(changed):
    draws = []
    for arguments in ((0, 2, 3), (0, 2, 3), changed):
        seed_draws(*arguments)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]
    for first, other in zip(draws[0], draws[2], strict=True):
        assert first != other
