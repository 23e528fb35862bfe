"""Submit all jobs of a chain or none, whatever ends this process: a refusal, a signal, a terminal that goes away.

Every job that could start at once is submitted held, and all are released by one call when the last one is recorded. So
a process that is killed half-way leaves nothing that runs, and the next submission takes back what it left: a job is
known by its script, RUN/slurm/<n>/<stage>.sbatch, also when its id was recorded nowhere.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from trainer.chain import slurm

MARK = "unfinished"  # a file in RUN/slurm/<n>/ from before the first sbatch until the jobs are released
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
WAITING = ("JobHeldUser", "Dependency", "None")  # reasons of jobs that were never released


class Stopped(RuntimeError):
    """A signal ended the submission; everything of it was taken back."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; nothing of this submission is left")
        self.number = number


@contextmanager
def all_or_nothing(folder: Path, release: bool = True) -> Iterator[Callable[[str], None]]:
    """The block submits jobs whose scripts lie in `folder`, held, and tells each id by the function it is given.

    The function raises Stopped when a signal has come. Signals wait for it, so that none comes between sbatch and the
    record of its id. At the end of the block the jobs that were told are released, which is the whole chain's start.

    Args:
        release: False when the user wants them held.

    Raises:
        Stopped: a signal; what was submitted is cancelled.
        SlurmError: the jobs could not be released, and are cancelled.
    """
    mark = folder / MARK
    held: list[str] = []
    with _signals_noted() as signals:

        def tell(job: str) -> None:
            held.append(job)
            if signals:
                raise Stopped(signals[0])

        mark.touch()
        try:
            yield tell
            if signals:
                raise Stopped(signals[0])
            if release:
                slurm.release(held)
        except BaseException:
            take_back(folder, held)
            raise
        mark.unlink()


def take_back(folder: Path, known: list[str]) -> None:
    """Cancel the jobs of a submission: those known, and any whose script lies in its folder.

    What cannot be cancelled now stays held and marked, and the next submission or `cancel` finds it.
    """
    ids = set(known)
    try:
        ids |= {job.array for job in slurm.jobs_below(folder) if job.live}
    except slurm.SlurmError as error:
        complain(f"cannot ask whether jobs are left: {error}")
    try:
        slurm.cancel(sorted(ids))
    except slurm.SlurmError as error:
        complain(f"{', '.join(sorted(ids))} could not be cancelled and stay held: {error}. `cancel` finds them later")
        return
    (folder / MARK).unlink(missing_ok=True)


def take_back_unfinished(run: Path) -> None:
    """Cancel what a submission that was killed half-way has left; only for whoever holds the run's lock."""
    for mark in run.glob(f"slurm/[0-9]*/{MARK}"):
        jobs = [job for job in slurm.jobs_below(mark.parent) if job.live]
        never_released = all(job.state == "PENDING" and job.reason in WAITING for job in jobs)
        if not never_released:  # it was killed after the release: the chain is whole
            mark.unlink()
            continue
        ids = sorted({job.array for job in jobs})
        if ids:
            say(f"submission {mark.parent.name} was killed half-way: taking back its jobs {', '.join(ids)}")
        take_back(mark.parent, ids)


def say(line: str) -> None:
    """Print a line; a reader that has gone away (`| head -1`, a closed terminal) changes nothing."""
    _print(line, sys.stdout)


def complain(line: str) -> None:
    """The same on standard error."""
    _print(line, sys.stderr)


def _print(line: str, stream) -> None:
    try:
        print(line, file=stream, flush=True)
    except OSError:  # else Python would try again at its end, and fail there
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Signals that would end this process are put into a list instead; ignored ones (nohup) stay ignored."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
