"""A frozen teacher's features of every image, without augmentation, computed once and kept in files.

Each shard covers a fixed run of a split's images and is written whole or not at all, so that a start after a kill, on
any number of ranks, computes what is missing and nothing else. N images, F features of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.data.base import ImageSource
from trainer.data.loader import eval_batches
from trainer.disk import replacing
from trainer.distributed.interrupt import HEARTBEAT, Interrupted, Interruption
from trainer.distributed.ranks import Dist

LARGEST = 4096  # images of a shard
SMALLEST = 32
SHARDS = 64  # of a small split, so that many ranks have work and a kill costs little


@dataclass(frozen=True)
class Features:
    """Of the images of a split that can be read, in their order."""

    features: Tensor  # (N, F) float32
    labels: Tensor  # (N,) int64
    seconds: float  # of all ranks together that they took


def shards(images: int) -> list[range]:
    """Places of the images in each shard: a function of their number alone, not of ranks or batches."""
    size = min(LARGEST, max(SMALLEST, -(-images // SHARDS)))
    return [range(start, min(start + size, images)) for start in range(0, images, size)]


def compute(
    forward: Callable[[Tensor], Tensor],
    source: ImageSource,
    preprocessing: Any,
    folder: Path,
    dist: Dist,
    *,
    dtype: torch.dtype,
    batch: int,
    workers: int,
    description: str,
) -> int:
    """Write the shards that `folder` lacks (collective).

    Args:
        forward: images (B, C, H, W) of `dtype` on the device -> features (B, F).
        batch: images per rank and forward.
        description: in messages, e.g. "probe".

    Returns:
        Images whose features were computed now, on all ranks.

    Raises:
        ValueError: on all ranks, an image cannot be read, or its features are not finite; nothing of them is kept.
        Interrupted: on all ranks, after a warning signal to any of them; whole shards are kept.
    """
    missing = []
    with dist.together():
        if dist.main:
            folder.mkdir(parents=True, exist_ok=True)
            missing = [shard for shard in shards(len(source)) if not _path(folder, shard).is_file()]
    missing = dist.gather(missing)[0]
    mine = missing[dist.rank :: dist.world]
    work = _each_batch(forward, source, preprocessing, folder, mine, dist.device, dtype, batch, workers)
    images = sum(map(len, mine))
    rounds = max(dist.gather(-(-images // batch)))
    interruption = Interruption(dist, 0)
    error = None
    for step in range(rounds):
        try:
            if error is None:
                next(work, None)
        except (ValueError, OSError) as problem:
            error = problem
        HEARTBEAT.beat()
        reason = interruption.agreed(step + 1, failed=error is not None)
        if reason == "warned" and step + 1 < rounds:
            raise Interrupted(
                f"{description}: interrupted, whole shards of features are kept; the same command continues"
            )
        if reason == "failed":
            break
    dist.agree(error)
    return sum(map(len, missing))


def read(source: ImageSource, folder: Path) -> Features:
    """All shards of a split.

    Raises:
        ValueError: a shard is missing or damaged.
    """
    features = []
    labels = []
    seconds = 0.0
    for shard in shards(len(source)):
        path = _path(folder, shard)
        try:
            with safe_open(path, "pt") as file:
                readable = file.get_tensor("readable")
                features.append(file.get_tensor("features")[readable])
                seconds += float(file.metadata()["seconds"])
        except Exception as error:  # safetensors has errors of its own
            raise ValueError(f"{path} cannot be read ({error}): delete it and run --phase probe again") from None
        targets = torch.from_numpy(np.asarray(source.targets[shard.start : shard.stop], dtype=np.int64))
        labels.append(targets[readable])
    return Features(torch.cat(features), torch.cat(labels), seconds)


def _path(folder: Path, shard: range) -> Path:
    return folder / f"{shard.start:08d}-{shard.stop:08d}.safetensors"


@torch.no_grad()
def _each_batch(
    forward: Callable[[Tensor], Tensor],
    source: ImageSource,
    preprocessing: Any,
    folder: Path,
    mine: list[range],
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    workers: int,
) -> Iterator[None]:
    """Compute a rank's shards; every step takes one batch and writes the shards that are whole with it."""
    if not mine:
        return
    places = np.concatenate([np.arange(shard.start, shard.stop) for shard in mine])
    to_write = iter(mine)
    shard = next(to_write)
    begun = time.perf_counter()
    rows: list[Tensor] = []  # features, and in the last column whether the image could be read
    for padded in eval_batches(source.subset(places), preprocessing, batch=batch, workers=workers):
        b = padded.without_padding()
        features = forward(b.images.to(device, dtype)).float().cpu()
        _check(features[b.mask], source, places[b.index[b.mask].numpy()])
        rows.append(torch.cat([features, b.mask[:, None].float()], 1))
        there = torch.cat(rows)
        while shard is not None and len(there) >= len(shard):
            now = time.perf_counter()
            _write(_path(folder, shard), there[: len(shard)], now - begun)
            begun = now
            there = there[len(shard) :]
            shard = next(to_write, None)
        rows = [there]
        yield


def _check(features: Tensor, source: ImageSource, places: np.ndarray) -> None:
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        first = int(places[(~finite).nonzero()[0].item()])
        raise ValueError(
            f"the teacher's features of image {first} of {source.name} are not finite: its weights or the number type "
            "they are computed in (bf16 in the DeepSpeed JSON) do not serve; use other weights, or compute in fp32"
        )


def _write(path: Path, rows: Tensor, seconds: float) -> None:
    tensors = {"features": rows[:, :-1].contiguous(), "readable": rows[:, -1] > 0}
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, {"seconds": str(seconds)})
