"""Which elements of a stage go into one array: the cluster limits the largest index, Slurm the text that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TEXT_LIMIT = 3500  # characters of --array; 22.05 takes 3895 and refuses 6.6 thousand ("Pathname ... too long")


@dataclass(frozen=True)
class Array:
    """One sbatch call of an array; its task ids are `elements` less `offset`."""

    elements: tuple[int, ...]
    offset: int

    @property
    def text(self) -> str:
        """The task ids as --array takes them: "0-2,5"."""
        return ranges([element - self.offset for element in self.elements])


def split(elements: Sequence[int], max_size: int | None) -> list[Array]:
    """The arrays that hold these elements, each as many as fit; task ids are the elements themselves where they can be.

    Args:
        elements: in ascending order.
        max_size: MaxArraySize of the cluster, which task ids stay below; None = not known.
    """
    arrays: list[Array] = []
    current: list[int] = []
    for element in elements:
        longer = [*current, element]
        if current and not _fits(longer, max_size):
            arrays.append(_array(current, max_size))
            longer = [element]
        current = longer
    if current:
        arrays.append(_array(current, max_size))
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


def _array(elements: Sequence[int], max_size: int | None) -> Array:
    is_too_far = max_size is not None and elements[-1] >= max_size
    return Array(tuple(elements), elements[0] if is_too_far else 0)


def _fits(elements: Sequence[int], max_size: int | None) -> bool:
    array = _array(elements, max_size)
    return (max_size is None or elements[-1] - array.offset < max_size) and len(array.text) <= TEXT_LIMIT
