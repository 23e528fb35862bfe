"""How many processes load images: as many as a step needs, found by measuring, and when loading is the limit.

The count changes nothing but the speed (loader.py), so every rank decides for itself.
"""

import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

FIRST_STEPS = 2  # not measured: the first ones take memory and warm up
MEASURED_STEPS = 7
HEADROOM = 1.25  # images differ, and a process that loads shares the memory with one that trains
WORTH_A_PROCESS = 0.05  # share of a step that loading takes in the training process itself
LIMIT = 0.2  # share of the time spent waiting above which input is called the limit
ROWS = 2  # of metrics in a row, before it is said
MOST_ELSEWHERE = 8  # processes where it is not measured: evaluation, features
Item = TypeVar("Item")


def spare_processors(local_world: int) -> int:
    """Processors of this process for each rank of the machine, but for the one that trains."""
    return max(0, len(os.sched_getaffinity(0)) // local_world - 1)


@dataclass
class Times:
    """Seconds that each step waited for its images, and that it then took."""

    waited: list[float] = field(default_factory=list)
    trained: list[float] = field(default_factory=list)

    def of(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches, timed: what happens until the next one is asked for is the step."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            given = time.perf_counter()
            yield batch
            batch = None  # else two would be held while the next one is made
            self.waited.append(given - asked)
            self.trained.append(time.perf_counter() - given)


def workers_for(times: Times, most: int) -> int:
    """Processes that load in the background as fast as steps take images, of `most`.

    Args:
        times: of steps whose images the training process loaded itself.
    """
    loading = median(times.waited[FIRST_STEPS:])
    training = median(times.trained[FIRST_STEPS:])
    if loading <= WORTH_A_PROCESS * (loading + training):
        return 0
    return min(most, math.ceil(HEADROOM * loading / max(training, 1e-9)))


class Limit:
    """Says once when input is the limit.

    Args:
        spare: processors for each rank but the one that trains.
    """

    def __init__(self, spare: int):
        self.spare = spare
        self.times = Times()
        self.rows = 0  # of metrics in a row, with input as the limit

    def remark(self, workers: int) -> str:
        """What to say of the steps since the last call: mostly nothing."""
        waited, trained = sum(self.times.waited), sum(self.times.trained)
        self.times.waited.clear()
        self.times.trained.clear()
        share = waited / max(waited + trained, 1e-9)
        # where the one processor loads and trains in turn, neither is the limit of the other
        limited = share > LIMIT and (workers or self.spare)
        self.rows = self.rows + 1 if limited else 0
        if self.rows != ROWS:
            return ""
        advice = "no processor is left for more; smaller files, or more processors for a rank, would help"
        if workers < self.spare:
            left = self.spare - workers
            advice = f"raise it (processors without work: {left}), or set it to null to have it measured"
        found = f"{share:.0%} of the time went by waiting for images at data.workers={workers}"
        return f"input is the limit: {found}; {advice}"
