"""The shared basis of the module borders: measured on the trained meta model, kept as OUT/meta/basis.safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from models.modules.basis import Basis, from_tensors, shared_bases, to_tensors
from models.modules.meta import MetaModel
from trainer.data.loader import eval_batches
from trainer.disk import replacing
from trainer.distributed.interrupt import HEARTBEAT
from trainer.distributed.ranks import Dist
from trainer.loop.fit import Data

FILE = "basis.safetensors"
IMAGES = 2000  # of the training set, spread evenly over it


def measure(meta: MetaModel, data: Data, dtype: torch.dtype, batch: int, dist: Dist) -> list[Basis]:
    """Principal components of the meta model's hidden state at its N-1 borders (collective).

    Over the tokens of IMAGES training images without augmentation; float64 sums, shared out over the ranks.
    """
    borders = meta.num_modules - 1
    if not borders:  # a single module
        return []
    width = meta.stages[0].embed_dim
    # per border the sums of (1, h)(1, h)^T: number, sum and products of the states h in one matrix
    sums = torch.zeros(borders, width + 1, width + 1, dtype=torch.float64, device=dist.device)
    batches = eval_batches(
        data.train.spread(IMAGES),
        data.preprocessing,
        batch=batch,
        world=dist.world,
        rank=dist.rank,
        workers=data.workers,
    )
    mode = meta.training
    meta.eval()
    with torch.no_grad():
        for b in batches:
            HEARTBEAT.beat()
            *states, _logits = meta.hidden_states(b.images.to(dist.device, dtype))
            real_B = b.mask.to(dist.device)
            for border, state_BTD in enumerate(states):
                state_ND = state_BTD[real_B].flatten(0, 1).double()
                with_one = torch.cat([state_ND.new_ones(len(state_ND), 1), state_ND], 1)
                sums[border] += with_one.T @ with_one
    meta.train(mode)
    sums = dist.sum(sums).cpu()
    return shared_bases([(s[0, 0], s[0, 1:], s[1:, 1:]) for s in sums])


def save(folder: Path, bases: list[Basis]) -> None:
    """Write them into the folder of the meta model."""
    if not bases:  # a single module has no border
        return
    with replacing(folder / FILE) as unfinished:
        save_file(to_tensors(bases), unfinished)


def load(folder: Path, borders: int, width: int) -> list[Basis]:
    """Read them.

    Raises:
        ValueError: missing (a meta model of an older version), or another shape.
    """
    path = folder / FILE
    if not borders:
        return []
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: the meta model was made without it. Set distill.stitches=linear and "
            "train.border_weight=0, or make the meta model again in another --out"
        )
    try:
        return from_tensors(load_file(path), borders, width)
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{path} does not fit: {error}. Delete {folder} and run --phase meta again") from None
