"""Which images make up a micro-batch, as pure functions of (seed, epoch, step): nothing to save, nothing to restore.

`seed` is that of a phase (phase_seed), so no two phases show the same pictures in the same order.
Optimiser step s of an epoch takes images order[s * G : (s + 1) * G] of the epoch's order, G = world x micro-batch x
accumulation; its micro-step a on rank r takes slice (a * world + r) of them. So a step sees the same images with the
same draws however G is divided, and a resumed run continues with the very next image.
"""

import zlib
from collections.abc import Iterator

import numpy as np

# (indices into the source, one seed per image for the draws of its transform)
TrainRequest = tuple[np.ndarray, np.ndarray]


def phase_seed(seed: int, phase: str) -> int:
    """The seed of all that a phase draws while it trains: order, transforms, mixup, dropout, routing noise; 64 bits.

    It depends on the recipe's seed and on the name of the phase (teacher, meta, distill, ...) alone, not on the module
    nor on where end-to-end training starts: modules are shown the same pictures whether they are taught together or
    alone, and the starts that are compared (train, train_scratch, ...) differ in their start only. Epoch e of one phase
    and epoch e of another have nothing in common; with one stream for all the student would meet, image by image, the
    very crops its teacher was fitted to.
    """
    # crc32, not hash(), which is another one in every process
    words = np.random.SeedSequence([seed, zlib.crc32(phase.encode())]).generate_state(2)
    return int(words[0]) << 32 | int(words[1])


def epoch_plan(n: int, *, repeats: int, seed: int, epoch: int) -> TrainRequest:
    """The order of an epoch: n indices, and n seeds that depend on (seed, epoch, position) only.

    repeats > 1 is repeated augmentation (Hoffer et al. 2020): every index stands `repeats` times in a row, each time
    with its own draws. The epoch keeps its length, so it shows ceil(n / repeats) different images. Unlike timm's
    RepeatAugSampler, nothing is cut to a multiple of 256, and copies stand in one micro-batch, not on several ranks.
    """
    # RandomState, not Generator: numpy promises that its streams never change, so a run can resume after an upgrade
    rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
    order = np.repeat(rng.permutation(n), repeats)[:n]
    return order, rng.randint(0, 2**32, size=n, dtype=np.uint32)


def train_requests(
    n: int,
    *,
    seed: int,
    epoch: int,
    start_step: int,
    epochs: int,
    micro_batch: int,
    accumulation: int,
    world: int,
    rank: int,
    repeats: int,
    cycle: int = 0,
) -> Iterator[TrainRequest]:
    """Micro-batches of one rank from (epoch, start_step) through `epochs` epochs; the last n % G images drop out.

    Args:
        cycle: epochs after which the first one comes again, in the same order with the same draws; 0 = none does.
    """
    step_size = world * micro_batch * accumulation
    for number in range(epoch, epoch + epochs):
        order, seeds = epoch_plan(n, repeats=repeats, seed=seed, epoch=number % cycle if cycle else number)
        first_step = start_step if number == epoch else 0
        for step in range(first_step, n // step_size):
            for micro_step in range(accumulation):
                begin = step * step_size + (micro_step * world + rank) * micro_batch
                yield order[begin : begin + micro_batch], seeds[begin : begin + micro_batch]


def eval_requests(n: int, *, batch: int, world: int, rank: int, group: int = 1) -> Iterator[np.ndarray]:
    """Indices of one rank's batches: every image on exactly one rank, and as many batches on each.

    The last batches are shorter, down to empty; the loader fills them up.

    Args:
        group: images that are routed together, which divides `batch`. Groups are the first `group` images, the next
            ones, and so on, whatever the batches and the ranks are. Images left over have a batch of their own, on rank
            0: beside whole groups the model would cut others.
    """
    assert batch % group == 0, "a batch holds whole groups"
    in_groups = n - n % group
    for begin in range(0, in_groups, world * batch):
        first = begin + rank * batch
        yield np.arange(min(first, in_groups), min(first + batch, in_groups))
    if in_groups < n:
        yield np.arange(in_groups, n if rank == 0 else in_groups)
