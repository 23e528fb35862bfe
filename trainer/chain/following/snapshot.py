"""The state of every result of a chain at one moment: from Slurm first, where it answers, and then from the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.chain import slurm
from trainer.chain.following import events, progress, spent
from trainer.chain.following.progress import Progress, tail
from trainer.chain.following.reasons import Never, never
from trainer.chain.following.spent import Spent
from trainer.chain.submit import Row, rows, stages_of
from trainer.request.stages import Stage

DONE = "done"
RUNNING = "running"
WAITING = "waiting"
NEVER = "will never start"
ENDED = "ended without result"
MISSING = "not submitted"
UNANSWERED = "no answer"  # from Slurm, and no result on disk
LIVE = (RUNNING, WAITING, UNANSWERED)  # may still become done


@dataclass(frozen=True)
class Element:
    """One result of a chain and what has become of it."""

    result: str  # its folder below the run
    stage: str
    element: int | None  # of an array
    state: str  # one of the words above
    job: str  # as squeue shows it, 12 or 12_3; "" = not submitted
    slurm: str  # the job's state in Slurm's word; "" = Slurm does not know it, or gives no answer
    reason: str  # Slurm's reason of a waiting job
    never: Never | None  # what that means where it will not start by itself
    nodes: str
    detail: str  # for people: why it is where it is
    progress: Progress
    spent: Spent
    rank0_log: Path | None
    job_logs: tuple[str, ...]  # of the job bodies, below RUN/logs
    rank_logs: tuple[str, ...]  # folders there, of the ranks


@dataclass(frozen=True)
class Snapshot:
    """All results of a chain in order."""

    run: Path
    elements: list[Element]
    no_answer: str  # why Slurm gives none; "" = it answers

    @property
    def state(self) -> str:
        """Of the whole chain: what is worst, of what matters for somebody who waits for it."""
        states = {each.state for each in self.elements}
        if states <= {DONE}:
            return DONE
        for state in (NEVER, ENDED, UNANSWERED, RUNNING, WAITING, MISSING):
            if state in states:
                return state
        raise AssertionError(f"a state that has no name: {states}")

    @property
    def settled(self) -> bool:
        """Whether nothing of it will change by itself."""
        return not any(each.state in LIVE for each in self.elements)


def read(run: Path) -> Snapshot:
    """The chain as it is now.

    Raises:
        ValueError: nothing was submitted in this run folder.
    """
    submitted = rows(run)
    if not submitted:
        raise ValueError(f"nothing was submitted for {run} yet: there is no {run / 'jobs.tsv'}")
    jobs: list[slurm.Job] = []
    no_answer = ""
    try:  # before the disk is read: a job that ends in between is then seen with its result
        jobs = slurm.jobs({row.job for row in submitted})
    except slurm.SlurmError as error:
        no_answer = str(error)
    elements = []
    for stage in stages_of(Path(submitted[-1].script).parent):
        for i, result in enumerate(stage.artifacts):
            if not result:  # of a study that has no longer a cell of this number
                continue
            of_stage = _rows_of(submitted, stage.name, i if stage.array else None)
            job = _job_of(jobs, of_stage, i if stage.array else None)
            elements.append(_element(run, stage, i, result, of_stage, job, answered=not no_answer))
    return Snapshot(run, elements, no_answer)


def _element(
    run: Path, stage: Stage, index: int, result: str, submitted: Sequence[Row], job: slurm.Job | None, answered: bool
) -> Element:
    """One result.

    Args:
        index: of the result among those of its stage.
        submitted: its submissions, oldest first.
        job: what Slurm knows of the newest, unless it has forgotten it or gives no answer.
        answered: whether Slurm gave an answer.
    """
    row = submitted[-1] if submitted else None
    element = index if stage.array else None
    rank_logs = tuple(row.rank_logs(element) for row in submitted)
    log = _newest_rank0_log(run, rank_logs)
    notes = events.read(run, result)
    is_done = (run / result / "result.json").is_file()
    will_never = never(job.reason) if job is not None and job.state == "PENDING" else None
    if job is not None and job.live and row.per_job != "1":  # its job may be at work on others
        last = events.last_of(notes, row.job)
        ended = {"done": "COMPLETED", "failed": "FAILED"}.get(last.kind if last else "")
        job = replace(job, state=ended) if ended else job
    state = _state(is_done, row, job, will_never, answered)
    return Element(
        result=result,
        stage=stage.name,
        element=element,
        state=state,
        job=_job_name(row, job),
        slurm="" if job is None else job.state,
        reason=job.reason if job is not None and job.state == "PENDING" else "",
        never=will_never,
        nodes="" if job is None or not job.live else job.nodes,
        detail=_detail(state, row, job, will_never, notes, log),
        progress=progress.read(run, result, log),
        spent=spent.of(run, result, stage, submitted, notes, running=state == RUNNING, log=log),
        rank0_log=log,
        job_logs=tuple(row.job_log(element) for row in submitted),
        rank_logs=rank_logs,
    )


def _state(is_done: bool, row: Row | None, job: slurm.Job | None, will_never: Never | None, answered: bool) -> str:
    if is_done and not (job is not None and job.live):
        return DONE
    if row is None:
        return MISSING
    if job is None:
        return ENDED if answered else UNANSWERED
    if not job.live:
        return ENDED
    if will_never is not None:
        return NEVER
    return WAITING if job.state == "PENDING" else RUNNING


def _job_name(row: Row | None, job: slurm.Job | None) -> str:
    if job is not None:
        return job.id
    return "" if row is None else row.job


def _detail(
    state: str,
    row: Row | None,
    job: slurm.Job | None,
    will_never: Never | None,
    notes: Sequence[events.Event],
    log: Path | None,
) -> str:
    """Why it is where it is, for people."""
    if row is None or state == DONE:
        return ""
    if job is None:
        newest = events.last_of(notes)
        word = newest.shown if newest else "no word from the job"
        asked = "Slurm does not know this job any more" if state == ENDED else "Slurm gives no answer"
        return f"{asked}; {word}"
    newest = events.last_of(notes, row.job)
    word = newest.shown if newest else ""
    if not job.live:
        return word or _never_started(job)
    if job.state != "PENDING":
        return f"{job.used}; {_last_line(log)}"
    waits = str(will_never) if will_never else f"waits: {job.reason}"
    return f"{waits}; {word}" if word else waits  # with a word of its job it was requeued


def _never_started(job: slurm.Job) -> str:
    if job.state == "CANCELLED":
        return "never started: a stage it needs did not end well, or it was cancelled"
    return f"left no word; Slurm says {job.reason}"


def _rows_of(submitted: Sequence[Row], stage: str, element: int | None) -> list[Row]:
    """The submissions of a stage, of one element of an array, oldest first."""
    of_stage = [row for row in submitted if row.stage == stage]
    return [row for row in of_stage if element is None or str(element) in row.array.split(",")]


def _job_of(jobs: Sequence[slurm.Job], submitted: Sequence[Row], element: int | None) -> slurm.Job | None:
    """What Slurm knows of one element of the newest submission, or else of the array it is in."""
    if not submitted:
        return None
    row = submitted[-1]
    of_row = [job for job in jobs if job.array == row.job]
    of_element = [job for job in of_row if job.element == row.task(element)]
    whole = [job for job in of_row if job.element is None]
    return next(iter(of_element or whole), None)


def _newest_rank0_log(run: Path, names: Sequence[str]) -> Path | None:
    logs = [log for name in names for log in (run / "logs" / name).glob("*-rank0.out")]
    return max(logs, key=lambda log: log.stat().st_mtime, default=None)


def _last_line(log: Path | None) -> str:
    if log is None:
        return ""
    *_, last = ["", *tail(log).strip().splitlines()]
    return last[-100:]
