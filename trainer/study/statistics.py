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
        if self.std is None:
            return None
        return self.std / math.sqrt(self.n)


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
    known = [value for value in values if value is not None]
    n = len(known)
    if n == 0:
        return Summary(0, None, None)
    mean = sum(known) / n
    if n == 1:
        return Summary(1, mean, None)
    # s^2 = sum (x - mean)^2 / (n - 1)
    variance = sum((value - mean) ** 2 for value in known) / (n - 1)
    return Summary(n, mean, math.sqrt(variance))


def difference(a: Mapping[int, float | None], b: Mapping[int, float | None]) -> Summary:
    """a - b, seed by seed: what both seeds share (teacher, order of the images) drops out of the spread."""
    differences = [a[seed] - b[seed] for seed in a if a[seed] is not None and b.get(seed) is not None]
    return summary(differences)


def at(curve: Curve, x: float) -> float | None:
    """Linear interpolation; None outside of the curve."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if not x0 <= x <= x1:
            continue
        if x1 == x0:
            return y0
        # y = y0 + slope * (x - x0)
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    if len(curve) == 1 and curve[0][0] == x:
        return curve[0][1]
    return None


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, Summary]]:
    """Point by point over the seeds, as far as each of them goes; the cost is the mean one."""
    longest = max(map(len, curves), default=0)
    points = []
    for place in range(longest):
        of_seeds = [curve[place] for curve in curves if place < len(curve)]
        cost = sum(x for x, _ in of_seeds) / len(of_seeds)
        points.append((cost, summary([y for _, y in of_seeds])))
    return points


def race(a: Mapping[int, Curve], b: Mapping[int, Curve]) -> Race | None:
    """Compare two variants at equal total cost, seed by seed; None without a seed that both have finished.

    Compared at every point of either curve, and half-way, up to the cost that both have reached. Where `a` is still
    being prepared it has no student, so a second half that begins there is not won.
    """
    seeds = [seed for seed in a if a[seed] and b.get(seed)]
    if not seeds:
        return None
    curves = [curves_of[seed] for curves_of in (a, b) for seed in seeds]
    # as far as all of them go
    end = min(curve[-1][0] for curve in curves)
    costs = {x for curve in curves for x, _ in curve if x <= end} | {end / 2, end}
    points = []
    unready = False  # whether a has no student yet somewhere in the second half
    for x in sorted(costs):
        ours = [at(a[seed], x) for seed in seeds]
        theirs = [at(b[seed], x) for seed in seeds]
        if None in ours:
            unready |= x >= end / 2
        elif None not in theirs:
            points.append((x, summary([left - right for left, right in zip(ours, theirs)])))
    crossings = _crossings([(x, point.mean) for x, point in points])
    return Race(points, end, _ahead(points, end, unready, len(seeds)), crossings)


def _ahead(points: Sequence[tuple[float, Summary]], end: float, unready: bool, seeds: int) -> bool | None:
    """Whether the first variant is ahead over the second half of the cost axis; None = one seed cannot say."""
    if unready:
        return False
    if seeds == 1:
        return None
    second_half = [point for x, point in points if x >= end / 2]
    # mean > 2 standard errors at every point
    clear = [point.error is not None and point.mean > 2 * point.error for point in second_half]
    return len(clear) > 0 and all(clear)


def _crossings(points: Curve) -> list[float]:
    """Costs at which the difference changes its sign."""
    crossings = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if (y0 > 0) != (y1 > 0):
            # zero of the straight line through both points
            crossings.append(x0 + (x1 - x0) * y0 / (y0 - y1))
    return crossings
