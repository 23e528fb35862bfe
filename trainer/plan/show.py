"""`--dry-run`: every check that needs no training, and what the job would cost. Writes nothing, on one process and CPU.

    deepspeed --num_gpus 8 trainer/run.py --recipe R --ds_config J --phase all --out OUT --dry-run

The launcher's ranks are those of the plan. The checks are the ones of a start and of `bash slurm/m2mkd_vmoe.sh plan`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator

from trainer.artifacts import missing, require
from trainer.distributed.launchers import ranks_from_environment
from trainer.plan import preflight
from trainer.plan.cost import Speeds, finished
from trainer.plan.rehearsal import DryRun, carry_out
from trainer.request.graph import ALL, row_of, stage_names
from trainer.request.job import EXIT_BAD_INPUT, Job
from trainer.request.stages import Stage, chain, stages
from trainer.teaching.estimate import Cost
from trainer.tracking.console import table


def show(job: Job) -> int:
    """Print checks, state and cost of a job's phases; 0, or EXIT_BAD_INPUT when a check found a problem."""
    ranks = ranks_from_environment()
    world = ranks["world"]
    local = math.gcd(world, ranks["local_world"])  # nodes with different numbers of ranks: see ranks.start
    layout = dict.fromkeys(stage_names(), (world // local, local))
    with tempfile.TemporaryDirectory() as scratch:
        dry = DryRun(job.recipe, job.ds_values, job.out, layout, scratch)
        good, problems = carry_out(_checks(job, dry))
    print(f"{job.command}\nout {job.out}, {world} rank{'s' if world > 1 else ''}\n\nchecks")
    for line in good:
        print(f"  ok       {line}")
    for line in problems:
        print(f"  PROBLEM  {line}")
    if job.phase == "push":
        from trainer.hub.push import find_teacher_license, plan

        print(f"\n{plan(job.out, job.recipe, find_teacher_license(job.out, job.recipe))}")
    else:
        print(f"\ncost\n{_cost(job, dry, world)}")
    print("\nnothing was written" + (f"; {len(problems)} to repair first" if problems else ""))
    return EXIT_BAD_INPUT if problems else 0


def _checks(job: Job, dry: DryRun) -> Iterator[tuple[str, Callable[[], str]]]:
    """What a start checks; what is there already; and, before training, one image through every model of the recipe."""
    yield "start", lambda: preflight.check(dry.run, job.phases, make_repo=False) or ", ".join(job.phases)
    yield "results below OUT", lambda: _results(job)
    if any(row_of(phase).section for phase in job.phases):
        yield from dry.checks({stage.phase for stage in chain(job.recipe)} | set(job.phases))


def _stages(job: Job) -> list[Stage]:
    return [stage for stage in stages(job.recipe) if stage.phase in job.phases]


def _artifacts(job: Job) -> list[str]:
    """The results this job makes, in order."""
    if job.phase != ALL:
        return job.artifacts
    return [name for stage in _stages(job) for name in stage.artifacts]


def _results(job: Job) -> str:
    """Raises ValueError when a result is damaged or of another recipe, or one that a single phase needs is missing."""
    to_do: set[str] = set()
    for stage in _stages(job):
        to_do |= {stage.artifacts[i] for i in missing(stage, job.out, job.recipe)}
    if job.phase != ALL and to_do & set(job.artifacts):
        for name in _inputs(job):
            require(job.out, name, job.recipe, f"--phase {job.phase}")
    complete = [name for name in _artifacts(job) if name not in to_do]
    return f"{', '.join(complete)} complete" if complete else "none complete"


def _inputs(job: Job) -> list[str]:
    """The results of other phases that a single phase reads."""
    makes = set(job.artifacts)
    names: dict[str, None] = {}
    for stage in _stages(job):
        if makes & set(stage.artifacts):
            names |= dict.fromkeys(stage.inputs)
    return [name for name in names if name not in makes]


def _state(job: Job, name: str) -> str:
    folder = job.out / name
    phase = name.split("_")[0]
    source = {"meta": job.recipe.meta.source, "distill": job.recipe.distill.source}.get(phase)
    if (folder / "result.json").is_file():
        return "complete"
    if source:
        return f"from {source}"
    if (folder / "checkpoints" / "latest.json").is_file():
        return "to continue"
    return "to do"


def _cost(job: Job, dry: DryRun, world: int) -> str:
    """Images and FLOPs of training per result; hours where a finished phase below OUT shows the speed."""
    speeds = Speeds(finished(job.out))
    lines = []
    left = Cost(0.0, 0.0)
    hours_left = 0.0
    for name in _artifacts(job):
        cost, state = dry.costs.get(name), _state(job, name)
        measured = speeds.of(name)
        rate = measured.flops_per_second if measured else 0.0
        if not rate and speeds.slowest is not None:
            rate = speeds.slowest.flops_per_second
        hours = cost.flops / rate / world / 3600 if cost is not None and rate else None
        lines.append((name, state, *_cells(cost, hours)))
        if cost is not None and state.startswith("to "):
            left = Cost(left.images + cost.images, left.flops + cost.flops)
            hours_left += hours or 0.0
    lines.append(("total", "to train", *_cells(left, hours_left if speeds.slowest else None)))
    source = "hours need a speed: no phase below OUT is finished"
    if speeds.slowest is not None:
        speed = f"{speeds.slowest.name}, {speeds.slowest.flops_per_second / 1e9:.3g} GFLOP/s per rank"
        source = (
            f"hours at the speed of what is finished below {job.out}, evaluation and saving included, and of phases of "
            f"which nothing is at the slowest ({speed})"
        )
    text = table(("result", "state", "images", "FLOPs", "hours"), lines)
    return f"{text}\nimages and FLOPs from the start of each; {source}; start-up comes on top"


def _cells(cost: Cost | None, hours: float | None) -> tuple[str, str, str]:
    if cost is None:
        return "-", "-", "-"
    return f"{cost.images:,.0f}", f"{cost.flops:.3g}", "-" if hours is None else f"{hours:.3g}"
