"""How far one result of a chain is, from its folder and the log of its rank 0."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.tracking.measures import measure_of

# a line of trainer/tracking/metrics.py:Progress; its eta is "?", "2:03:04" or "1 day, 2:03:04"
LINE = re.compile(r"\] epoch (\d+)/(\d+) step (\d+)/(\d+).* eta ((?:\d+ days?, )?[\d:?]+)")
CLOCK = re.compile(r"(?:(\d+) days?, )?(\d+):(\d+):(\d+)")
TAIL = 64 * 1024  # bytes of a log's end that are read


@dataclass(frozen=True)
class Progress:
    """What is known; None and "" = not known. Epochs and steps inside an epoch count from 1, as the log does."""

    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    eta: str = ""  # as in the log: hours:minutes:seconds
    measure: str = ""  # what the last evaluation measured: accuracy or relative_error
    value: float | None = None
    saved_step: int | None = None
    outcome: str = ""  # of a complete result: what it came to

    @property
    def eta_seconds(self) -> float | None:
        """Seconds of training that are left."""
        clock = CLOCK.fullmatch(self.eta)
        if clock is None:
            return None
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

    def as_json(self) -> dict[str, Any]:
        """What is known, by name."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}

    def __str__(self) -> str:
        if self.outcome:
            return self.outcome
        parts = []
        if self.epoch is not None:
            parts += [f"epoch {self.epoch}/{self.epochs} step {self.step}/{self.steps}", f"eta {self.eta}"]
        if self.value is not None:
            measure = measure_of({self.measure: self.value})
            parts.append(f"{measure.name} {measure.shown(self.value)}")
        if self.saved_step is not None:
            parts.append(f"saved step {self.saved_step}")
        return ", ".join(parts) or "-"


def read(run: Path, result: str, log: Path | None = None) -> Progress:
    """How far a result is.

    Args:
        log: of its rank 0.
    """
    folder = run / result
    if (folder / "result.json").is_file():
        return _finished(json.loads((folder / "result.json").read_text()))
    known: dict[str, Any] = {}
    lines = LINE.findall(tail(log)) if log else []
    if lines:
        *counts, eta = lines[-1]
        known = dict(zip(("epoch", "epochs", "step", "steps"), map(int, counts))) | {"eta": eta}
    if (folder / "metrics.jsonl").is_file():
        known |= _measured(_last_evaluation(folder / "metrics.jsonl"))
    if (folder / "checkpoints/latest.json").is_file():
        latest = json.loads((folder / "checkpoints/latest.json").read_text())
        known["saved_step"] = int(latest["tag"].removeprefix("step_"))
    return Progress(**known)


def tail(path: Path, size: int = TAIL) -> str:
    """The end of a log; a bar's returns are line ends."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace").replace("\r", "\n")


def _finished(result: dict[str, Any]) -> Progress:
    if "repo" in result:
        return Progress(outcome=f"{result['repo']}@{result['revision']}, commit {result['commit'][:7]}")
    known = _measured(result.get("metrics", {}))
    return Progress(**known, outcome=str(Progress(**known)) if known else "complete")


def _measured(metrics: dict[str, Any]) -> dict[str, Any]:
    measure = measure_of(metrics)
    value = metrics.get(measure.key)
    return {} if value is None else {"measure": measure.key, "value": value}


def _last_evaluation(path: Path) -> dict[str, Any]:
    """The newest whole row of an evaluation that has its measure; empty without one."""
    for line in reversed(path.read_text(errors="replace").splitlines()):
        if '"eval"' not in line:
            continue
        try:
            row = json.loads(line)
        except ValueError:  # the last line, in the middle of its write
            continue
        if row.get("kind") == "eval" and row.get(measure_of(row).key) is not None:
            return row
    return {}
