"""`logs STAGE [-f]`: the log that tells most of a stage or of one element, followed across restarts and nodes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from trainer.chain.following import snapshot
from trainer.chain.following.options import View
from trainer.chain.following.progress import tail
from trainer.chain.following.snapshot import ENDED, LIVE, RUNNING, Element
from trainer.chain.following.status import CODES
from trainer.chain.settings import Settings

LOOK = 0.5  # seconds between two looks at a file


def show(settings: Settings, view: View) -> int:
    """Print the end of a log; with -f what is added to it, and to the logs of later restarts, until the stage is over.

    Returns:
        The code of the stage's state (trainer/chain/following/status.py:CODES).

    Raises:
        ValueError: no such stage, or it has no log yet.
    """
    run = settings.run
    name = next((word for word in settings.overrides if "=" not in word), "")  # logs NAME
    chosen = choose(snapshot.read(run).elements, name)
    log = find(run, chosen, view)
    if log is None and not view.follow:
        raise ValueError(f"{chosen.result} has no such log: its state is {chosen.state!r} {chosen.detail}".rstrip())
    printed: dict[Path, int] = {}  # bytes of each log
    if log is not None:
        print(f"==> {log} <==")
        lines = tail(log, 1024 * view.lines).splitlines(keepends=True)
        printed[log] = log.stat().st_size
        print("".join(lines[-view.lines :]), end="", flush=True)
    if view.follow:
        chosen = _follow(run, chosen, view, log, printed)
    return CODES[chosen.state]


def choose(elements: list[Element], name: str) -> Element:
    """A result by its name, or of a stage the one worth looking at: one that runs, else one that failed, else the last.

    Raises:
        ValueError: there is none of that name.
    """
    named = [each for each in elements if name in (each.result, each.stage)]
    if not named:
        known = ", ".join(each.result for each in elements)
        raise ValueError(f"logs {name!r}: expected a stage or a result of this chain: {known}")
    for state in (RUNNING, ENDED):
        for each in named:
            if each.state == state:
                return each
    with_log = [each for each in named if each.rank0_log is not None]
    return (with_log or named)[-1]


def find(run: Path, element: Element, view: View) -> Path | None:
    """The log that tells most: rank 0's; the job body's where rank 0 has none yet, or the job ended without result."""
    folders = [run / "logs" / name for name in element.rank_logs]
    bodies = [run / "logs" / name for name in element.job_logs]
    body = _newest([path for path in bodies if path.is_file() and path.stat().st_size])  # empty until its job starts
    if view.job_log:
        return body
    rank = _newest([log for folder in folders for log in folder.glob(f"*-rank{view.rank or 0}.out")])
    if view.rank is not None:
        return rank
    if rank is None or element.state == ENDED:
        return body or rank
    job, _, _ = rank.parent.name.partition(".")  # behind it the element, where several share a job
    newest_start_has_none = body is not None and body.stat().st_mtime > rank.stat().st_mtime and body.stem != job
    return body if newest_start_has_none else rank


def _newest(paths: list[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def _follow(run: Path, element: Element, view: View, log: Path | None, printed: dict[Path, int]) -> Element:
    """Print what is added until the stage is over; a restart on another node writes another file."""
    asked = time.monotonic()
    if log is None:
        print(f"{element.result}: {element.state} {element.detail}".rstrip(), file=sys.stderr, flush=True)
    while True:
        over = False
        if time.monotonic() - asked >= view.every:
            asked = time.monotonic()
            (element,) = [each for each in snapshot.read(run).elements if each.result == element.result]
            over = element.state not in LIVE
        if log is not None:
            printed[log] = _print_from(log, printed.get(log, 0))
        newest = find(run, element, view)
        if newest != log and newest is not None:
            log = newest
            print(f"\n==> {log} <==")
            printed[log] = _print_from(log, printed.get(log, 0))
        if over:
            return element
        time.sleep(LOOK)


def _print_from(log: Path, position: int) -> int:
    """Print a log from a byte on; returns where it ends now."""
    with log.open("rb") as file:
        file.seek(position)
        added = file.read()
    sys.stdout.write(added.decode(errors="replace"))
    sys.stdout.flush()
    return position + len(added)
