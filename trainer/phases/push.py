"""Phase push: the trained student, or the detector, and its model card to the hub, as the recipe's section hub says.

OUT/push records what was pushed where. It is complete as long as a push would send just that to just there.
"""

from __future__ import annotations

import json
import logging
import time

from trainer import artifacts
from trainer.context import Run
from trainer.distributed.main_rank import on_main
from trainer.hub.push import Plan, find_teacher_license, plan, push

log = logging.getLogger(__name__)


def run(run: Run) -> None:
    """Push OUT/train (or OUT/detect) and write OUT/push."""
    target, started = run.recipe.hub, time.perf_counter()
    planned = on_main(run.dist, lambda: _plan(run))
    folder, done = run.open("push")
    if done:
        return
    commit = on_main(run.dist, lambda: push(planned[0], target))
    if run.dist.main:
        what, teacher_license = planned
        result = {
            "phase": "push",
            "module": None,
            "metrics": {},
            "repo": what.repo,
            "revision": what.revision,
            "commit": commit,
            "pushed": what.digests,
            "teacher_license": teacher_license,
            "seconds": time.perf_counter() - started,
            "command": run.command,
        }
        artifacts.write_result(folder, result)
        log.info("pushed to %s@%s, commit %s", what.repo, what.revision, commit)
    run.dist.barrier()


def _plan(run: Run) -> tuple[Plan, str | None]:
    """What to push and the teacher's licence; takes away the result of an earlier push that it does not match."""
    path = run.out / "push" / "result.json"
    try:
        before = json.loads(path.read_text())
        known = before["teacher_license"]
    except (FileNotFoundError, ValueError, KeyError):
        before, known = {}, find_teacher_license(run.out, run.recipe)
    planned = plan(run.out, run.recipe, known)
    there = [before.get(key) for key in ("repo", "revision", "pushed")]
    if there != [planned.repo, planned.revision, planned.digests]:
        path.unlink(missing_ok=True)
    return planned, known
