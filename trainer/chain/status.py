"""What became of a chain: stage, state, progress, node and reason, from the run folder and from Slurm if it answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

from trainer.chain import slurm
from trainer.chain.settings import Settings
from trainer.chain.submit import Row, rows
from trainer.config.load import load_recipe
from trainer.request.stages import chain
from trainer.tracking.console import table
from trainer.tracking.metrics import read_metrics

HEAD = ("stage", "job", "state", "progress", "node", "detail")
PROGRESS = re.compile(r"\] (epoch \d+/\d+ step \d+/\d+).* eta (\S+)")


def show(settings: Settings) -> int:
    """Print the table; exit code 0 when the chain is complete or still going, 1 when something ended without result."""
    run = settings.run
    submitted = rows(run)
    if not submitted:
        raise ValueError(f"nothing was submitted for {run} yet: there is no {run / 'jobs.tsv'}")
    recipe = load_recipe(Path(submitted[-1].script).parent / "recipe.yaml")
    jobs, silent = _ask({row.job for row in submitted})
    lines, broken = [], False
    for stage in chain(recipe):
        for element, artifact in enumerate(stage.artifacts):
            row = _row_of(submitted, stage.name, element if stage.array else None)
            job = _job_of(jobs, row, element if stage.array else None)
            log = _rank0_log(run, stage.name, element if stage.array else None)
            cells = _cells(run, artifact, row, job, silent, log)
            broken |= cells[1] in ("ENDED", *slurm.ENDED)
            lines.append((artifact, *cells))
    print(f"{run}" + (f"   (Slurm gives no answer: {silent})" if silent else ""))
    print(table(HEAD, lines))
    if broken:
        print("\nEnded without result: repair the reason, then submit again; what is complete is not run again.")
    return int(broken)


def progress(run: Path, artifact: str, log: Path | None = None) -> str:
    """Epoch, accuracy of the last evaluation and ETA of a stage, as far as known; `log` is that of its rank 0."""
    result, metrics = run / artifact / "result.json", run / artifact / "metrics.jsonl"
    if result.is_file():
        made = json.loads(result.read_text())
        if "repo" in made:
            return f"{made['repo']}@{made['revision']}, commit {made['commit'][:7]}"
        accuracy = made.get("metrics", {}).get("accuracy")
        return "complete" if accuracy is None else f"accuracy {accuracy:.1%}"
    parts = []
    found = PROGRESS.findall(log.read_text(errors="replace")) if log else []
    if found:
        parts += [found[-1][0], f"eta {found[-1][1]}"]
    if metrics.is_file():
        accuracies = [r["accuracy"] for r in read_metrics(metrics) if r["kind"] == "eval" and r["accuracy"] is not None]
        parts += [f"accuracy {accuracies[-1]:.1%}"] if accuracies else []
    latest = run / artifact / "checkpoints/latest.json"
    if latest.is_file():
        parts.append(f"saved step {int(json.loads(latest.read_text())['tag'].removeprefix('step_'))}")
    return ", ".join(parts) or "-"


def _cells(
    run: Path, artifact: str, row: Row | None, job: slurm.Job | None, silent: str, log: Path | None
) -> tuple[str, ...]:
    """job, state, progress, node, detail."""
    done, shown = (run / artifact / "result.json").is_file(), progress(run, artifact, log)
    if done and (job is None or not job.live):
        return (row.job if row else "-", "done", shown, "-", "")
    if row is None:
        return ("-", "not submitted", shown, "-", "")
    if job is None:
        why = _last_event(run, artifact) or "Slurm has forgotten this job"
        return (row.job, "unknown" if silent else "ENDED", shown, "-", why)
    if not job.live:
        why = _last_event(run, artifact, row.job) or _never_started(job)
        return (job.id, job.state, shown, "-", why)
    detail = f"waits: {job.reason}" if job.state == "PENDING" else f"{job.used}; {_last_line(log)}"
    if job.state == "PENDING" and (before := _last_event(run, artifact, row.job)):
        detail += f"; {before}"
    return (job.id, job.state, shown, job.nodes or "-", detail)


def _never_started(job: slurm.Job) -> str:
    if job.state == "CANCELLED":
        return "never started: a stage it needs did not end well, or it was cancelled"
    return f"left no word; Slurm says {job.reason}"


def _ask(ids: set[str]) -> tuple[list[slurm.Job], str]:
    try:
        return slurm.jobs(ids), ""
    except slurm.SlurmError as error:
        return [], str(error)


def _row_of(submitted: list[Row], stage: str, element: int | None) -> Row | None:
    for row in reversed(submitted):
        if row.stage == stage and (element is None or str(element) in row.array.split(",")):
            return row
    return None


def _job_of(jobs: list[slurm.Job], row: Row | None, element: int | None) -> slurm.Job | None:
    same = [job for job in jobs if row and job.array == row.job]
    exact = [job for job in same if job.element == element]
    return (exact or same or [None])[0]


def _last_event(run: Path, artifact: str, job: str | None = None) -> str:
    """The body's last word on this stage: what happened, and why."""
    path = run / "slurm/events" / f"{artifact}.tsv"
    lines = [line.split("\t", 4) for line in path.read_text(errors="replace").splitlines()] if path.is_file() else []
    lines = [line for line in lines if len(line) == 5 and (job is None or line[1].split("_")[0] == job)]
    if not lines:
        return ""
    _, _, restart, _, text = lines[-1]
    return text + (f" (restart {restart})" if restart != "0" else "")


def _rank0_log(run: Path, stage: str, element: int | None) -> Path | None:
    """The newest log of rank 0, of one element of an array."""
    pattern = f"{stage}-*" if element is None else f"{stage}-*_{element}"
    logs = sorted(run.glob(f"logs/{pattern}/*-rank0.out"), key=lambda p: p.stat().st_mtime)
    return logs[-1] if logs else None


def _last_line(log: Path | None) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines() if log else []
    return lines[-1][-100:] if lines else ""
