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

from trainer.chain import cluster, frozen, slurm
from trainer.chain.cost import cost, gpu_of, speeds_of
from trainer.chain.internet import hub_environ
from trainer.chain.settings import STAGES, Settings
from trainer.chain.slots import slots
from trainer.chain.submit import ROOT, Order, dependency, header, load, plan_orders, write_folder
from trainer.config.recipe import Recipe
from trainer.request.stages import chain, hub_names

DRY_RUN_LIMIT = 1800  # seconds
PATIENCE = 15  # seconds without a line


def show(settings: Settings) -> int:
    """Print the plan. Exit code 1 when the dry run or the scheduler found a problem.

    Raises:
        ValueError: the recipe, the DeepSpeed JSON and the ranks do not fit.
    """
    recipe, ds_values = load(settings)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "scripts"
        array_size, silence = _max_array_size()
        orders = plan_orders(settings, recipe, folder, array_size)
        ordered = {order.stage.name for order in orders}
        finished = [stage.name for stage in chain(recipe) if stage.name not in ordered]
        complete = f"; complete already: {', '.join(finished)}" if finished else ""
        print(f"run folder {settings.run}{complete}")
        if not orders:
            print("every stage is complete, nothing would be submitted")
            return 0
        print(f"\n{commands(settings, orders)}")
        write_folder(settings, recipe, ds_values, folder, orders)
        print(f"\ndry run of every phase on this machine's CPU; a line every {PATIENCE} s while it lasts", flush=True)
        report = _dry_run(settings, recipe, folder)
        print(f"\ncost\n{cost(settings, orders, report['flops'], speeds_of(settings))}")
        for line in slots(settings, orders):
            print(line)
        if report.get("plan"):
            print(f"\n{report['plan']}")
        print("\nfound by the dry run")
        for line in report["checks"]:
            print(f"  ok       {line}")
        for line in report["problems"]:
            print(f"  PROBLEM  {line}")
        mixed = _other_code(settings, recipe, orders)
        if mixed:
            print(f"  PROBLEM  {mixed}")
        refused = ask_scheduler(settings, orders, silence)
    return 1 if report["problems"] or mixed or refused else 0


def _other_code(settings: Settings, recipe: Recipe, orders: Sequence[Order]) -> str:
    """Why what is finished does not go with the code as it is now; empty when it does."""
    try:
        frozen.refuse_other_code(ROOT, settings.run, recipe, [(order.stage, order.elements) for order in orders])
    except ValueError as error:
        return str(error)
    return ""


def _max_array_size() -> tuple[int | None, str]:
    """What the cluster says, and why it says nothing: a controller that is away is not asked again, for 30 s each."""
    try:
        return cluster.max_array_size(), ""
    except slurm.SlurmError as error:
        return None, str(error)


def commands(settings: Settings, orders: Sequence[Order]) -> str:
    """The sbatch calls as they would be made, ids written as $JOB_<stage>."""
    lines = []
    for order in orders:
        stage = order.stage
        waits = dependency([f"$JOB_{name}" for name in order.after] or settings.waits_for)
        sets = "+=:" if order.script.stem != stage.name else "="  # of several arrays
        sbatch = [
            f"JOB_{stage.name}{sets}$(sbatch --parsable",
            *header(settings, stage),
            *order.flags,
            *waits,
            f"{settings.run}/slurm/N/{order.script.name})",
        ]
        lines.append(" \\\n    ".join(sbatch))
        if stage.phase == "download":  # not of trainer/run.py
            continue
        srun = f"srun {settings.srun_args} {settings.python} trainer/run.py --phase {stage.phase}"
        srun += f" {_element(order)} {shlex.join(stage.arguments)}"
        tasks = settings.nodes_of(stage.setting) * settings.ranks_of(stage.setting)
        lines.append(f"#   runs, as {tasks} tasks: {' '.join(srun.split())}")
    return "\n".join(lines)


def _element(order: Order) -> str:
    """The flags that tell an array's elements apart."""
    stage, offset = order.stage, order.offset
    element = "SLURM_ARRAY_TASK_ID"
    if order.per_job > 1:
        element = "ELEMENT"  # one after another
    elif offset:
        element = f"({element} + {offset})"
    if stage.experts:
        return f"--module $(({element} / {stage.experts})) --expert $(({element} % {stage.experts}))"
    if stage.array:
        return f"--module $(({element}))" if element.startswith("(") else f"--module ${element}"
    return ""


def _dry_run(settings: Settings, recipe: Recipe, folder: Path) -> dict:
    """Run trainer.plan.rehearsal in a process of its own: this one stays without torch.

    Returns:
        Its report: "checks" and "problems" in words, "flops" of each artifact.
    """
    report = folder / "report.json"
    ranks = {name: [settings.nodes_of(name), settings.ranks_of(name)] for name in STAGES}
    flags = {
        "--recipe": str(folder / "recipe.yaml"),
        "--ds_config": str(folder / "ds_config.json"),
        "--out": str(settings.run),
        "--report": str(report),
        "--ranks": json.dumps(ranks),
    }
    if settings.gpu_kind:
        flags["--gpu"] = gpu_of(settings)
    command = [sys.executable, "-m", "trainer.plan.rehearsal"]
    for flag, value in flags.items():
        command += [flag, value]
    for_hub, said = hub_environ() if hub_names(recipe) else ({}, "")
    if said:
        print(said, flush=True)
    environ = slurm.clean_environ() | for_hub | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    code, words = _watched(command, environ, Path(f"{report}.now"))
    if code is None:
        return {"checks": [], "problems": [f"not finished after {DRY_RUN_LIMIT} s"], "flops": {}}
    if code:
        *_, last_line = ["no output", *words.strip().splitlines()]
        return {"checks": [], "problems": [f"ended with exit code {code}: {last_line}"], "flops": {}}
    return json.loads(report.read_text())


def _watched(command: Sequence[str], environ: Mapping[str, str], now: Path) -> tuple[int | None, str]:
    """Run the dry run; every PATIENCE seconds a line says which check it is at.

    Args:
        now: file in which the dry run names it.

    Returns:
        Exit code, None when DRY_RUN_LIMIT has passed, and what was written to standard error.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=errors, text=True)
        try:
            for seconds in range(PATIENCE, DRY_RUN_LIMIT + 1, PATIENCE):
                try:
                    code = process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    check = now.read_text() if now.is_file() else "starting"
                    print(f"  {seconds} s  {check}", flush=True)
                    continue
                errors.seek(0)
                return code, errors.read()
            return None, ""
        finally:
            process.kill()  # nothing, once it has ended
            process.wait()


def ask_scheduler(settings: Settings, orders: Sequence[Order], silence: str) -> bool:
    """The partitions, and sbatch --test-only of every job; True when one is refused, or nothing answered.

    Args:
        silence: why Slurm gave no answer when it was asked before; empty when it did.
    """
    if not shutil.which("sbatch", path=os.environ.get("PATH")):
        print("\nscheduler: no sbatch on PATH here, so it was not asked (sbatch --test-only)")
        return False
    print("\nscheduler (scontrol show partition, sbatch --test-only)")
    if silence:
        print(f"  NO ANSWER  {silence}")
        return True
    problems = cluster.problems(settings, [order.stage for order in orders])
    for problem in problems:
        print(f"  PROBLEM  {problem}")
    refusals: set[str] = set()
    for order in orders:
        try:
            print(f"  ok       {order.stage.name}: {slurm.test_only(order.flags, str(order.script))}")
        except slurm.SlurmError as error:
            if str(error) not in refusals:  # usually the same for every job
                print(f"  PROBLEM  {order.stage.name}: {error}")
            refusals.add(str(error))
    return bool(refusals or problems)
