"""Cancel a chain, and look at what is alive afterwards.

Slurm does not tell the script of a job who ended it. So RUN/slurm/cancelled/<job> is written before scancel: a body
that finds it does not start its job again, however late it looks.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from trainer.chain import slurm
from trainer.chain.submit import live_jobs

EXIT_ALIVE = 1
WAIT = 60  # seconds: ranks have KillWait (mostly 30) to save, then Slurm kills them
AGAIN = 10  # seconds between two scancel of what is still alive


def cancel(run: Path, wait: float = WAIT) -> int:
    """Cancel every live job of the run and wait until none is left.

    Args:
        run: the run's folder.
        wait: seconds until what is alive is reported.

    Returns:
        0 when nothing of the run is alive, 1 when something is.

    Raises:
        SlurmError: Slurm gives no answer, or refuses.
    """
    cancelled: set[str] = set()
    marks = run / "slurm/cancelled"
    end = time.monotonic() + wait
    due = 0.0  # when scancel is called next
    while live := live_jobs(run):
        if time.monotonic() >= end:
            print(f"{run}: still alive {wait:.0f} s after scancel: {_named(live)}. Look at squeue --me, cancel again")
            return EXIT_ALIVE
        arrays = {job.array for job in live}
        if time.monotonic() >= due or arrays - cancelled:  # a job may have got a successor in the meantime
            _mark(marks, arrays)
            slurm.cancel(sorted(arrays))
            cancelled |= arrays
            due = time.monotonic() + AGAIN
        time.sleep(0.5)
    shutil.rmtree(marks, ignore_errors=True)  # Slurm may give the same numbers again one day
    if cancelled:
        print(f"{run}: cancelled {', '.join(sorted(cancelled))}; what was saved stays, `submit` goes on from it")
    else:
        print(f"{run}: no live jobs")
    return 0


def _mark(marks: Path, arrays: set[str]) -> None:
    marks.mkdir(parents=True, exist_ok=True)
    for array in arrays:
        (marks / array).touch()


def _named(live: list[slurm.Job]) -> str:
    return ", ".join(f"{job.id} {job.state}" for job in live)
