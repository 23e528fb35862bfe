"""The exponential moving average of the weights (train.ema): what is evaluated beside the last weights, and published.

It averages the fp32 masters and not the working weights: a step changes a bf16 weight by less than bf16 can add up.
Every rank averages the masters it keeps itself, its experts among them: 4 bytes per trained parameter over all ranks,
and no communication but at an evaluation. Buffers and frozen parameters are those of the last step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainer.distributed import zero_state


class WeightAverage:
    """average <- d average + (1 - d) weights after every optimiser step, d = min(decay, (1 + n) / (10 + n)).

    n counts the steps before it: early on the start would weigh too much (rule of tf.train.ExponentialMovingAverage).

    Args:
        engine: a deepspeed.DeepSpeedEngine with ZeRO 1 or 2; the average starts from its weights.
        decay: 0 to below 1.
    """

    def __init__(self, engine: Any, decay: float):
        self._engine = engine
        self.decay = decay
        self._masters = zero_state.masters(engine)
        self.flats: list[Tensor] = [flat.clone() for flat in self._masters]  # laid out as the masters

    def update(self, number: int) -> None:
        """After a step that changed the weights, `number` of them having been before it."""
        # d = min(decay, (1 + n) / (10 + n))
        decay = min(self.decay, (1 + number) / (10 + number))
        # average <- d average + (1 - d) masters, all groups in one call
        get_ema_multi_avg_fn(decay)(self.flats, self._masters, None)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Masters and working weights are the average inside the block (collective), and bit for bit their own after.

        Not put back after an exception: it may have come on one rank alone, which would wait for the others for ever.
        """
        self._swap()
        yield
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for master, average in zip(self._masters, self.flats):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        zero_state.work_with_masters(self._engine)
