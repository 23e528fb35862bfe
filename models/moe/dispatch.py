"""Which row of which expert every choice takes: all experts' rows behind each other, and none for what was dropped.

The queues of all groups are lined up behind each other, so an expert has as many rows as choices that it keeps,
whatever the groups are. G groups of S tokens, N = G * S, K choices of a token, E experts, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import Routing


@dataclass(frozen=True)
class Dispatch:
    """The rows of expert 0, then those of expert 1, ...

    Attributes:
        token_R: the token that stands in each row; rows that only fill up read the last token.
        choice_R: the choice n * K + k that each row belongs to, N * K for rows that only fill up.
        row_NK: the row of every choice, R where it was dropped.
        end_E: one past the last row of each expert.
        multiple: what the rows of each expert are filled up to a multiple of.
    """

    token_R: Tensor
    choice_R: Tensor
    row_NK: Tensor
    end_E: Tensor
    multiple: int = 1

    @property
    def expert_R(self) -> Tensor:
        """The expert of each row."""
        return torch.searchsorted(self.end_E, self._rows, right=True)

    @property
    def place_R(self) -> Tensor:
        """How many rows of the same expert stand before each row."""
        return self._rows - first_rows(self.end_E)[self.expert_R]

    @property
    def expert_B(self) -> Tensor:
        """The expert of each block of `multiple` rows."""
        blocks = torch.arange(len(self.token_R) // self.multiple, device=self.end_E.device)
        return torch.searchsorted(self.end_E // self.multiple, blocks, right=True)

    @property
    def _rows(self) -> Tensor:
        return torch.arange(len(self.token_R), device=self.end_E.device)

    def of_rows(self, weight_NK: Tensor) -> Tensor:
        """The combine weight of each row, (R,): 0 for rows that only fill up."""
        return F.pad(weight_NK.flatten(), (0, 1)).index_select(0, self.choice_R)


def dispatch(routing: Routing, slots: int | None, multiple: int = 1, rows: int | None = None) -> Dispatch:
    """Give every kept choice its row.

    Args:
        slots: places an expert has for each group; None = as many as are asked for.
        multiple: see Dispatch.
        rows: R; rows beyond what is needed go to the last expert. None: as many as are needed, which waits for the
            device.
    """
    expert_GSK = routing.expert_GSK
    G, S, K = expert_GSK.shape
    kept_GE = kept_choices(routing, slots)
    end_E, R = _ends(kept_GE.sum(0), multiple, rows)
    # row = first row of the expert + what earlier groups sent to it + slot in the queue of this group
    before_GE = first_rows(end_E) + kept_GE.cumsum(0) - kept_GE
    row_GSK = before_GE.gather(1, expert_GSK.reshape(G, S * K)).view(G, S, K) + routing.slot_GSK
    if slots is not None:
        row_GSK = row_GSK.where(routing.slot_GSK >= 0, R)
    return _dispatch(row_GSK.reshape(G * S, K), end_E, R, multiple)


def by_expert(expert_N: Tensor, num_experts: int, multiple: int = 1, rows: int | None = None) -> Dispatch:
    """The rows of tokens that go to one expert each; those of an expert stay in their order.

    Args:
        expert_N: of every token.
        num_experts, multiple: see Dispatch.
        rows: as of dispatch.
    """
    sorted_N, token_N = expert_N.sort(stable=True)
    experts_E = torch.arange(num_experts, device=expert_N.device)
    until_E = torch.searchsorted(sorted_N, experts_E, right=True)  # where each expert's tokens end in sorted_N
    end_E, R = _ends(until_E.diff(prepend=until_E.new_zeros(1)), multiple, rows)
    # row = first row of the expert + place among its tokens
    place_N = torch.arange(len(sorted_N), device=expert_N.device) - first_rows(until_E)[sorted_N]
    row_N = torch.empty_like(token_N).scatter_(0, token_N, first_rows(end_E)[sorted_N] + place_N)
    return _dispatch(row_N.unsqueeze(1), end_E, R, multiple)


def kept_choices(routing: Routing, slots: int | None) -> Tensor:
    """Choices of each group that each expert has a place for, (G, E)."""
    return routing.count_GE if slots is None else routing.count_GE.clamp(max=slots)


def most_rows(routing: Routing, slots: int | None, multiple: int) -> int:
    """The most rows that dispatch can need, from shapes alone."""
    G, S, K = routing.expert_GSK.shape
    E = routing.count_GE.shape[1]
    kept = G * S * K if slots is None else min(G * S * K, G * E * slots)
    return (kept + E * (multiple - 1)) // multiple * multiple


def _ends(count_E: Tensor, multiple: int, rows: int | None) -> tuple[Tensor, int]:
    """One past the last row of each expert, and the number of rows."""
    end_E = filled_up(count_E, multiple).cumsum(0)
    if rows is None:
        return end_E, int(end_E[-1])
    return torch.cat([end_E[:-1], end_E.new_full((1,), rows)]), rows


def _dispatch(row_NK: Tensor, end_E: Tensor, R: int, multiple: int) -> Dispatch:
    """Adds the way back, from rows to choices."""
    N, K = row_NK.shape
    # one row more collects what was dropped
    choice_R = torch.full((R + 1,), N * K, device=row_NK.device)
    choice_R.scatter_(0, row_NK.flatten(), torch.arange(N * K, device=row_NK.device))
    choice_R = choice_R[:R]
    token_R = (choice_R // K).clamp(max=N - 1)
    return Dispatch(token_R, choice_R, row_NK, end_E, multiple)


def first_rows(end_E: Tensor) -> Tensor:
    """The first row of each expert, (E,)."""
    return F.pad(end_E[:-1], (1, 0))


def filled_up(count: Any, multiple: int) -> Any:
    """Counts rounded up to a multiple, tensors or numbers."""
    return (count + multiple - 1) // multiple * multiple
