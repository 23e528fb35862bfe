"""Figures that two processors, or two orders of the same sum, compute alike."""

import torch


def assert_close_by_size(actual: torch.Tensor, expected: torch.Tensor, relative: float = 5e-6, what: str = "") -> None:
    """Equal within `relative` of the largest value of `expected`, or of 1 where all are smaller.

    A sum of float32 products is off by its order, which the instruction set decides, in proportion to what is summed:
    an absolute tolerance that holds for values around 1 fails on logits of 7.
    """
    size = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * size, msg=lambda message: f"{what} {message}")
