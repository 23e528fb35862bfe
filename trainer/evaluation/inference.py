"""What a sparse student is worth in use: images per second and accuracy with 1, 2 and 4 experts per token, in one run
with its dense teacher and with a dense ViT of as many FLOPs per image.

The models take turns, so that a machine that slows down slows down all of them. A row whose accuracy nobody has
measured says None: the dense ViT of equal FLOPs is not trained.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.flops import forward_flops, num_tokens
from models.moe.layer import routed_layers
from trainer.data.loader import Data, eval_batches
from trainer.distributed.interrupt import HEARTBEAT
from trainer.distributed.main_rank import on_main
from trainer.distributed.ranks import Dist
from trainer.evaluation.accuracy import Predictor, evaluate

EXPERTS_PER_TOKEN = (1, 2, 4)
REPEATS = 7  # timed forwards of every model, after one that is not; their median counts


@dataclass(frozen=True)
class Candidate:
    """A model of the table.

    Attributes:
        k: experts per token, set before each of its forwards; 0 = it has none.
        accuracy: None = not measured.
    """

    name: str
    model: nn.Module
    k: int = 0
    accuracy: float | None = None


def inference(
    student: nn.Module,
    dense: Sequence[Candidate],
    accuracy: float,
    data: Data,
    dtype: torch.dtype,
    batch: int,
    dist: Dist,
) -> dict[str, Any] | None:
    """The table, on rank 0; None on the others (collective). The student is left as it was.

    Args:
        student: with MoE layers and `set_k`; on the device and in `dtype`, in evaluation mode.
        dense: models to time beside it, on rank 0; they are moved.
        accuracy: the student's as it was trained.
        batch: images per rank and forward.
    """
    config = next(iter(routed_layers(student).values())).config
    candidates = []
    for k in sorted({*EXPERTS_PER_TOKEN, config.k}):
        if k > config.num_experts:
            continue
        name = f"student, k = {k}"
        measured = accuracy
        if k == config.k:
            name += " (trained)"
        else:
            student.set_k(k)
            measured = evaluate(Predictor(student, student), data, dtype, batch, dist)["accuracy"]
        candidates.append(Candidate(name, student, k, measured))
    student.set_k(config.k)

    def timed() -> dict[str, Any]:
        for candidate in dense:
            candidate.model.to(dist.device, dtype).eval()
        images = _images(data, batch).to(dist.device, dtype)
        return _table([*candidates, *dense], images)

    table = on_main(dist, timed)
    student.set_k(config.k)
    return table


def _table(candidates: Sequence[Candidate], images: Tensor) -> dict[str, Any]:
    rows = []
    for candidate, rate in zip(candidates, speeds(candidates, images)):
        _prepare(candidate)
        row = {
            "name": candidate.name,
            "images_per_second": rate,
            "accuracy": candidate.accuracy,
            "flops": forward_flops(candidate.model, num_tokens(candidate.model)),
            "parameters": sum(parameter.numel() for parameter in candidate.model.parameters()),
        }
        rows.append(row)
    threads = torch.get_num_threads()
    where = f"{threads} thread{'s' * (threads > 1)} of a CPU"
    if images.is_cuda:
        where = f"one {torch.cuda.get_device_name(images.device)}"
    dtype = str(images.dtype).removeprefix("torch.")
    return {"rows": rows, "batch": len(images), "dtype": dtype, "repeats": REPEATS, "where": where}


@torch.no_grad()
def speeds(candidates: Sequence[Candidate], images: Tensor) -> list[float]:
    """Images per second of each, in forwards that take turns."""
    seconds: list[list[float]] = [[] for _ in candidates]
    for _ in range(1 + REPEATS):
        for candidate, of_candidate in zip(candidates, seconds):
            HEARTBEAT.beat()
            _prepare(candidate)
            started = time.perf_counter()
            candidate.model(images).float().cpu()  # waits for the device
            of_candidate.append(time.perf_counter() - started)
    # the first one of each chooses kernels and takes memory
    return [len(images) / statistics.median(of_candidate[1:]) for of_candidate in seconds]


def _prepare(candidate: Candidate) -> None:
    if candidate.k:
        candidate.model.set_k(candidate.k)


def _images(data: Data, batch: int) -> Tensor:
    """The first images of the validation split, (B, C, H, W)."""
    batches = eval_batches(data.val, data.preprocessing, batch=batch, workers=0)
    return next(iter(batches)).without_padding().images
