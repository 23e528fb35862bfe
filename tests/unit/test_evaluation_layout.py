"""An evaluation is the same at every batch and number of ranks, also where images compete for places of experts."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.moe.layer import MoE, MoEConfig, routed_layers
from models.preprocessing import Preprocessing
from models.vmoe.model import VMoE, VMoEConfig
from trainer.config.data import AugmentConfig, DataConfig
from trainer.data.loader import Data, eval_batches
from trainer.data.sources import DigitsSource
from trainer.distributed.ranks import Dist
from trainer.evaluation import accuracy
from trainer.evaluation.accuracy import Predictor, evaluate, together_in

HALF = (0.5, 0.5, 0.5)
PREPROCESSING = Preprocessing(8, HALF, HALF)


class Counted(Exception):
    """What a rank has counted; the test adds up in the place of the ranks."""


class OneOfMany(Dist):
    def sum(self, values: Tensor) -> Tensor:
        raise Counted(values.clone())


def student(**moe: Any) -> VMoE:
    """With few places in evaluation: about half of the choices are dropped."""
    torch.manual_seed(3)
    moe = {"eval_capacity_factor": 0.5, "capacity_multiple": 1, "batch_priority": True, **moe}
    config = VMoEConfig(
        image_size=8,
        patch_size=4,
        width=16,
        depth=2,
        heads=2,
        mlp_dim=16,
        num_classes=10,
        moe_blocks="all",
        moe=MoEConfig(num_experts=4, **moe),
    )
    model = VMoE(config)
    for layer in model.modules():
        if isinstance(layer, MoE):
            torch.nn.init.normal_(layer.router.weight)
    torch.nn.init.normal_(model.head.weight)
    return model


@functools.cache
def digits(images: int) -> Data:
    source = DigitsSource(DataConfig(limit=images), "val")
    return Data(source, source, PREPROCESSING, AugmentConfig(), 0, 10, False)


def evaluated(model: VMoE, images: int, *, batch: int, world: int = 1, observe: Callable | None = None) -> list[float]:
    """Correct images, mean loss and images over all ranks."""
    totals = torch.zeros(4, dtype=torch.float64)
    for rank in range(world):
        dist = OneOfMany(rank, world, rank, world, torch.device("cpu"))
        with pytest.raises(Counted) as counted:
            evaluate(Predictor(model, model), digits(images), torch.float32, batch, dist, observe=observe)
        totals += counted.value.args[0]
    correct, loss, finite, images = totals.tolist()
    assert finite == images
    return [correct, loss / finite, images]


LAYOUTS = [(world, batch) for world in (1, 2, 3) for batch in (1, 7, 64)]


@pytest.mark.parametrize("images_per_group", [0, 1, 4, 32])
@pytest.mark.parametrize("images", [1, 2, 13])  # one image; fewer than ranks and group; a group that is left incomplete
def test_neither_batch_nor_ranks_change_it(images, images_per_group):
    model = student(images_per_group=images_per_group)
    expected = evaluated(model, images, batch=32)
    assert expected[2] == images
    for world, batch in LAYOUTS:
        correct, loss, seen = evaluated(model, images, batch=batch, world=world)
        assert (correct, seen) == (expected[0], images), f"world {world}, batch {batch}"
        assert loss == pytest.approx(expected[1], rel=1e-6), f"world {world}, batch {batch}"


def test_the_groups_are_those_that_were_asked_for():
    """Else the test above would be true of a model that routes image by image."""
    losses = [evaluated(student(images_per_group=group), 24, batch=24)[1] for group in (1, 4, 24)]
    assert len({round(loss, 4) for loss in losses}) == 3
    # 0, the whole micro-batch, has no meaning in evaluation: every image is routed alone
    assert evaluated(student(images_per_group=0), 24, batch=24)[1] == pytest.approx(losses[0], rel=1e-6)

    model = student(images_per_group=4)
    seen: list[tuple[int, ...]] = []
    layer = model.blocks[0].mlp
    layer.register_forward_hook(lambda _, given, __: seen.append(tuple(given[1]["routing"].slot_GSK.shape)))
    evaluated(model, 10, batch=8, observe=lambda *_: None)
    # 5 tokens and 2 choices: two groups of 4 images, then the 2 that are left over, without padding
    assert seen == [(2, 20, 2), (1, 10, 2)]


def test_padding_takes_no_place_from_an_image():
    """Three images in a batch of 64: black ones beside them, surer than they are, would have had the slots."""
    model = student(images_per_group=0)
    alone = [evaluated(model, 3, batch=1), evaluated(model, 3, batch=64)]
    assert alone[0] == pytest.approx(alone[1], rel=1e-6)


def test_a_batch_larger_than_the_split_takes_no_more_room_than_the_split():
    for group in (1, 4):
        sizes = [
            len(batch.images)
            for batch in eval_batches(digits(6).val, PREPROCESSING, batch=10**12, world=2, rank=1, group=group)
        ]
        assert sizes == {1: [6], 4: [8, 8]}[group]
    model = student(images_per_group=4)
    assert evaluated(model, 6, batch=10**12, world=2) == pytest.approx(evaluated(model, 6, batch=4), rel=1e-6)


def test_unreadable_images_stand_for_themselves_in_their_group(monkeypatch):
    """They are not counted; which images share a group does not change with the batch."""
    original = DigitsSource.try_image
    monkeypatch.setattr(
        DigitsSource, "try_image", lambda self, index: None if index in (3, 9) else original(self, index)
    )
    model = student(images_per_group=4)
    expected = evaluated(model, 14, batch=64)
    assert expected[2] == 12
    for world, batch in LAYOUTS:
        assert evaluated(model, 14, batch=batch, world=world) == pytest.approx(expected, rel=1e-6)


def test_a_batch_that_cuts_groups_is_made_larger_and_that_is_said_once(caplog):
    accuracy._whole_groups.cache_clear()
    model = student(images_per_group=4)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            evaluated(model, 8, batch=7, world=2)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("evaluation takes 8 images per rank and forward in place of 7")
    assert "student.moe.images_per_group=4" in message


def test_without_a_capacity_the_batch_stays_as_it_is():
    assert together_in([student(images_per_group=4, eval_capacity_factor=None)]) == 1
    assert together_in([student(images_per_group=0)]) == 1
    assert together_in([torch.nn.Linear(2, 2)]) == 1
    assert together_in([student(images_per_group=4), student(images_per_group=6)]) == 12  # of frozen modules too
    assert len(routed_layers(student())) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_tell_their_padding(workers):
    source = DigitsSource(DataConfig(limit=5), "val")
    sizes = []
    for rank in range(3):
        for batch in eval_batches(source, PREPROCESSING, batch=4, world=3, rank=rank, workers=workers, group=2):
            short = batch.without_padding()
            assert short.mask.all() or len(short.mask) == 1
            assert len(short.images) == len(short.labels) == len(short.index) == len(short.mask)
            assert batch.padding == 4 - int(batch.mask.sum())
            sizes.append((int(batch.mask.sum()), len(short.mask), short.padding))
    # images 0 to 3 and then image 4 on rank 0; one black image each time on the others
    assert sizes == [(4, 4, 0), (1, 1, 0), (0, 1, 1), (0, 1, 1), (0, 1, 1), (0, 1, 1)]
