"""The one entry of the trainer: parse, answer or run one job, exit code.

    deepspeed --num_gpus 2 trainer/run.py --ds_config ds_configs/cpu_debug.json --recipe recipes/demo_projected.yaml \\
        --phase all --out runs/demo [section.key=value ...]

The same under torchrun, srun and plain python. Nothing imports this file; scripts use `from trainer import run_phase`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: put the repository, not trainer/, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from trainer.cli import flags as cli
from trainer.config.redaction import refuse_secrets
from trainer.distributed import interrupt
from trainer.distributed.launchers import ranks_from_environment, spokesman_rank
from trainer.request.job import EXIT_BAD_INPUT, EXIT_FAILED, Job
from trainer.request.plan import PlanRequest
from trainer.tracking.console import quieten, say_error, set_up_logging


def main(arguments: list[str] | None = None) -> int:
    """Do what the arguments ask and return the exit code: 0 only when it is done (others: trainer/request/job.py)."""
    begun = time.time()
    rank = spokesman_rank()
    try:
        work = _work(sys.argv[1:] if arguments is None else arguments, rank, begun)
    except (ValueError, OSError) as error:
        if rank == 0:
            say_error(error)  # the same on every rank: said once
        return EXIT_BAD_INPUT
    return work()


def _work(arguments: list[str], rank: int, begun: float) -> Callable[[], int]:
    """What is to be done, after everything that can be refused without torch."""
    refuse_secrets(arguments, "the command line")
    options = cli.parse(arguments)
    answer = cli.answer(options)
    if answer is not None:
        return partial(_alone, rank, print, answer)
    command = cli.read_command(options)
    if command:
        return partial(_alone, rank, _command, *command)
    plan = cli.read_plan(options, arguments)
    if plan is not None:
        return partial(_alone, rank, _plan, plan)
    job = cli.read_job(options, arguments)
    try:
        rank = ranks_from_environment()["rank"]
    except ValueError as error:  # who is rank 0 is what is in doubt: each process speaks for itself
        return partial(_refuse, error)
    if options.dry_run:
        return partial(_alone, rank, _dry_run, job)
    return partial(_train, rank, job, begun)


def _refuse(error: Exception) -> int:
    say_error(error)
    return EXIT_BAD_INPUT


def _train(rank: int, job: Job, begun: float) -> int:
    """The phases of a job, on all ranks.

    Args:
        begun: unix time of this process's start.
    """
    interrupt.listen()
    quieten()
    set_up_logging(rank == 0)
    import models  # noqa: F401  first: it mends torchvision beside a CPU torch
    from trainer.api import ended, execute

    return ended(partial(execute, job, begun), rank)


def _alone(rank: int, work: Callable[..., int | None], *arguments: Any) -> int:
    """What needs no other rank: an answer, a command, a dry run. The others of a launch end at once."""
    if rank != 0:
        return 0
    try:
        code = work(*arguments) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # a reader such as head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # python flushes once more at its end
        return 0
    except (ValueError, OSError) as error:
        say_error(error)
        return EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED


def _command(name: str, path: Path, out: Path | None, settings: dict[str, Any]) -> None:
    """inspect, export, import.

    Args:
        name: which of them.
        path: what the user names.
        out: where export and import write.
        settings: keyword arguments of import_checkpoint; none for the others.
    """
    if name == "import":
        from models.vmoe.importers import import_checkpoint

        for file in import_checkpoint(path, out=out, **settings):
            print(file)
        return
    from trainer.checkpoint import inspection

    if name == "export":
        print(inspection.export(path, out))
        return
    try:
        print(inspection.inspect(path))
    except inspection.Damaged as error:  # what is there is worth reading too
        print(error.text, flush=True)
        raise


def _dry_run(job: Job) -> int:
    quieten()
    set_up_logging(main=False)
    import models  # noqa: F401  first: it mends torchvision beside a CPU torch
    from trainer.plan.show import show

    return show(job)


def _plan(request: PlanRequest) -> int:
    quieten()
    set_up_logging(main=False)
    import models  # noqa: F401  first: it mends torchvision beside a CPU torch
    from trainer.plan.plan_page import show

    return show(request)


if __name__ == "__main__":
    sys.exit(main())
