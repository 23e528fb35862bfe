"""Dropout inside experts, with masks that do not depend on which rank holds an expert.

The rows of an expert come from every rank of its group, so a mask drawn by the rank that holds it would change with the
ep size. Here every rank draws one number per layer and forward from its own generator, as it draws the routing noise,
and tells it to the group. The mask of a row is then computed from that number, the expert, and the place of the row
among those that its rank sent to the expert, which are the same at every ep size. Recomputing a block (activation
checkpointing) draws the same number again.
P ranks of a group, R rows, W width of what is dropped.
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
        expert_R: of each row, the number of its expert among all.
        place_R: its place among the rows that its rank sent to the expert.
        rank_R: that rank, by its place in the group; None where there is one.
    """

    rate: float
    number_P: Tensor
    expert_R: Tensor
    place_R: Tensor
    rank_R: Tensor | None = None

    def __call__(self, x_RW: Tensor, site: int) -> Tensor:
        """All rows, dropped; `site` tells the places in an expert apart."""
        drop_RW = self.mask(0, len(x_RW), x_RW.shape[1], site)
        return x_RW.masked_fill(drop_RW, 0) / (1 - self.rate)

    def drop_(self, x_CW: Tensor, start: int, stop: int, site: int) -> None:
        """The same for rows start to stop alone, in place."""
        drop_CW = self.mask(start, stop, x_CW.shape[1], site)
        x_CW.masked_fill_(drop_CW, 0).div_(1 - self.rate)

    def mask(self, start: int, stop: int, width: int, site: int) -> Tensor:
        """True where a value of rows start to stop is dropped, (stop - start, W).

        A value is dropped when (key of its row x key of its column) mod 2^32 lies below rate x 2^32, where the keys are
        odd and change with every forward: multiply-shift hashing (Dietzfelbinger et al. 1997), one product and one
        comparison per value. Two rows, and two columns, drop values independently of each other.
        """
        key_P = _mixed(_mixed(self.number_P) + site)
        columns_W = torch.arange(width, device=key_P.device)
        column_PW = _mixed(_mixed(key_P + WORD // 2).unsqueeze(1) + columns_W)
        # as signed words, which wrap around: -2^31 up to 2^31 - 1 in place of 0 up to 2^32 - 1
        column_PW = _odd_words(column_PW)
        key_R = key_P
        if self.rank_R is not None:
            rank_R = self.rank_R[start:stop]
            key_R = key_P[rank_R]
            column_PW = column_PW[rank_R]
        row_R = _mixed(_mixed(key_R + self.expert_R[start:stop]) + self.place_R[start:stop])
        return _odd_words(row_R).unsqueeze(-1) * column_PW < round(self.rate * WORD) - WORD // 2


def _mixed(x: Tensor) -> Tensor:
    """32 bits of int64 values, mixed so that neighbours share nothing (murmur3's finaliser)."""
    x = x % WORD
    x = (x ^ x >> 16) * 0x85EBCA6B % WORD
    x = (x ^ x >> 13) * 0xC2B2AE35 % WORD
    return x ^ x >> 16


def _odd_words(x: Tensor) -> Tensor:
    return (x | 1).to(torch.int32)
