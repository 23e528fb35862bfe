"""The arithmetic of a study's tables: means over seeds, paired differences, and curves over cost. Plain numbers only.

A curve is a list of (cost, accuracy) in order of cost. None stands for a number that is not there, and is never 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Summary:
    """Mean over n seeds with the sample standard deviation (divided by n - 1); None where n is too small for it."""

    n: int
    mean: float | None
    std: float | None

    @property
    def error(self) -> float | None:
        """Standard error of the mean."""
        return None if self.std is None else self.std / math.sqrt(self.n)


@dataclass(frozen=True)
class Race:
    """Two variants along the axis of total cost, as far as both have spent it.

    Attributes:
        points: (cost, difference of accuracy) where the first variant has a student.
        end: cost up to which both curves go.
        ahead: whether the difference is above 0 by more than two standard errors at every point of the second half;
            None when a single seed gives no standard error.
        crossings: costs at which the mean difference changes its sign.
    """

    points: Sequence[tuple[float, Summary]]
    end: float
    ahead: bool | None
    crossings: Sequence[float]


def summary(values: Sequence[float | None]) -> Summary:
    """Of the values that are there."""
    there = [value for value in values if value is not None]
    n = len(there)
    if not n:
        return Summary(0, None, None)
    mean = sum(there) / n
    return Summary(n, mean, math.sqrt(sum((v - mean) ** 2 for v in there) / (n - 1)) if n > 1 else None)


def difference(a: Mapping[int, float | None], b: Mapping[int, float | None]) -> Summary:
    """a - b, seed by seed: what both seeds share (teacher, order of the images) drops out of the spread."""
    both = [seed for seed in a if a[seed] is not None and b.get(seed) is not None]
    return summary([a[seed] - b[seed] for seed in both])


def at(curve: Curve, x: float) -> float | None:
    """Linear interpolation; None outside of the curve."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return curve[0][1] if len(curve) == 1 and curve[0][0] == x else None


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, Summary]]:
    """Point by point over the seeds, as far as each of them goes; the cost is the mean one."""
    longest = max(map(len, curves), default=0)
    columns = [[curve[i] for curve in curves if i < len(curve)] for i in range(longest)]
    return [(sum(x for x, _ in column) / len(column), summary([y for _, y in column])) for column in columns]


def race(a: Mapping[int, Curve], b: Mapping[int, Curve]) -> Race | None:
    """Compare two variants at equal total cost, seed by seed; None without a seed that both have finished.

    Compared at every point of either curve, and half-way, up to the cost that both have reached. Where `a` is still
    being prepared it has no student, so a second half that begins there is not won.
    """
    seeds = [seed for seed in a if a[seed] and b.get(seed)]
    if not seeds:
        return None
    end = min(curve[seed][-1][0] for curve in (a, b) for seed in seeds)
    costs = {x for curve in (a, b) for seed in seeds for x, _ in curve[seed] if x <= end} | {end / 2, end}
    points, unready = [], False
    for x in sorted(costs):
        pairs = [(at(a[seed], x), at(b[seed], x)) for seed in seeds]
        if any(left is None for left, _ in pairs):
            unready |= x >= end / 2
        elif all(right is not None for _, right in pairs):
            points.append((x, summary([left - right for left, right in pairs])))
    half = [point for x, point in points if x >= end / 2]
    ahead: bool | None = bool(half) and not unready and all(
        point.error is not None and point.mean > 2 * point.error for point in half
    )  # fmt: skip
    if len(seeds) == 1 and not unready:
        ahead = None
    return Race(points, end, ahead, _crossings([(x, point.mean) for x, point in points]))


def _crossings(points: Curve) -> list[float]:
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if (y0 > 0) != (y1 > 0):
            found.append(x0 + (x1 - x0) * y0 / (y0 - y1))
    return found
