"""What a model gives of every image of a split, computed once: the same to the last bit on any ranks and at any batch.

A forward is always made of the same images: FORWARD of them, the first ones of the split, the next ones and so on. What
a batch or a rank takes is whole forwards. (In other batches the products of matrices may round otherwise in their last
bit, and where experts have a capacity other images would compete.) N images, F numbers of each.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.files.places import expanded
from trainer.config.data import DataConfig
from trainer.data.base import ImageSource
from trainer.data.fingerprint import fingerprint
from trainer.data.loader import Change, eval_batches
from trainer.disk import replacing
from trainer.distributed.interrupt import HEARTBEAT
from trainer.distributed.ranks import Dist
from trainer.evaluation.accuracy import together_in
from trainer.judge.subjects import Subject

log = logging.getLogger(__name__)
FORWARD = 32  # images


@dataclass(frozen=True)
class Outputs:
    """Of the images that can be read, in the order of their split."""

    values: np.ndarray  # (N, F) float32: logits or features
    targets: np.ndarray  # (N,) int64, numbers of the data's classes
    index: np.ndarray  # (N,) int64, places in the split


@dataclass
class Bench:
    """What every evaluation of one command shares.

    Attributes:
        data: the images of an evaluation that names none.
        batch: images of a rank that are loaded at a time; rounded up to whole forwards. It has no say in any number.
        resamples: of the bootstrap.
        cache: folder for features; None = they are kept in memory alone.
    """

    dist: Dist
    data: DataConfig = field(default_factory=DataConfig)
    dtype: torch.dtype = torch.float32
    batch: int = FORWARD
    workers: int = 0
    seed: int = 0
    resamples: int = 1000
    cache: Path | None = None
    _kept: dict[str, Any] = field(default_factory=dict)

    def logits(self, subject: Subject, source: ImageSource, change: Change | None = None) -> Outputs:
        """Logits of every image (collective); those of the images as they are, are kept."""
        if change is not None:
            return self._computed(subject, subject.model, source, change)
        key = self._key("logits", subject, source)
        if key not in self._kept:
            self._kept[key] = self._computed(subject, subject.model, source)
        return self._kept[key]

    def features(self, subject: Subject, source: ImageSource) -> Outputs:
        """Features of every image (collective): of this command, of one before it, or computed now and kept.

        Raises:
            ValueError: they are not finite.
        """
        key = self._key("features", subject, source)
        if key not in self._kept:
            outputs = self._read(key)
            if outputs is None:
                outputs = self._computed(subject, subject.features, source)
                broken = int((~np.isfinite(outputs.values).all(axis=1)).sum())
                if broken:
                    raise ValueError(
                        f"the features of {subject.name} are not finite on {broken} of {len(outputs.values)} images of "
                        f"{source.name}: check its weights, or judge it without --bf16"
                    )
                self._write(key, outputs)
            self._kept[key] = outputs
        return self._kept[key]

    def _key(self, what: str, subject: Subject, source: ImageSource) -> str:
        about = [what, subject.fingerprint, fingerprint(source), str(self.dtype), self.dist.device.type, FORWARD]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]

    def _read(self, key: str) -> Outputs | None:
        """Rank 0 tells the others what it found, so that all of them compute or none does."""
        path = self._path(key)
        outputs = None
        if self.dist.main and path is not None and path.is_file():
            with np.load(path) as arrays:
                outputs = Outputs(arrays["values"], arrays["targets"], arrays["index"])
            log.info("features taken from %s", path)
        return self.dist.gather(outputs)[0]

    def _write(self, key: str, outputs: Outputs) -> None:
        path = self._path(key)
        if path is None:
            return
        with self.dist.together():
            if self.dist.main:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as unfinished, unfinished.open("wb") as file:
                    np.savez(file, values=outputs.values, targets=outputs.targets, index=outputs.index)

    def _path(self, key: str) -> Path | None:
        return None if self.cache is None else self.cache / f"{key}.npz"

    @torch.no_grad()
    def _computed(
        self,
        subject: Subject,
        forward: Callable[[Tensor], Tensor],
        source: ImageSource,
        change: Change | None = None,
    ) -> Outputs:
        group = together_in([subject.model])
        piece = math.lcm(FORWARD, group)
        batches = eval_batches(
            source,
            subject.preprocessing,
            batch=math.ceil(self.batch / piece) * piece,
            world=self.dist.world,
            rank=self.dist.rank,
            workers=self.workers,
            group=piece,
            change=change,
        )
        subject.model.to(self.dist.device, self.dtype)
        numbers = [np.zeros(0, dtype=np.int64)]
        values = []
        for batch in batches:
            HEARTBEAT.beat()
            images = len(batch.mask) - batch.padding
            given = [forward(part) for part in self._forwards(batch.images[:images], piece, group)]
            if given:
                mask = batch.mask[:images].numpy()
                values.append(torch.cat(given).float().cpu().numpy()[mask])
                numbers.append(batch.index[:images].numpy()[mask])
        mine = np.concatenate(numbers), np.concatenate(values) if values else None
        gathered = [part for part in self.dist.gather(mine) if part[1] is not None]
        index = np.concatenate([numbers for numbers, _ in gathered])
        if not len(index):
            raise ValueError(f"none of the {len(source)} images of {source.name} can be read")
        order = np.argsort(index, kind="stable")
        index = index[order]
        assert len(np.unique(index)) == len(index), "an image was counted twice"
        return Outputs(np.concatenate([values for _, values in gathered])[order], source.targets[index], index)

    def _forwards(self, images: Tensor, piece: int, group: int) -> Iterator[Tensor]:
        """Images of each forward on the device: whole pieces, then whole groups, then what is left of a group."""
        images = images.to(self.dtype)
        whole = len(images) // piece * piece
        rest = len(images) - whole
        parts = [*images[:whole].split(piece)] if whole else []
        grouped = whole + rest // group * group
        parts += [images[whole:grouped], images[grouped:]]
        for part in parts:
            if len(part):
                yield part.to(self.dist.device)


def cache_folder() -> Path:
    """Where features are kept, as procedural images are: M2MKD_CACHE, or ~/.cache/m2mkd."""
    return Path(expanded(os.environ.get("M2MKD_CACHE") or "~/.cache/m2mkd")) / "features"
