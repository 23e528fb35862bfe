"""What a student is worth in use: images per second and accuracy of the forms it can be used in (of a V-MoE numbers of
experts per token, of a NAC shares of its mediators), in one run with its dense teacher and its family's rivals.

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
from models.forms import StudentForm
from trainer.data.loader import Data, eval_batches
from trainer.distributed.interrupt import HEARTBEAT
from trainer.distributed.main_rank import on_main
from trainer.distributed.ranks import Dist
from trainer.evaluation.accuracy import Predictor, evaluate

REPEATS = 7  # timed forwards of every model, after one that is not; their median counts


@dataclass(frozen=True)
class Candidate:
    """A model of the table.

    Attributes:
        form: of the student; None = another model.
        accuracy: None = not measured.
    """

    name: str
    model: nn.Module
    form: StudentForm | None = None
    accuracy: float | None = None

    def prepare(self) -> None:
        """Before its forwards, where those of another candidate may have come between."""
        if self.form:
            self.form.prepare()


def measured(
    forms: Sequence[StudentForm], accuracy: float, data: Data, dtype: torch.dtype, batch: int, dist: Dist
) -> list[Candidate]:
    """The student's forms with their accuracies (collective). It is left in the one it was trained in.

    Args:
        forms: on the device and in `dtype`, in evaluation mode.
        accuracy: of the trained one.
        batch: images per rank and forward.
    """
    candidates = []
    for form in forms:
        name = f"student, {form.name}"
        if form.trained:
            candidates.append(Candidate(f"{name} (trained)", form.model, form, accuracy))
            continue
        form.prepare()
        found = evaluate(Predictor(form.model, form.model), data, dtype, batch, dist)
        candidates.append(Candidate(name, form.model, form, found["accuracy"]))
    _as_trained(candidates)
    return candidates


def inference(
    forms: Sequence[Candidate], others: Sequence[Candidate], data: Data, dtype: torch.dtype, batch: int, dist: Dist
) -> dict[str, Any] | None:
    """The table, on rank 0; None on the others (collective). The student is left as it was trained.

    Args:
        forms: what `measured` gave.
        others: models to time beside it, on rank 0; they are moved.
        batch: images per forward.
    """

    def timed() -> dict[str, Any]:
        for candidate in others:
            candidate.model.to(dist.device, dtype).eval()
        images = _images(data, batch).to(dist.device, dtype)
        return _table([*forms, *others], images)

    table = on_main(dist, timed)
    _as_trained(forms)
    return table


def _as_trained(forms: Sequence[Candidate]) -> None:
    for candidate in forms:
        if candidate.form and candidate.form.trained:
            candidate.prepare()


def _table(candidates: Sequence[Candidate], images: Tensor) -> dict[str, Any]:
    rows = []
    for candidate, rate in zip(candidates, speeds(candidates, images)):
        candidate.prepare()
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
            candidate.prepare()
            started = time.perf_counter()
            candidate.model(images).float().cpu()  # waits for the device
            of_candidate.append(time.perf_counter() - started)
    # the first one of each chooses kernels and takes memory
    return [len(images) / statistics.median(of_candidate[1:]) for of_candidate in seconds]


def _images(data: Data, batch: int) -> Tensor:
    """The first images of the validation split, (B, C, H, W)."""
    batches = eval_batches(data.val, data.preprocessing, batch=batch, workers=0)
    return next(iter(batches)).without_padding().images
