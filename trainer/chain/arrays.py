"""Which elements of a stage go into one array: the cluster limits the largest index, Slurm the text that lists them.

Several elements may share a job, which makes one after another: task t then has the elements t * n to t * n + n - 1, as
far as they are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TEXT_LIMIT = 3500  # characters of --array; 22.05 takes 3895 and refuses 6.6 thousand ("Pathname ... too long")


@dataclass(frozen=True)
class Array:
    """One sbatch call of an array."""

    elements: tuple[int, ...]
    offset: int  # of its task ids
    per_job: int = 1

    @property
    def tasks(self) -> list[int]:
        """The task ids, ascending."""
        return list(dict.fromkeys(task_of(element, self.offset, self.per_job) for element in self.elements))

    @property
    def text(self) -> str:
        """The task ids as --array takes them: "0-2,5"."""
        return ranges(self.tasks)


def task_of(element: int, offset: int, per_job: int) -> int:
    """The task id of an element."""
    return element // per_job - offset


def split(elements: Sequence[int], max_size: int | None, per_job: int = 1) -> list[Array]:
    """The arrays that hold these elements, each as many as fit; without an offset where they can be.

    Args:
        elements: in ascending order.
        max_size: MaxArraySize of the cluster, which task ids stay below; None = not known.
        per_job: elements that share a job, at most.
    """
    arrays: list[Array] = []
    current: list[int] = []
    for element in elements:
        longer = [*current, element]
        if current and not _fits(longer, max_size, per_job):
            arrays.append(_array(current, max_size, per_job))
            longer = [element]
        current = longer
    if current:
        arrays.append(_array(current, max_size, per_job))
    return arrays


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: 0-2,5,7-8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _array(elements: Sequence[int], max_size: int | None, per_job: int) -> Array:
    without = Array(tuple(elements), 0, per_job)
    is_too_far = max_size is not None and without.tasks[-1] >= max_size
    return Array(tuple(elements), without.tasks[0], per_job) if is_too_far else without


def _fits(elements: Sequence[int], max_size: int | None, per_job: int) -> bool:
    array = _array(elements, max_size, per_job)
    return (max_size is None or array.tasks[-1] < max_size) and len(array.text) <= TEXT_LIMIT
