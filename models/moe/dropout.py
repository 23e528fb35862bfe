"""Dropout inside experts, with masks that do not depend on which rank holds an expert.

The rows of an expert come from every rank of its group, so a mask drawn by the rank that holds it would change with the
ep size. Here every rank draws one number per layer and forward from its own generator, as it draws the routing noise,
and tells it to the group. The mask of a row is then computed from that number, the expert, and the place of the row
among those that its rank sent to the expert, which are the same at every ep size. Recomputing a block (activation
checkpointing) draws the same number again.
P ranks of a group, E experts held here, R rows an expert gets from a rank, W width of what is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 2**32


def draw_number(like: Tensor) -> Tensor:
    """What the masks of one layer and forward depend on, (1,): from the default generator of the device."""
    return torch.randint(WORD, (1,), device=like.device)


@dataclass(frozen=True)
class ExpertDropout:
    """Dropout of the rows of the experts held here, in one forward.

    Attributes:
        rate: share of the values that become 0; the others grow by 1 / (1 - rate).
        number_P: what draw_number gave on each rank of the group.
        first_expert: number, among all experts, of the first one held here.
    """

    rate: float
    number_P: Tensor
    first_expert: int = 0

    def __call__(self, x_ENW: Tensor, site: int) -> Tensor:
        """(E, P x R, W) in and out, the rows of each rank together; `site` tells the places in an expert apart."""
        E, N, W = x_ENW.shape
        P = len(self.number_P)
        drop_ENW = self.mask(E, N // P, W, site).view(E, N, W)
        return x_ENW.masked_fill(drop_ENW, 0) / (1 - self.rate)

    def mask(self, E: int, R: int, W: int, site: int) -> Tensor:
        """True where a value is dropped, (E, P, R, W).

        A value is dropped when (key of its row x key of its column) mod 2^32 lies below rate x 2^32, where the keys are
        odd and change with every forward: multiply-shift hashing (Dietzfelbinger et al. 1997), one product and one
        comparison per value. Two rows, and two columns, drop values independently of each other.
        """
        device = self.number_P.device
        expert_E = torch.arange(self.first_expert, self.first_expert + E, device=device)
        key_P = _mixed(_mixed(self.number_P) + site)
        key_EP = _mixed(key_P + expert_E.unsqueeze(1))
        row_EPR = _mixed(key_EP.unsqueeze(-1) + torch.arange(R, device=device))
        column_PW = _mixed(_mixed(key_P + WORD // 2).unsqueeze(1) + torch.arange(W, device=device))
        # as signed words, which wrap around: -2^31 up to 2^31 - 1 in place of 0 up to 2^32 - 1
        row_EPR1 = _odd_words(row_EPR).unsqueeze(-1)
        column_P1W = _odd_words(column_PW).unsqueeze(1)
        return row_EPR1 * column_P1W < round(self.rate * WORD) - WORD // 2


def _mixed(x: Tensor) -> Tensor:
    """32 bits of int64 values, mixed so that neighbours share nothing (murmur3's finaliser)."""
    x = x % WORD
    x = (x ^ x >> 16) * 0x85EBCA6B % WORD
    x = (x ^ x >> 13) * 0xC2B2AE35 % WORD
    return x ^ x >> 16


def _odd_words(x: Tensor) -> Tensor:
    return (x | 1).to(torch.int32)
