"""What the teacher's side told in the first epochs, kept on disk and read in the later ones, where it does not run.

Those epochs show the same pictures again in the same order, so that a file of a micro-batch serves it as a whole,
whatever mixup made of its images. A file is there whole or not at all; what is missing or damaged is made anew. Of the
numbers nothing is rounded: they are kept in the type they were computed in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trainer import made_of
from trainer.disk import replacing
from trainer.distributed.ranks import Dist
from trainer.objectives.base import Taught, Told

log = logging.getLogger(__name__)
FOLDER = "told"  # in that of the phase


class Lessons:
    """The files of one training, in FOLDER/told; a rank reads what any rank has written there."""

    def __init__(self, folder: Path, steps: int, done: int, dtype: torch.dtype, dist: Dist):
        """Those that this training has left, where it goes on; what is of no use any more is deleted (collective).

        Args:
            folder: the phase's, OUT/PHASE.
            steps: optimiser steps of the epochs that are kept.
            done: optimiser steps done; 0 = the training begins, and whatever is there is of another one.
            dtype: the engine's.
        """
        self.steps = steps
        self.dist = dist
        self.root = folder / FOLDER
        self.folder = self.root / dist.share(_digest(folder, dtype) if dist.main else None)
        with dist.together():
            if dist.main:
                for other in self.root.glob("*"):
                    if other != self.folder or not done:
                        shutil.rmtree(other)
                self.folder.mkdir(parents=True, exist_ok=True)

    def shown(self, step: int) -> int:
        """The step whose pictures are shown in this one, which was the first to show them."""
        return step % self.steps

    def told(self, objective: Taught, images: Tensor, shown: int, place: int) -> Told:
        """What the frozen side tells of these images: read where it is there, else made and kept.

        Args:
            images: (B, C, H, W), the same as in every step that shows them.
            shown: the first of these steps.
            place: of the micro-batch in the step.

        Raises:
            OSError: it cannot be written; says what to do.
        """
        path = self.folder / f"{shown:08d}_{place:05d}_{len(images)}.safetensors"
        told = _read(path, images.device)
        if told is not None:
            return told
        told = objective.tell(images)
        try:
            _write(path, told)
        except OSError as error:
            raise OSError(
                f"what the teacher told cannot be kept in {self.root}: {error.strerror or error}. Make room and start "
                "the same command again, or do without (stored_epochs=0 and another --out); --dry-run tells the size"
            ) from error
        return told

    def close(self) -> None:
        """Delete everything, once training is complete (collective)."""
        self.dist.barrier()
        if self.dist.main:
            shutil.rmtree(self.root, ignore_errors=True)


def _digest(folder: Path, dtype: torch.dtype) -> str:
    """Of what the files depend on beside the recipe: run.accept lets a training go on with another teacher."""
    record = made_of.read(folder)
    record.pop("accepted", None)
    text = json.dumps([record, str(dtype)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(path: Path, told: Told) -> None:
    """Each tensor once: in a meta model that is the teacher several names may share one."""
    places: dict[int, str] = {}
    names = {name: places.setdefault(id(tensor), str(len(places))) for name, tensor in told.items()}
    tensors = {names[name]: tensor.cpu().contiguous() for name, tensor in told.items()}
    with replacing(path) as unfinished:
        # not save_file, whose errors do not say that a disk is full
        unfinished.write_bytes(save(tensors, {"names": json.dumps(names)}))


def _read(path: Path, device: torch.device) -> Told | None:
    """None where there is no such file, or a damaged one."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            names = json.loads(file.metadata()["names"])
            tensors = {key: file.get_tensor(key).to(device) for key in set(names.values())}
        return {name: tensors[key] for name, key in names.items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): the teacher is asked again", path, error)
        return None
