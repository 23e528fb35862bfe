"""What runs inside a fork of tests/warm_python.py: a command or a snippet of a document, in a folder like a clone."""

import contextlib
import os
import runpy
import sys
from pathlib import Path

import pytest

from tests.hub_server import connect


def main(folder: str, url: str, kind: str, words: list[str], variables: dict[str, str]) -> int:
    """Do it as a shell in `folder` would, with the client of the hub pointed to a stand-in.

    Args:
        url: of the stand-in.
        kind: "run" (trainer/run.py with these words), "module" (python -m), "code" (python of a block, its place) or
            "chain" (slurm/m2mkd_vmoe.sh) or "study" (slurm/study.sh).
        variables: of the environment, added to it.
    """
    os.chdir(folder)
    os.environ.update(variables)
    connect(pytest.MonkeyPatch(), url, Path(folder).parent / "home")
    if kind == "run":
        from trainer import run

        return run.main(words)
    if kind == "chain":
        return _chain(words)
    if kind == "study":
        from trainer.chain import plan
        from trainer.study import jobs

        plan.ask_scheduler = lambda *asked: False  # tests/slurm asks a real one
        sys.argv = ["study.sh", *words]
        return jobs.main()
    if kind == "code":
        code, place = words
        sys.path.insert(0, folder)  # where the package m2mkd is as if installed
        exec(compile(code, place, "exec"), {"__name__": "__main__"})
        return 0
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    return 0


def _chain(words: list[str]) -> int:
    """The driver of the chain. Its dry run, a new python otherwise, runs in this one: the imports are there."""
    from trainer.chain import __main__ as driver
    from trainer.chain import plan
    from trainer.plan import rehearsal

    class Done:
        returncode = 0

    real = plan.subprocess.run

    def run(command, **options):
        if "trainer.plan.rehearsal" not in command:
            return real(command, **options)
        before, sys.argv = sys.argv, command[2:]
        with contextlib.redirect_stdout(sys.stderr):
            rehearsal.main()
        sys.argv = before
        return Done

    plan.subprocess.run = run
    plan.ask_scheduler = lambda *asked: False  # tests/slurm asks a real one
    sys.argv = ["m2mkd_vmoe.sh", *words]
    return driver.main()
