"""What the job body noted about a stage (RUN/slurm/events/<result>.tsv, written by `event` of slurm/body.sh)."""

from __future__ import annotations

import calendar
import time
from dataclasses import dataclass
from pathlib import Path

ENDS = ("done", "failed", "requeued")  # after these words the job holds its nodes no longer


@dataclass(frozen=True)
class Event:
    """One line."""

    time: float  # unix seconds; nan where the line has none
    job: str  # 12, or 12_3 of an array
    restart: str  # how often Slurm had started that job before
    kind: str  # started, warned, requeued, failed, done
    text: str

    @property
    def shown(self) -> str:
        """For people."""
        return self.text if self.restart == "0" else f"{self.text} (restart {self.restart})"


def read(run: Path, result: str) -> list[Event]:
    """Every note about a result, oldest first; a line that is not whole is left out."""
    path = run / "slurm/events" / f"{result}.tsv"
    if not path.is_file():
        return []
    rows = [line.split("\t", 4) for line in path.read_text(errors="replace").splitlines()]
    return [Event(_seconds(row[0]), *row[1:]) for row in rows if len(row) == 5]


def last_of(events: list[Event], job: str = "") -> Event | None:
    """The newest note, of one job id where that is given: 12 for all elements of 12."""
    of_job = [event for event in events if not job or event.job.split("_")[0] == job]
    return of_job[-1] if of_job else None


def _seconds(text: str) -> float:
    try:
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return float("nan")
