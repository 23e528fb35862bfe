"""The sampler's arithmetic, worked by hand on a few images."""

from collections import Counter

import numpy as np
import pytest

from trainer.data.sampler import epoch_plan, eval_requests, train_requests


def requests(n=29, *, world=1, rank=0, micro_batch=2, accumulation=1, epoch=3, start_step=0, epochs=1, repeats=1):
    sizes = {"world": world, "rank": rank, "micro_batch": micro_batch, "accumulation": accumulation}
    rows = train_requests(n, seed=7, epoch=epoch, start_step=start_step, epochs=epochs, repeats=repeats, **sizes)
    return [(index.tolist(), seeds.tolist()) for index, seeds in rows]


def test_rank_and_micro_step_slices_by_hand():
    order = epoch_plan(29, repeats=1, seed=7, epoch=3)[0].tolist()
    # G = 2 ranks x 3 images x 2 micro-steps = 12: two steps, 5 images left out.
    # Rank 1 takes slices (a * 2 + 1) of 3: images 3..5 and 9..11 of step 0, and 12 later in step 1.
    got = [index for index, _ in requests(world=2, rank=1, micro_batch=3, accumulation=2)]
    assert got == [order[3:6], order[9:12], order[15:18], order[21:24]]


def test_an_epoch_is_a_permutation_that_changes_with_seed_and_epoch():
    plans = {key: epoch_plan(50, repeats=1, seed=key[0], epoch=key[1]) for key in ((0, 0), (0, 1), (1, 0))}
    for order, seeds in plans.values():
        assert sorted(order.tolist()) == list(range(50))
        assert len(set(seeds.tolist())) == 50
    assert len({tuple(order) for order, _ in plans.values()}) == 3
    assert len({tuple(seeds) for _, seeds in plans.values()}) == 3


def test_the_stream_is_frozen():
    # a resumed run depends on these numbers: they may not change with a release of numpy or of this code
    order, seeds = epoch_plan(6, repeats=1, seed=0, epoch=0)
    assert (order.tolist(), seeds[:2].tolist()) == ([5, 0, 3, 2, 1, 4], [1510044700, 2342423583])


@pytest.mark.parametrize(
    ("world", "micro_batch", "accumulation"), [(2, 4, 1), (4, 2, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8)]
)
def test_steps_hold_the_same_images_and_seeds_however_they_are_divided(world, micro_batch, accumulation):
    whole = requests(micro_batch=8)
    ranks = [
        requests(world=world, rank=rank, micro_batch=micro_batch, accumulation=accumulation) for rank in range(world)
    ]
    for step, (index, seeds) in enumerate(whole):
        parts = [ranks[r][step * accumulation + a] for a in range(accumulation) for r in range(world)]
        assert [i for part in parts for i in part[0]] == index
        assert [s for part in parts for s in part[1]] == seeds


def test_resume_and_several_epochs_continue_exactly():
    sizes = {"micro_batch": 3, "accumulation": 2}  # G = 6, 4 steps an epoch
    full = [row for epoch in (3, 4, 5) for row in requests(epoch=epoch, **sizes)]
    assert requests(epoch=3, epochs=3, **sizes) == full
    assert requests(epoch=4, start_step=3, epochs=2, **sizes) == full[(4 + 3) * 2 :]
    assert requests(epoch=3, start_step=4, **sizes) == []


def test_repeated_augmentation():
    order, seeds = epoch_plan(8, repeats=3, seed=0, epoch=0)
    # 8 places, 3 of each image next to each other: 3 + 3 + 2
    assert [len(list(run)) for run in np.split(order, [3, 6])] == [3, 3, 2]
    assert len(set(order[:3])) == len(set(order[3:6])) == len(set(order[6:])) == 1
    assert len(set(order)) == 3
    assert len(set(seeds)) == 8  # each copy has its own draws


@pytest.mark.parametrize("n", [1, 7, 16, 17])
@pytest.mark.parametrize(("batch", "world"), [(1, 1), (4, 1), (4, 2), (3, 4), (32, 2)])
def test_evaluation_sees_every_image_once(n, batch, world):
    ranks = [list(eval_requests(n, batch=batch, world=world, rank=rank)) for rank in range(world)]
    assert {len(rows) for rows in ranks} == {-(-n // (batch * world))}
    assert max(len(index) for rows in ranks for index in rows) <= batch
    seen = Counter(index for rows in ranks for part in rows for index in part.tolist())
    assert seen == Counter(range(n))
