"""The trainer from Python, for people who script:

    from trainer import load_recipe, load_results, run_phase

    recipe = load_recipe("recipes/demo.yaml", train={"epochs": 3})
    result = run_phase(recipe, "teacher", out="runs/mine", ds_config="ds_configs/cpu_debug.json")
    print(result["metrics"]["accuracy"], load_results("runs/mine").keys())

On one process it needs no launcher; under torchrun, deepspeed or srun every rank runs the same script. trainer/run.py
goes through the same `execute`.
"""

from __future__ import annotations

import atexit
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.config.ds_config import read_ds_config
from trainer.config.recipe import Recipe
from trainer.distributed import interrupt
from trainer.request.graph import ALL, in_one_job, row_of
from trainer.request.job import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, Job
from trainer.tracking.console import say_error


def run_phase(
    recipe: Recipe,
    phase: str,
    *,
    out: str | Path,
    ds_config: str | Path | Mapping[str, Any],
    module: int | None = None,
    expert: int | None = None,
) -> dict[str, Any]:
    """Run one phase, or "all" of them, to its end; a phase that is complete returns its result at once.

    Several calls may follow one another in one process. Collective: every rank calls it and gets the result.

    Args:
        recipe: from load_recipe.
        phase: a row of the table of phases (teacher, meta, distill, train, evaluate, push, ...), or all.
        out: folder of the run; phases find each other's results there.
        ds_config: a DeepSpeed JSON file, or its values.
        module: of phases that go by module (distill, ...); None = all, one after another.
        expert: of phase expert; None = all experts of the module one after another.

    Returns:
        What result.json holds (metrics, seconds, flops, files, ...); where a call makes several results (all, distill
        without a module) a dict of them by name, as load_results gives.

    Raises:
        ValueError: bad input, before any training where that can be known.
        OSError: the disk or the network failed.
        RuntimeError: training stopped by itself, e.g. at a loss that is not finite.
        Interrupted: a warning signal (SIGUSR1, SIGTERM) came and everything is saved; the same call continues.
    """
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe is {recipe!r}, expected what load_recipe returns")
    command = f"run_phase in {sys.argv[0]}"
    job = Job.checked(recipe, read_ds_config(ds_config), phase, module, Path(out), command, expert)
    import torch.distributed

    if not torch.distributed.is_initialized():  # the process group stays up for the next call
        atexit.register(_leave)
    with _signals():
        execute(job)
    results = load_results(out)
    if phase == ALL:
        return results
    return {name: results[name] for name in job.artifacts} if job.several else results[job.artifacts[0]]


def ended(work: Callable[[], None], rank: int) -> int:
    """Carry out what a process is there for, say how it ended, and return the exit code (trainer/request/job.py).

    Args:
        work: calls `execute`, once or several times.
        rank: of this process; rank 0 speaks for all where they end alike.
    """
    from trainer.distributed import ranks
    from trainer.tracking.health import NonFiniteLoss

    code = EXIT_FAILED
    try:
        work()
        interrupt.stop_listening()
        code = 0
    except interrupt.Interrupted as stop:
        interrupt.stop_listening()
        if rank == 0:
            print(stop, file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        if not isinstance(error, ValueError | OSError | NonFiniteLoss):
            logging.getLogger(__name__).exception("failed")
        if rank == 0:
            say_error(error)
        elif not isinstance(error, ranks.Agreed | NonFiniteLoss):  # those rank 0 says for all
            say_error(error, f"[rank {rank}] ")
        code = EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED
    if code in (0, EXIT_INTERRUPTED):
        ranks.stop()
    return code


def load_results(out: str | Path) -> dict[str, dict[str, Any]]:
    """The result.json of every complete phase below OUT by its folder's name (teacher, meta, distill_0, ...).

    Raises:
        ValueError: a result.json that is truncated or altered.
    """
    results = {}
    for path in sorted(Path(out).glob("*/result.json")):
        try:
            results[path.parent.name] = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"{path} is truncated or altered: delete {path.parent} and run its phase again") from None
    return results


def execute(job: Job, begun: float | None = None) -> None:
    """Join the other ranks, check everything, run the phases of a job (collective).

    Args:
        begun: unix time since when this process works for the job; None = now.
    """
    begun = begun or time.time()
    import models  # noqa: F401  first: it mends torchvision beside a CPU torch
    from trainer import writer_lock
    from trainer.context import BEGUN, Opened, Run
    from trainer.distributed import ranks
    from trainer.plan import preflight

    run = Run(job.recipe, job.ds_values, job.out, ranks.start(), job.command, opened=Opened({BEGUN: begun}))
    if set(job.phases) - {"push"}:
        run.open_together()
    with run.dist.together():
        preflight.check(run, job.phases)
    interrupt.HEARTBEAT.watch(job.recipe.run.hang_seconds)  # from here on: what came before may be a download of hours
    try:
        for phase in job.phases:
            _run(run, job, phase)
    finally:
        interrupt.HEARTBEAT.rest()
        writer_lock.release_all()


def _run(run: Any, job: Job, phase: str) -> None:
    """One phase; as part of all of them also its baselines, and the report before the push that wants it."""
    from trainer.phases import code_of

    code, row = code_of(phase), row_of(phase)
    if row.by_start:
        code.run(run, job.recipe.train.start)
    elif in_one_job(job.recipe, phase):
        code.run(run, None)
    elif row.repeated == "expert":
        for module in job.modules:
            for expert in job.experts:
                code.run(run, module, expert)
    elif row.repeated:
        for module in job.modules:
            code.run(run, module)
    else:
        code.run(run)
    if job.phase == ALL and phase == "train":
        for baseline in job.recipe.train.baselines:
            code.run(run, baseline)
    if job.phase == ALL and phase in ("evaluate", "detect") and run.dist.main:
        from trainer.report.write import write_report

        print(write_report(run.out), flush=True)


@contextmanager
def _signals() -> Iterator[None]:
    """Warning signals are ours while a phase runs, and the script's again after it."""
    if threading.current_thread() is not threading.main_thread():  # python hands signals to the main thread only
        yield
        return
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    interrupt.listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave() -> None:
    from trainer.distributed import ranks

    ranks.stop()
