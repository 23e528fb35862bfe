"""How one expert is taught alone where tokens, not images, are shared out among the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from models.flops import forward_flops
from trainer.objectives.distill import Distill


class DistillTokens(Distill):
    """Distill with a border target that counts the tokens of one cluster only; the logits' terms stay as they are.

    Args:
        own: what the module is fed, images or (B, T, D) -> whether a token belongs to the expert, bool (B, T).
        tokens: length of the token sequence; this and everything else as in Distill.
    """

    def __init__(self, own: Callable[[Tensor], Tensor], *arguments: Any, tokens: int, **options: Any):
        super().__init__(*arguments, tokens=tokens, **options)
        self.own = own
        if self.index == 0:  # its input is pixels: the state behind the meta model's own stage is clustered
            self.flops_per_image += forward_flops(self.meta.stages[0], tokens)

    def border_error(self, h: Tensor, given: Tensor, wanted: Tensor) -> Tensor:
        own_BT = self.own(h)
        if not own_BT.any():
            return 0.0 * given.float().sum()  # no token of the cluster in this batch; the graph stays whole
        return super().border_error(h, given[own_BT], wanted[own_BT])
