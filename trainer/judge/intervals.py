"""95% intervals by bootstrap over images, and what is computed of them. numpy alone.

N images, R resamples. The draws depend on the seed and on N alone: models judged on the same images are judged on the
same resamples, so that differences between them are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

AT_ONCE = 2**22  # draws in memory at a time
PERCENTILES = (2.5, 97.5)
BINS = 15  # of confidence, of equal width (Guo et al. 2017, arXiv 1706.04599)


@dataclass(frozen=True)
class Figure:
    """A number with its 95% interval; None = there is none."""

    value: float
    low: float | None = None
    high: float | None = None


def mean_with_interval(values: np.ndarray, resamples: int, seed: int) -> Figure:
    """Mean of (N,) values, one of each image."""
    means = [values[drawn].mean(axis=1) for drawn in _draws(len(values), resamples, seed)]
    return _figure(float(values.mean()), np.concatenate(means))


def calibration_error(confidence: np.ndarray, correct: np.ndarray, resamples: int, seed: int) -> Figure:
    """Expected calibration error: the mean over images of |accuracy - confidence| of their bin.

    Args:
        confidence: (N,) of the class that was told, 0..1.
        correct: (N,) whether it is the right one.
    """
    bins = bins_of(confidence)
    gap = correct.astype(np.float64) - confidence

    def errors(drawn: np.ndarray) -> np.ndarray:
        # sum over the bins of |sum of the gaps in it|, of every resample
        places = bins[drawn] + BINS * np.arange(len(drawn))[:, None]
        sums = np.bincount(places.ravel(), weights=gap[drawn].ravel(), minlength=BINS * len(drawn))
        return np.abs(sums.reshape(len(drawn), BINS)).sum(axis=1) / drawn.shape[1]

    everything = np.arange(len(gap))[None]
    return _figure(float(errors(everything)[0]), _resampled(errors, len(gap), resamples, seed))


def bins_of(confidence: np.ndarray) -> np.ndarray:
    """The bin of every image, 0..BINS - 1."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def of_episodes(accuracies: np.ndarray) -> Figure:
    """Mean of independent episodes, with the normal interval: mean +- 1.96 s / sqrt(E), as few-shot papers give it."""
    half = 1.96 * accuracies.std(ddof=1) / math.sqrt(len(accuracies))
    mean = float(accuracies.mean())
    return Figure(mean, mean - float(half), mean + float(half))


def _resampled(statistic: Callable[[np.ndarray], np.ndarray], images: int, resamples: int, seed: int) -> np.ndarray:
    return np.concatenate([statistic(drawn) for drawn in _draws(images, resamples, seed)])


def _draws(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Numbers of the images of some resamples at a time, (r, N)."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, images])))
    rows = max(1, AT_ONCE // images)
    for first in range(0, resamples, rows):
        yield rng.integers(0, images, size=(min(rows, resamples - first), images))


def _figure(value: float, resampled: np.ndarray) -> Figure:
    low, high = np.percentile(resampled, PERCENTILES)
    return Figure(value, float(low), float(high))
