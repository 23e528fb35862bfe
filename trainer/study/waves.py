"""Which cell of a study makes what, when its cells are jobs: what several share is made by one, the others wait for it.

Of equal artifacts (Cell.keys) the first cell in order makes one, and the others link it. So a cell waits for the cells
whose artifacts it links, which waves of arrays express: no two jobs ever make the same, and none starts too early. No
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.study.plan import Cell


@dataclass(frozen=True)
class Part:
    """One artifact of a cell."""

    name: str
    source: str = ""  # folder of an equal one, complete by the time of the job, which is linked; "" = the job makes it
    maker: str = ""  # cell whose job makes that one; "" = it is complete already


@dataclass(frozen=True)
class Work:
    """What the job of one cell does."""

    cell: str
    folder: str
    last: str  # its last artifact, whose metrics stand for the cell
    parts: tuple[Part, ...]  # what is missing, in the order in which it is made
    teacher: str = ""  # folder of a shared teacher that another cell's job makes
    waits_for: tuple[str, ...] = ()  # cells whose jobs come right before; what those wait for is left out


def works(cells: Sequence[Cell], complete: Mapping[str, Path]) -> list[Work]:
    """The jobs of the cells that are not complete, each behind those it waits for.

    Args:
        cells: in order, shared teachers before those that need them.
        complete: key -> folder of an artifact that is there.
    """
    owners: dict[str, Cell] = {}  # of what is to be made
    by_teacher = {cell.teacher: cell for cell in cells if cell.teacher and cell.teacher.parent == cell.folder}
    before: dict[str, set[str]] = {}  # cell -> all whose jobs have ended when its own starts
    todo = []
    for cell in cells:
        if cell.complete:
            continue
        parts = []
        waits_for = []
        for step in cell.steps:
            key = cell.keys[step.name]
            if cell.done(step):
                continue
            if key in complete:
                parts.append(Part(step.name, str(complete[key])))
            elif key in owners:
                maker = owners[key]
                parts.append(Part(step.name, str(maker.folder / step.name), maker.name))
                waits_for.append(maker.name)
            else:
                owners[key] = cell
                parts.append(Part(step.name))
        teacher = ""
        if cell.teacher and cell.teacher.parent != cell.folder and not (cell.teacher / "result.json").is_file():
            teacher = str(cell.teacher)
            if cell.teacher in by_teacher:
                waits_for.append(by_teacher[cell.teacher].name)
        earlier = set().union(*(before[name] for name in waits_for))
        before[cell.name] = earlier | set(waits_for)
        direct = dict.fromkeys(name for name in waits_for if name not in earlier)
        todo.append(
            Work(
                cell=cell.name,
                folder=str(cell.folder),
                last=cell.steps[-1].name,
                parts=tuple(parts),
                teacher=teacher,
                waits_for=tuple(direct),
            )
        )
    return todo


def waves(todo: Sequence[Work]) -> list[list[Work]]:
    """The same as groups that may each be one array: all of a group wait for the same cells, which stand before it."""
    depth: dict[str, int] = {}
    groups: dict[tuple[int, tuple[str, ...]], list[Work]] = {}
    for work in todo:
        depth[work.cell] = 1 + max((depth[name] for name in work.waits_for), default=-1)
        groups.setdefault((depth[work.cell], tuple(sorted(work.waits_for))), []).append(work)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def number_of_waves(todo: Sequence[Work]) -> int:
    """The longest row of cells that wait for each other."""
    depth: dict[str, int] = {}
    for work in todo:
        depth[work.cell] = 1 + max((depth[name] for name in work.waits_for), default=0)
    return max(depth.values(), default=0)
