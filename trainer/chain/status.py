"""What became of a chain: stage, state, progress, node and reason, from the run folder and from Slurm if it answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from trainer.chain import slurm
from trainer.chain.settings import Settings
from trainer.chain.submit import Row, rows
from trainer.config.load import load_recipe
from trainer.request.stages import chain
from trainer.tracking.console import table
from trainer.tracking.measures import measure_of
from trainer.tracking.metrics import read_metrics

HEAD = ("stage", "job", "state", "progress", "node", "detail")
PROGRESS = re.compile(r"\] (epoch \d+/\d+ step \d+/\d+).* eta (\S+)")


def show(settings: Settings) -> int:
    """Print the table; exit code 0 when the chain is complete or still going, 1 when something ended without result.

    Raises:
        ValueError: nothing was submitted in this run folder.
    """
    run = settings.run
    submitted = rows(run)
    if not submitted:
        raise ValueError(f"nothing was submitted for {run} yet: there is no {run / 'jobs.tsv'}")
    recipe = load_recipe(Path(submitted[-1].script).parent / "recipe.yaml")
    jobs, no_answer = _ask_slurm({row.job for row in submitted})
    lines = []
    states = set()
    for stage in chain(recipe):
        for i, artifact in enumerate(stage.artifacts):
            element = i if stage.array else None
            row = _row_of(submitted, stage.name, element)
            job = _job_of(jobs, row, element)
            log = _rank0_log(run, stage.name, element)
            cells = _cells(run, artifact, row, job, log, answered=not no_answer)
            states.add(cells[1])
            lines.append((artifact, *cells))
    print(f"{run}   (Slurm gives no answer: {no_answer})" if no_answer else run)
    print(table(HEAD, lines))
    if states.isdisjoint(("ENDED", *slurm.ENDED)):
        return 0
    print("\nEnded without result: repair the reason, then submit again; what is complete is not run again.")
    return 1


def progress(run: Path, artifact: str, log: Path | None = None) -> str:
    """Epoch, measure of the last evaluation and ETA of a stage, as far as known; `log` is that of its rank 0."""
    folder = run / artifact
    if (folder / "result.json").is_file():
        return _outcome(json.loads((folder / "result.json").read_text()))
    parts = []
    progress_lines = PROGRESS.findall(log.read_text(errors="replace")) if log else []
    if progress_lines:
        position, eta = progress_lines[-1]
        parts += [position, f"eta {eta}"]
    if (folder / "metrics.jsonl").is_file():
        evaluations = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "eval"]
        measured = [line for line in evaluations if line.get(measure_of(line).key) is not None]
        if measured:
            parts.append(_measured(measured[-1]))
    if (folder / "checkpoints/latest.json").is_file():
        latest = json.loads((folder / "checkpoints/latest.json").read_text())
        step = int(latest["tag"].removeprefix("step_"))
        parts.append(f"saved step {step}")
    return ", ".join(parts) or "-"


def _outcome(result: dict[str, Any]) -> str:
    if "repo" in result:
        return f"{result['repo']}@{result['revision']}, commit {result['commit'][:7]}"
    metrics = result.get("metrics", {})
    return "complete" if metrics.get(measure_of(metrics).key) is None else _measured(metrics)


def _measured(metrics: dict[str, Any]) -> str:
    measure = measure_of(metrics)
    return f"{measure.name} {measure.shown(metrics[measure.key])}"


def _cells(
    run: Path,
    artifact: str,
    row: Row | None,
    job: slurm.Job | None,
    log: Path | None,
    answered: bool,
) -> tuple[str, ...]:
    """job, state, progress, node, detail.

    Args:
        row: its newest submission, if there was one.
        job: what Slurm knows of that, unless it has forgotten it or gives no answer.
        log: of its rank 0.
        answered: whether Slurm gave an answer.
    """
    is_done = (run / artifact / "result.json").is_file()
    is_live = job is not None and job.live
    so_far = progress(run, artifact, log)
    if is_done and not is_live:
        return (row.job if row else "-", "done", so_far, "-", "")
    if row is None:
        return ("-", "not submitted", so_far, "-", "")
    if job is None:
        why = _last_event(run, artifact) or "Slurm has forgotten this job"
        return (row.job, "ENDED" if answered else "unknown", so_far, "-", why)
    event = _last_event(run, artifact, row.job)
    if not is_live:
        return (job.id, job.state, so_far, "-", event or _never_started(job))
    if job.state != "PENDING":
        detail = f"{job.used}; {_last_line(log)}"
    elif event:  # it was requeued
        detail = f"waits: {job.reason}; {event}"
    else:
        detail = f"waits: {job.reason}"
    return (job.id, job.state, so_far, job.nodes or "-", detail)


def _never_started(job: slurm.Job) -> str:
    if job.state == "CANCELLED":
        return "never started: a stage it needs did not end well, or it was cancelled"
    return f"left no word; Slurm says {job.reason}"


def _ask_slurm(ids: set[str]) -> tuple[list[slurm.Job], str]:
    """What Slurm knows of these jobs, and why it gives no answer when it does not."""
    try:
        return slurm.jobs(ids), ""
    except slurm.SlurmError as error:
        return [], str(error)


def _row_of(submitted: list[Row], stage: str, element: int | None) -> Row | None:
    """The newest submission of a stage, of one element of an array."""
    for row in reversed(submitted):
        if row.stage == stage and (element is None or str(element) in row.array.split(",")):
            return row
    return None


def _job_of(jobs: list[slurm.Job], row: Row | None, element: int | None) -> slurm.Job | None:
    """What Slurm knows of one element of a submission, or else of the array it is in."""
    if row is None:
        return None
    of_row = [job for job in jobs if job.array == row.job]
    of_element = [job for job in of_row if job.element == row.task(element)]
    return next(iter(of_element or of_row), None)


def _last_event(run: Path, artifact: str, job: str | None = None) -> str:
    """The body's last word on this stage: what happened, and why."""
    path = run / "slurm/events" / f"{artifact}.tsv"
    if not path.is_file():
        return ""
    events = [line.split("\t", 4) for line in path.read_text(errors="replace").splitlines()]
    complete = [event for event in events if len(event) == 5]
    if job is not None:
        complete = [event for event in complete if event[1].split("_")[0] == job]  # 12_3 is an element of 12
    if not complete:
        return ""
    _, _, restart, _, text = complete[-1]
    return text if restart == "0" else f"{text} (restart {restart})"


def _rank0_log(run: Path, stage: str, element: int | None) -> Path | None:
    """The newest log of rank 0, of one element of an array."""
    pattern = f"{stage}-*" if element is None else f"{stage}-*_{element}"
    logs = sorted(run.glob(f"logs/{pattern}/*-rank0.out"), key=lambda log: log.stat().st_mtime)
    return logs[-1] if logs else None


def _last_line(log: Path | None) -> str:
    if log is None:
        return ""
    *_, last = ["", *log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()]
    return last[-100:]
