"""Metrics rows handed on to TensorBoard, wandb, MLflow and Trackio, through accelerate's tracker classes.

Rank 0 only. metrics.jsonl is the record (trainer/tracking/metrics.py); a tracker shows the same numbers elsewhere, and
one that fails while training runs is left behind with a warning. Torch is imported when the first tracker starts.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer.config.redaction import safe_line
from trainer.config.runtime import TRACKERS
from trainer.disk import write_json

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

log = logging.getLogger(__name__)
IDS = "trackers.json"  # in the phase's folder: what the trackers call this run, so that a resumed one goes on in it


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The trackers that `run.trackers` asks for on this machine: "auto" is TensorBoard where it is installed.

    Raises:
        ValueError: one that is asked for by name is not installed; the message has the command that installs it.
    """
    missing = [name for name in names if name != "auto" and not _installed(name)]
    if missing:
        raise ValueError(
            f"run.trackers asks for {', '.join(missing)}, which cannot be imported here: "
            f"pip install {' '.join(missing)}, or leave it out of run.trackers"
        )
    by_name = ["tensorboard" if name == "auto" else name for name in names]
    usable = filter(_installed, by_name)
    return tuple(dict.fromkeys(usable))  # each once, in the order given


class Trackers:
    """The trackers of one phase.

    Args:
        names: as in run.trackers.
        folder: the phase's folder, OUT/PHASE: the project is called OUT, the run PHASE. TensorBoard writes into it.
        resume_step: optimiser steps done at the checkpoint resumed from; 0 = from the start, under a new run.
        sent: the last step per kind of row that an interrupted run had logged. TensorBoard is told to forget what came
            after `resume_step`; the others cannot go back, so rows that they have are not sent again.

    Raises:
        ValueError: a tracker asked for by name is not installed or does not start (no login, no server).
    """

    def __init__(self, names: Sequence[str], folder: Path, resume_step: int, sent: Mapping[str, int]) -> None:
        self._running: dict[str, GeneralTracker] = {}
        self._sent: Mapping[str, int] = {}
        ids: dict[str, str] = {}
        if resume_step:
            self._sent = sent
            ids = _read_ids(folder / IDS)
        for name in chosen(names):
            try:
                self._running[name] = _start(name, folder, resume_step, ids)
            except Exception as error:
                text = f"tracker {name} does not start: {safe_line(error)}"
                if name in names:
                    raise ValueError(
                        f"{text}. See its own documentation for login and offline mode (WANDB_MODE=offline, "
                        "MLFLOW_TRACKING_URI), or leave it out of run.trackers"
                    ) from None
                log.warning("%s; going on without it", text)
        if ids:
            write_json(folder / IDS, ids)

    def write(self, row: Mapping[str, Any]) -> None:
        """Send the numbers of one metrics row, as train/loss, eval/accuracy, ..."""
        values = dict(_numbers(row))
        for name, tracker in list(self._running.items()):
            if name != "tensorboard" and row["step"] <= self._sent.get(row["kind"], 0):
                continue
            try:
                tracker.log(values, step=row["step"])
            except Exception as error:  # whatever a tracker's server does, the training goes on
                log.warning("tracker %s failed and is left out from here: %s", name, safe_line(error))
                del self._running[name]

    def close(self) -> None:
        """Let every tracker write what it still holds."""
        for name, tracker in self._running.items():
            try:
                tracker.finish()
            except Exception as error:
                log.warning("tracker %s did not finish cleanly: %s", name, safe_line(error))
        self._running = {}


def _start(name: str, folder: Path, resume_step: int, ids: dict[str, str]) -> GeneralTracker:
    """Start one tracker on the run `ids` names, or on a new one, which is entered in `ids`."""
    from accelerate import tracking
    from accelerate.state import PartialState

    PartialState()  # accelerate's loggers ask for it; the process group exists, so it only reads
    project = _name(folder.resolve().parent.name)
    run = _name(folder.name)
    known = name in ids
    if name == "tensorboard":
        purge_step = None
        if resume_step:
            purge_step = resume_step + 1  # TensorBoard forgets what came from there on
        else:
            shutil.rmtree(folder / name, ignore_errors=True)
        tracker = tracking.TensorBoardTracker(name, folder, purge_step=purge_step)
        tracker.start()
        return tracker
    if name == "wandb":
        run_id = ids.setdefault(name, uuid.uuid4().hex)
        tracker = tracking.WandBTracker(project, name=run, id=run_id, resume="allow", dir=str(folder))
        tracker.start()
    elif name == "trackio":
        ids.setdefault(name, f"{run}-{uuid.uuid4().hex[:8]}")
        tracker = tracking.TrackioTracker(project, name=ids[name], resume="allow")
        tracker.start()
    else:
        tracker = tracking.MLflowTracker(experiment_name=project, run_id=ids.get(name), run_name=run)
        tracker.start()
        ids[name] = tracker.tracker.info.run_id
    if not known:  # MLflow refuses to set a parameter twice
        tracker.store_init_configuration(_settings(folder))
    return tracker


def _installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a bare folder ./wandb of an earlier run is no package


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The row's numbers under the name of its kind; of a list its smallest and largest value."""
    for key, value in row.items():
        if isinstance(value, int | float) and key not in ("step", "time"):
            yield f"{row['kind']}/{key}", value
        elif key.startswith("load/") and value and None not in value:
            layer = key.removeprefix("load/")
            yield f"{row['kind']}/load_min/{layer}", min(value)
            yield f"{row['kind']}/load_max/{layer}", max(value)


def _settings(folder: Path) -> dict[str, Any]:
    """The recipe as flat keys, section.key: what the trackers show as parameters of the run."""
    path = folder / "config.yaml"
    saved = yaml.safe_load(path.read_text()) if path.is_file() else {}
    return dict(_flat(saved.get("recipe", {}), ""))


def _flat(values: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """(WHERE + key, value) of every value, those of nested tables under section.key; a list or null as text."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{key}.")
        elif isinstance(value, str | int | float | bool):
            yield where + key, value
        else:
            yield where + key, str(value)


def _read_ids(path: Path) -> dict[str, str]:
    try:
        saved = json.loads(path.read_text())
        return {name: saved[name] for name in TRACKERS if isinstance(saved.get(name), str)}
    except (OSError, ValueError, AttributeError):
        return {}  # a new run in the tracker is better than no training


def _name(text: str) -> str:
    return re.sub(r"[^\w.-]", "-", text) or "m2mkd"
