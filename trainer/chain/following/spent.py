"""GPU-hours that a result has taken so far: of the nodes that its jobs hold, also while they start, evaluate and save.

Held from "started" of the job body's notes to its "done", "failed" or "requeued". A job that ended without a word (a
lost node, a kill) is counted up to the last sign of life.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.chain.following.events import ENDS, Event
from trainer.chain.settings import ONLINE, Settings
from trainer.chain.submit import Row
from trainer.request.stages import Stage

ROW_TIME = re.compile(r'"time": (\d+\.\d+)')  # of a row of metrics.jsonl


@dataclass(frozen=True)
class Spent:
    """Of one result. GPU-hours, or rank-hours where there are no GPUs; None = not known."""

    hours: float = 0.0
    starts: int = 0  # how often its job began
    ranks: int | None = None
    limit: float | None = None  # hours by the time limit of one job, its share where several results have one


def of(
    run: Path,
    result: str,
    stage: Stage,
    submitted: Sequence[Row],
    notes: Sequence[Event],
    *,
    running: bool,
    log: Path | None,
) -> Spent:
    """What a result has taken.

    Args:
        submitted: every submission of its stage, oldest first; the settings of each tell its ranks.
        running: whether its newest job holds nodes at this moment.
        log: of its rank 0.
    """
    starts = held(notes, _signs_of_life(run / result, log), time.time() if running else None)
    settings_of = {row.job: submitted_settings(Path(row.script).parent) for row in submitted}
    hours = 0.0
    for job, seconds in starts:
        settings = settings_of.get(job)
        if settings is not None:
            hours += seconds * ranks_of(stage, settings) / 3600
    newest = settings_of[submitted[-1].job] if submitted else None
    if newest is None:
        return Spent(hours, len(starts))
    ranks = ranks_of(stage, newest)
    sharing = newest.elements_of(stage.setting) if stage.array else 1
    return Spent(hours, len(starts), ranks, ranks * newest.hours_of(stage.setting) / sharing)


def ranks_of(stage: Stage, settings: Settings) -> int:
    """GPUs of one job of a stage, or ranks where there are none; 0 of the jobs that need only the internet."""
    if stage.phase in ONLINE:
        return 0
    return settings.nodes_of(stage.setting) * settings.ranks_of(stage.setting)


def held(notes: Sequence[Event], alive: Sequence[float], now: float | None) -> list[tuple[str, float]]:
    """(id that sbatch returned, seconds for which nodes were held) of every start, oldest first.

    Args:
        notes: of one result.
        alive: unix times at which something of it moved.
        now: until when the newest start counts; None = it has ended.
    """
    timed = [note for note in notes if not math.isnan(note.time)]
    places = [i for i, note in enumerate(timed) if note.kind == "started"]
    starts = []
    for place, next_place in zip(places, [*places[1:], None]):
        begin = timed[place]
        own = timed[place + 1 : next_place]
        until = math.inf if next_place is None else timed[next_place].time
        ends = [note.time for note in own if note.kind in ENDS]
        if ends:
            end = ends[0]
        elif next_place is None and now is not None:
            end = now
        else:
            signs = [time for time in alive if begin.time <= time < until]
            end = max([begin.time, *(note.time for note in own), *signs])
        starts.append((begin.job.split("_")[0], end - begin.time))
    return starts


@functools.cache
def submitted_settings(folder: Path) -> Settings | None:
    """The settings of a submission (RUN/slurm/<n>); None where they were written by a version that has others."""
    try:
        written = json.loads((folder / "submission.json").read_text())["settings"]
        known = {field.name for field in dataclasses.fields(Settings)}
        values = {name: value for name, value in written.items() if name in known}
        return Settings(**values | {"overrides": tuple(written.get("overrides", ()))})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _signs_of_life(folder: Path, log: Path | None) -> list[float]:
    """When a step was noted or a line printed, oldest first."""
    times = []
    rows = folder / "metrics.jsonl"
    if rows.is_file():
        times = [float(text) for text in ROW_TIME.findall(rows.read_text(errors="replace"))]
    if log is not None:
        times.append(log.stat().st_mtime)
    return times
