"""One process of a study: the given artifacts of one cell, one after another.

python -m trainer.study.worker CELL DS_CONFIG distill_0 distill_1 train
Started by trainer/study/runner.py; as a job of Slurm, by trainer/study/element.py on every rank. CELL/recipe.yaml says
what is trained; the exit codes are those of trainer/run.py (trainer/request/job.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe
from trainer.distributed import interrupt
from trainer.distributed.launchers import ranks_from_environment
from trainer.request.graph import in_one_job
from trainer.request.job import Job
from trainer.study.plan import Step
from trainer.tracking.console import quieten, set_up_logging


def main(cell: Path, ds_config: Path, names: Sequence[str]) -> int:
    """Make the artifacts; 75 after a warning signal and a save."""
    interrupt.listen()  # before the slow imports; a signal in their time is seen at the first step
    quieten()
    rank = ranks_from_environment()["rank"]
    set_up_logging(main=rank == 0)
    from trainer.api import ended

    return ended(partial(_make, cell, ds_config, names), rank)


def _make(cell: Path, ds_config: Path, names: Sequence[str]) -> None:
    from trainer import api

    recipe = load_recipe(cell / "recipe.yaml")
    ds_values = read_ds_config(ds_config)
    for name in names:
        step = Step(name)
        module = expert = None
        if not in_one_job(recipe, step.phase):
            module, expert = [*step.numbers, None, None][:2]
        command = f"python -m trainer.study.worker {cell} {ds_config} {name}"
        try:
            api.execute(Job.checked(recipe, ds_values, step.phase, module, cell, command, expert))
        except ValueError as error:
            error.args = (f"{name}: {error}",)  # of the same type: what all ranks raise alike is said once
            raise


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
