"""How fast a rank is and what a start takes, from finished results; for the estimates of plan and dry run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ASSUMED_FLOPS = 1e14  # per GPU and second: about a tenth of an H100's peak (trainer/config/gpus.py, ASSUMED_SHARE)


@dataclass(frozen=True)
class Measured:
    """What one finished result took, or the mean of several."""

    name: str
    phase: str
    folder: Path
    flops: float  # of training, all ranks together
    seconds: float  # of training with its evaluations and saves, or of what the phase does instead
    ranks: int
    startup: float  # seconds of a start beside that: imports, data, teacher, building, the last save

    @property
    def rank_seconds(self) -> float:
        """Of all ranks together, without the start."""
        return self.seconds * self.ranks

    @property
    def flops_per_second(self) -> float:
        """Of one rank; 0 of what trains nothing."""
        return self.flops / self.rank_seconds if self.rank_seconds else 0.0


class Speeds:
    """What is known of how long results take.

    Args:
        measured: finished results; of several with one name the first counts.
    """

    def __init__(self, measured: Sequence[Measured]):
        self.by_name: dict[str, Measured] = {}
        for each in measured:
            self.by_name.setdefault(each.name, each)

    def of(self, name: str) -> Measured | None:
        """That of the same result, else the mean of those of its phase; None = there is none."""
        if name in self.by_name:
            return self.by_name[name]
        phase = name.split("_")[0]
        alike = [each for each in self.by_name.values() if each.phase == phase]
        if not alike:
            return None
        count = len(alike)
        return Measured(
            name=name,
            phase=phase,
            folder=alike[0].folder,
            flops=sum(each.flops for each in alike) / count,
            # with one rank, so that results on different numbers of ranks can be added
            seconds=sum(each.rank_seconds for each in alike) / count,
            ranks=1,
            startup=sum(each.startup for each in alike) / count,
        )

    @property
    def slowest(self) -> Measured | None:
        """The training whose ranks compute slowest."""
        trained = [each for each in self.by_name.values() if each.flops_per_second]
        return min(trained, key=lambda each: each.flops_per_second, default=None)


def finished(folder: Path) -> list[Measured]:
    """Every complete result of a run folder that tells its seconds."""
    found = []
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text())
        if not result.get("seconds") or not result.get("world_size"):
            continue
        found.append(
            Measured(
                name=path.parent.name,
                phase=result.get("phase") or path.parent.name.split("_")[0],
                folder=folder,
                flops=result.get("flops") or 0.0,
                seconds=result["seconds"],
                ranks=result["world_size"],
                startup=result.get("startup_seconds") or 0.0,
            )
        )
    return found


def measured_speed(folders: Sequence[Path]) -> tuple[float, str] | None:
    """FLOP/s of one rank in the slowest finished stage of the first of these run folders that has one, and its name."""
    for folder in folders:
        slowest = Speeds(finished(folder)).slowest
        if slowest is not None:
            speed = slowest.flops_per_second
            said = f"{speed / 1e9:.3g} GFLOP/s per rank, measured in {folder / slowest.name} (its slowest stage)"
            return speed, said
    return None
