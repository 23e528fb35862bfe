"""Where the time of a step goes: run.profile steps under torch's profiler, as a table and as a trace.

    OUT/PHASE/profile/steps.txt    parts of a step, then operators, by their own time
    OUT/PHASE/profile/trace.json   for https://ui.perfetto.dev or chrome://tracing

The parts are named where they happen (`part`), so a trace shows them above the operators they consist of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

PARTS = ("data", "forward", "backward", "optimizer")
SKIPPED = 2  # the first steps of a run fill caches and pools
WARM_UP = 1  # steps under the profiler that do not count
OPERATORS = 40  # rows of the table


def part(name: str) -> AbstractContextManager[Any]:
    """What runs inside is this part of a step."""
    assert name in PARTS, name
    return record_function(f"step/{name}")


def waiting(batches: Iterable[Any]) -> Iterator[Any]:
    """The same batches; what the loop waits for each of them is the part "data"."""
    iterator = iter(batches)
    while True:
        with part("data"):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


class StepProfiler:
    """Profiles some steps of a phase, and writes what it saw as soon as it has seen them.

    Args:
        steps: how many; 0 = none, and nothing is done.
        folder: where the files go.
    """

    def __init__(self, steps: int, folder: Path) -> None:
        self.folder = folder
        self.steps = steps
        self._profiler = None
        if steps:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(
                activities=activities,
                schedule=schedule(wait=SKIPPED, warmup=WARM_UP, active=steps, repeat=1),
                on_trace_ready=self._write,
                acc_events=True,
            )
            self._profiler.start()

    def step_done(self) -> None:
        """After every optimiser step."""
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """Stop; a phase with fewer steps than asked for writes those it had."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        events = profiler.key_averages()
        on_device = any(event.self_device_time_total for event in events)
        sort_by = "self_device_time_total" if on_device else "self_cpu_time_total"
        table = events.table(sort_by=sort_by, row_limit=OPERATORS, max_name_column_width=60)
        (self.folder / "steps.txt").write_text(f"{_parts(events)}\n\n{table}\n")
        profiler.export_chrome_trace(str(self.folder / "trace.json"))


def _parts(events: Any) -> str:
    """One line per part of a step: milliseconds of a step on the host, and their share."""
    totals = {event.key.removeprefix("step/"): event for event in events if event.key.startswith("step/")}
    whole = sum(event.cpu_time_total for event in totals.values())
    lines = [f"{'part of a step':<16}{'ms':>10}{'share':>8}"]
    steps = max((event.count for event in totals.values()), default=1)
    for name in PARTS:
        if name in totals:
            microseconds = totals[name].cpu_time_total
            lines.append(f"{name:<16}{microseconds / steps / 1000:>10.2f}{microseconds / whole:>8.0%}")
    return "\n".join(lines)
