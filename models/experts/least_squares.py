"""Least squares on more rows than fit in memory: sums over chunks, solved once. N rows, I inputs, O outputs."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-4  # added to the diagonal of the inputs' covariance, relative to its mean
# The least of it, relative to the mean square of the inputs: what they vary by less is float32's rounding
ROUNDING = 1e-12


class LeastSquares:
    """The W and b of least sum over rows of weight |W x + b - y|^2, from x and y given in chunks.

    Products are taken in the type of the chunks and summed in float64, of what is left of x and y when the mean of the
    first chunk is taken away: a covariance is a difference of larger numbers, and hidden states have channels whose
    mean is hundreds of times what they vary by.
    """

    def __init__(self) -> None:
        self._x_shift: Tensor | None = None
        self._y_shift: Tensor | None = None
        self._sums: list[Tensor] = []  # weight, weight x, weight y, weight x x^T, weight x y^T

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Take in a chunk.

        Args:
            x, y: (..., I) and (..., O).
            weight: (...), of every row; None = 1.
        """
        x_NI = x.flatten(0, -2)
        y_NO = y.flatten(0, -2)
        if self._x_shift is None:
            self._x_shift = x_NI.mean(0)
            self._y_shift = y_NO.mean(0)
        x_NI = x_NI - self._x_shift
        y_NO = y_NO - self._y_shift
        weight_N = x_NI.new_ones(len(x_NI)) if weight is None else weight.flatten()
        weighted_NI = x_NI * weight_N[:, None]
        sums = [
            weight_N.sum(),
            weighted_NI.sum(0),
            weight_N @ y_NO,
            weighted_NI.T @ x_NI,
            weighted_NI.T @ y_NO,
        ]
        sums = [each.double() for each in sums]
        self._sums = [total + new for total, new in zip(self._sums, sums)] if self._sums else sums

    def solve(self, prior: Tensor | None = None, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
        """W (O, I) and b (O,), float32, where the sums are; of inputs that never vary the W does nothing.

        Args:
            prior: W (O, I) to stay near where the rows do not say otherwise; None = 0.
            ridge: how near: added to the diagonal of the inputs' covariance, relative to its mean.
        """
        count, x_sum, y_sum, xx_sum, xy_sum = self._sums
        x_mean = x_sum / count
        y_mean = y_sum / count
        covariance_II = xx_sum / count - x_mean.outer(x_mean)
        cross_IO = xy_sum / count - x_mean.outer(y_mean)
        near_OI = torch.zeros_like(cross_IO.T) if prior is None else prior.to(cross_IO)
        # with C = cov(x, x): (C + ridge mean(diag C) I) (W - prior)^T = cov(x, y) - C prior^T
        left_IO = cross_IO - covariance_II @ near_OI.T
        spread = covariance_II.diagonal().mean()
        square = spread + (x_mean + self._x_shift).square().mean()
        covariance_II.diagonal().add_(torch.maximum(ridge * spread, ROUNDING * square).clamp_min(1e-30))
        weight_OI = near_OI + torch.linalg.solve(covariance_II, left_IO).T
        # W (x - x_shift) + b' = y - y_shift
        x_mean = x_mean + self._x_shift
        y_mean = y_mean + self._y_shift
        bias_O = y_mean - weight_OI @ x_mean
        return weight_OI.float(), bias_O.float()


def power(moment: Tensor, exponent: float) -> Tensor:
    """A power of symmetric positive matrices (..., D, D), by their eigenvalues.

    Those below 1e-6 of the largest count as that much: directions that hardly occur have no inverse worth having.
    """
    values, vectors = torch.linalg.eigh(moment)
    values = values.maximum(values.amax(-1, keepdim=True) * 1e-6).clamp_min(1e-30)
    return (vectors * values.unsqueeze(-2) ** exponent) @ vectors.mT
