"""`plan`: every command and dependency, resources, cost with the source of the estimate, a dry run of every phase."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.chain import slurm
from trainer.chain.settings import ONLINE, STAGES, Settings
from trainer.chain.submit import ROOT, Order, dependency, header, load, plan_orders, write_folder
from trainer.config.recipe import Recipe
from trainer.plan.cost import ASSUMED_FLOPS, measured_speed
from trainer.request.stages import Stage, chain
from trainer.tracking.console import table

DRY_RUN_LIMIT = 1800  # seconds


def show(settings: Settings) -> int:
    """Print the plan. Exit code 1 when the dry run or the scheduler found a problem.

    Raises:
        ValueError: the recipe, the DeepSpeed JSON and the ranks do not fit.
    """
    recipe, ds_values = load(settings)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "scripts"
        orders = plan_orders(settings, recipe, folder)
        finished = [stage.name for stage in chain(recipe) if stage.name not in {o.stage.name for o in orders}]
        print(f"run folder {settings.run}" + (f"; complete already: {', '.join(finished)}" if finished else ""))
        if not orders:
            print("every stage is complete, nothing would be submitted")
            return 0
        print("\n" + commands(settings, orders))
        write_folder(settings, recipe, ds_values, folder, orders)
        report = _dry_run(settings, recipe, folder)
        print("\ncost\n" + cost(settings, orders, report["flops"], *speed(settings)))
        print("\ndry run on this machine's CPU")
        for line in report["checks"]:
            print(f"  ok       {line}")
        for line in report["problems"]:
            print(f"  PROBLEM  {line}")
        refused = _ask_scheduler(settings, orders)
    return int(bool(report["problems"]) or refused)


def commands(settings: Settings, orders: Sequence[Order]) -> str:
    """The sbatch calls as they would be made, ids written as $JOB_<stage>."""
    lines = []
    for order in orders:
        flags = [*header(settings, order.stage), *order.flags]
        waits = dependency([f"$JOB_{name}" for name in order.after])
        lines.append(" \\\n    ".join([f"JOB_{order.stage.name}=$(sbatch --parsable", *flags, *waits,
                                      f"{settings.run}/slurm/N/{order.stage.name}.sbatch)"]))  # fmt: skip
        run = f"srun {settings.srun_args} {settings.python} trainer/run.py --phase {order.stage.phase}"
        run += f" {_element(order.stage)} {shlex.join(order.stage.arguments)}"
        tasks = 1 if order.stage.phase in ONLINE else settings.nodes_of(order.stage.setting) * settings.ranks_per_node
        if order.stage.phase != "download":
            lines.append(f"#   runs, as {tasks} tasks: {' '.join(run.split())}")
    return "\n".join(lines)


def _element(stage: Stage) -> str:
    """The flags that tell an array's elements apart."""
    element = "SLURM_ARRAY_TASK_ID"
    if stage.experts:
        return f"--module $(({element} / {stage.experts})) --expert $(({element} % {stage.experts}))"
    return f"--module ${element}" if stage.array else ""


def cost(
    settings: Settings, orders: Sequence[Order], flops: Mapping[str, float], flops_per_second: float, source: str
) -> str:
    """Table of GPU-hours: expected from FLOPs and the speed of one rank, and at most from the time limits."""
    unit = "GPU" if settings.gpus_per_node else "rank"
    lines, expected, limit = [], 0.0, 0.0
    for order in orders:
        name = order.stage.name
        nodes, time = settings.nodes_of(order.stage.setting), settings.time_of(order.stage.setting)
        units = 0 if order.stage.phase in ONLINE else nodes * settings.ranks_per_node
        needed = [flops.get(order.stage.artifacts[i]) for i in order.elements]
        hours = sum(needed) / flops_per_second / 3600 if None not in needed else None
        jobs = len(order.elements) if order.stage.array else 1
        most = jobs * units * settings.hours_of(order.stage.setting)
        expected, limit = expected + (hours or 0.0), limit + most
        expected_here = "-" if hours is None else f"{hours:.3g}"
        lines.append((name, str(jobs), str(nodes), str(units), time, expected_here, f"{most:.3g}"))
    lines.append(("total", "", "", "", "", f"{expected:.3g}", f"{limit:.3g}"))
    head = ("stage", "jobs", "nodes", f"{unit}s", "time limit", f"{unit}-hours expected", "at most")
    return table(head, lines) + f"\nexpected: {source}; start-up, evaluation and saving come on top"


def speed(settings: Settings) -> tuple[float, str]:
    """FLOP/s of one rank and where the number is from: this run, --speed-from, or an assumption said to be one."""
    folders = [settings.run, *([Path(settings.speed_from)] if settings.speed_from else [])]
    return measured_speed(folders) or (
        ASSUMED_FLOPS,
        f"{ASSUMED_FLOPS / 1e12:.0f} TFLOP/s per GPU, an assumption (no stage of {settings.run} is finished; "
        "--speed-from FINISHED_RUN uses a measured one)",
    )


def _dry_run(settings: Settings, recipe: Recipe, folder: Path) -> dict:
    """Run trainer.chain.dryrun in a process of its own: this one stays without torch."""
    report = folder / "report.json"
    ranks = {name: [settings.nodes_of(name), settings.ranks_per_node] for name in STAGES}
    command = [sys.executable, "-m", "trainer.plan.rehearsal", "--recipe", str(folder / "recipe.yaml"), "--ds_config",
               str(folder / "ds_config.json"), "--out", str(settings.run), "--report", str(report), "--ranks",
               json.dumps(ranks)]  # fmt: skip
    environ = slurm.clean_environ() | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DRY_RUN_LIMIT)
    except subprocess.TimeoutExpired:
        return {"checks": [], "problems": [f"not finished after {DRY_RUN_LIMIT} s"], "flops": {}}
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"checks": [], "problems": [f"ended with exit code {done.returncode}: {words}"], "flops": {}}
    return json.loads(report.read_text())


def _ask_scheduler(settings: Settings, orders: Sequence[Order]) -> bool:
    """sbatch --test-only of every job; True when one is refused."""
    if not shutil.which("sbatch", path=os.environ.get("PATH")):
        print("\nscheduler: no sbatch on PATH here, so it was not asked (sbatch --test-only)")
        return False
    print("\nscheduler (sbatch --test-only)")
    said: set[str] = set()
    for order in orders:
        try:
            print(f"  ok       {order.stage.name}: {slurm.test_only(order.flags, str(order.script))}")
        except slurm.SlurmError as error:
            if str(error) not in said:  # usually the same for every job
                print(f"  PROBLEM  {order.stage.name}: {error}")
            said.add(str(error))
    return bool(said)
