"""Submit the chain, whole or what is missing of it.

RUN/jobs.tsv names every job at once after its submission; RUN/slurm/<n>/ holds what submission n runs: the job scripts,
the resolved recipe and DeepSpeed JSON, the code, its commit and package versions.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from trainer import artifacts
from trainer.artifacts import missing
from trainer.chain import arrays, cluster, containers, fits, frozen, slurm, together
from trainer.chain.settings import ONLINE, Settings
from trainer.chain.together import say
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe, to_dict
from trainer.config.recipe import Recipe
from trainer.disk import lock, write_json
from trainer.request.stages import DOWNLOAD, FOLLOWING, GATHER, Stage, chain
from trainer.writer_lock import WriterLock

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("submitted", "stage", "array", "job", "depends", "script", "offset", "per_job")
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre mounted without flock, some NFS
STAGES_FILE = "stages.json"  # of a submission that is no chain of one recipe
NAMED = 6  # of what a job waits for
OLDER = 6  # columns that a line of an older version has


@dataclass(frozen=True)
class Row:
    """One line of RUN/jobs.tsv."""

    submitted: str
    stage: str
    array: str  # "0,2", or "-" for a plain job
    job: str
    depends: str  # ids, or "-"
    script: str
    offset: str = "0"  # of the task ids
    per_job: str = "1"  # elements that may share a job

    def task(self, element: int | None) -> int | None:
        """The task id of an element in Slurm."""
        return None if element is None else arrays.task_of(element, int(self.offset), int(self.per_job))

    def job_log(self, element: int | None) -> str:
        """The log of slurm/phase.sbatch below RUN/logs.

        Args:
            element: of an array; None = a plain job.
        """
        task = self.task(element)
        return f"{self.stage}-{self.job}.out" if task is None else f"{self.stage}-{self.job}_{task}.out"

    def rank_logs(self, element: int | None) -> str:
        """The folder below RUN/logs that it keeps the logs of an element's ranks in."""
        folder = self.job_log(element).removesuffix(".out")
        return folder if self.per_job == "1" else f"{folder}.{element}"


@dataclass(frozen=True)
class Order:
    """One sbatch call of a chain, before the ids of the others are known."""

    stage: Stage
    elements: list[int]
    script: Path
    flags: list[str]
    offset: int  # of the task ids of its array
    after: list[str]  # stages of the same submission
    after_elements: tuple[int, ...] = ()  # elements of its own stage, in orders before it
    even_if_failed: bool = False  # whether it starts when those it waits for have ended in any way
    per_job: int = 1  # elements that may share a job

    @property
    def jobs(self) -> int:
        """Jobs that it makes."""
        if not self.stage.array:
            return 1
        return len(arrays.Array(tuple(self.elements), self.offset, self.per_job).tasks)


def submit(settings: Settings) -> int:
    """Submit what is missing of the chain.

    Raises:
        ValueError: the recipe, the DeepSpeed JSON and the ranks do not fit, or jobs of this run are still live.
        SlurmError: a submission failed; what had been submitted before it is cancelled.
    """
    recipe, ds_values = load(settings)
    slurm.require_sbatch()
    with new_submission(settings.run) as folder:
        orders = plan_orders(settings, recipe, folder, cluster.max_array_size())
        if not orders:
            say(f"{settings.run}: every stage is complete, nothing to submit")
            return 0
        frozen.refuse_other_code(ROOT, settings.run, recipe, [(order.stage, order.elements) for order in orders])
        hand_in(settings, folder, orders, lambda: write_folder(settings, recipe, ds_values, folder, orders))
    say(f"\nstate and progress: bash slurm/m2mkd_vmoe.sh status --out {shlex.quote(settings.out)}")
    return 0


@contextmanager
def new_submission(run: Path, besides: Sequence[str] = ()) -> Iterator[Path]:
    """In the block nobody else submits for this run, and nothing of it is live; gives the folder RUN/slurm/<n>.

    Args:
        besides: ids of jobs that may be live: the one that submits.

    Raises:
        ValueError: another submission is under way, or jobs of this run are live.
    """
    with _locked(run):
        together.take_back_unfinished(run)
        refuse_live(run, besides)
        submissions_before = list(run.glob("slurm/[0-9]*"))
        yield run / "slurm" / str(len(submissions_before) + 1)


def hand_in(settings: Settings, folder: Path, orders: Sequence[Order], write: Callable[[], None]) -> None:
    """Submit what is planned: ask the cluster, write the folder, freeze the code, and then all jobs or none.

    Args:
        write: writes what the jobs read beside the code, the job scripts among it.

    Raises:
        ValueError: the cluster does not allow it; nothing is written.
        SlurmError: a submission failed; what had been submitted before it is cancelled.
    """
    for job in settings.waits_for:
        slurm.refuse_as_parent(job)
    refuse_impossible(settings, orders)
    write()
    (settings.run / "logs").mkdir(exist_ok=True)  # Slurm starts no job whose log folder is absent, and says nothing
    try:
        ask_scheduler(settings, orders)
        about = {"settings": asdict(settings), "versions": artifacts.versions()} | frozen.freeze(ROOT, folder)
        write_json(folder / "submission.json", about)
    except BaseException:
        shutil.rmtree(folder)
        raise
    _submit_all(settings, folder, orders)


def stages_of(folder: Path) -> list[Stage]:
    """The stages of a submission RUN/slurm/<n>: those of its recipe, or those that it lists itself (a study)."""
    listed = folder / STAGES_FILE
    if not listed.is_file():
        return chain(load_recipe(folder / "recipe.yaml"))
    stages = []
    for values in json.loads(listed.read_text()):
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        stages.append(Stage(**plain))
    return stages


def refuse_impossible(settings: Settings, orders: Sequence[Order]) -> None:
    """Raise ValueError where the cluster's partitions do not allow what is to be submitted, with all reasons."""
    problems = cluster.problems(settings, [order.stage for order in orders])
    if problems:
        raise ValueError("nothing was submitted. " + "; ".join(problems))


def ask_scheduler(settings: Settings, orders: Sequence[Order]) -> None:
    """sbatch --test-only of every job that asks for something else than those before it; raises what it raises."""
    asked = set()
    for order in orders:
        flags = tuple(flag for flag in header(settings, order.stage) if not flag.startswith(("--job-name", "--output")))
        if (flags, *order.flags) not in asked:
            slurm.test_only(order.flags, str(order.script))
        asked.add((flags, *order.flags))


def load(settings: Settings) -> tuple[Recipe, dict]:
    """Recipe and DeepSpeed JSON with the overrides, checked against the ranks of every stage. Without torch."""
    recipe = load_recipe(settings.recipe, settings.recipe_overrides)
    ds_values = read_ds_config(settings.ds_config, settings.ds_overrides)
    fits.check(settings, recipe, ds_values)
    recipe, said = fits.with_fewer_workers(settings, recipe)
    if said:
        say(said)
    return recipe, ds_values


def plan_orders(settings: Settings, recipe: Recipe, folder: Path, max_array_size: int | None = None) -> list[Order]:
    """The sbatch calls for what is missing, in order; finished stages drop out of the dependencies.

    Args:
        folder: of the job scripts.
        max_array_size: of the cluster; an array of more becomes several.
    """
    orders: list[Order] = []
    for stage in chain(recipe):
        elements = missing(stage, settings.run, recipe)
        waits_for = list(dict.fromkeys(order.stage.name for order in orders if order.stage.name in stage.needs))
        if waits_for and stage.phase in FOLLOWING:
            elements = [0]
        if elements and not stage.array:
            orders.append(Order(stage, elements, folder / f"{stage.name}.sbatch", [], 0, waits_for))
        elif elements:
            orders += _arrays_of(settings, stage, elements, folder, waits_for, max_array_size)
    return orders


def write_folder(settings: Settings, recipe: Recipe, ds_values: dict, folder: Path, orders: Sequence[Order]) -> None:
    """Write what the jobs of one submission read beside the code: recipe, DeepSpeed JSON and job scripts."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe), sort_keys=False))
    (folder / "ds_config.json").write_text(json.dumps(ds_values, indent=1) + "\n")
    for order in orders:
        order.script.write_text(render(settings, order, folder))


def render(settings: Settings, order: Order, folder: Path, work: Path = ROOT) -> str:
    """The job script: header, settings, and the one body slurm/phase.sbatch.

    Args:
        work: the checkout: what is named relative to it still is (pictures, env.sh, .venv).
    """
    stage = order.stage
    _, _, body = (ROOT / "slurm/phase.sbatch").read_text().partition("\n")  # behind its own #!/bin/bash
    if stage.phase == GATHER:
        settings = replace(settings, container="")  # it submits jobs, which no image can
    variables = {
        "ROOT": folder / "code",
        "WORK": work,
        "RUN": settings.run,
        "STAGE": stage.name,
        "PHASE": stage.phase,
        "ARTIFACTS": stage.artifacts,
        "INPUTS": stage.inputs,
        "TRAINER_ARGS": _arguments(settings, stage, folder),
        "EXPERTS": stage.experts,
        "ELEMENTS": [str(element) for element in order.elements] if stage.array else [],
        "OFFSET": order.offset,
        "PER_JOB": order.per_job,
        "PYTHON": settings.python,
        "ENV_FILE": settings.env_file,
        "SRUN_ARGS": [*shlex.split(settings.srun_args), *containers.srun_flags(settings, work)],
        "CONTAINER": containers.command(settings, work, gpus=settings.gpus_of(stage.setting) > 0),
        "HAS_CONTAINER": int(bool(settings.container)),
        "GPUS": settings.gpus_of(stage.setting),
        "HOOK": settings.hook,
        "WARN_SECONDS": settings.warn_seconds,
        "MAX_REQUEUES": settings.max_requeues,
        "MAX_IDLE_REQUEUES": settings.max_idle_requeues,
        "SCRIPT": order.script,
    }
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH {flag}" for flag in header(settings, stage)]
    lines.append("")
    for name, value in variables.items():
        if isinstance(value, list | tuple):
            lines.append(f"{name}=({shlex.join(value)})")
        else:
            lines.append(f"{name}={shlex.quote(str(value))}")
    # what was asked for by task was for the job: every step sees all GPUs of a node. Since 24.05 CPUs are in the second
    lines.append("unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK")
    gpus = settings.gpus_of(stage.setting)
    if gpus and settings.gpu_request == "gpus-per-task":
        lines.append(f"export SLURM_GRES=gpu:{gpus}")  # of srun
    return "\n".join([*lines, body])


def _arguments(settings: Settings, stage: Stage, folder: Path) -> list[str]:
    """What the program of a stage is called with, but for what tells an array's elements apart."""
    if stage.of_study or (stage.phase == DOWNLOAD and stage.arguments):
        return list(stage.arguments)
    arguments = ["--recipe", str(folder / "recipe.yaml"), "--out", str(settings.run)]
    if stage.phase != DOWNLOAD:
        arguments += ["--ds_config", str(folder / "ds_config.json"), "--phase", stage.phase, *stage.arguments]
    return arguments


def header(settings: Settings, stage: Stage) -> list[str]:
    """The sbatch flags of a stage that do not depend on what is missing."""
    job = "%A_%a" if stage.array else "%j"  # its id, as Slurm fills it in
    name = stage.setting
    flags = {
        "job-name": f"{settings.title}-{stage.name}",
        "output": str(settings.run / "logs" / f"{stage.name}-{job}.out"),
        "nodes": settings.nodes_of(name),
        "ntasks-per-node": settings.ranks_of(name),
        "cpus-per-task": settings.cpus_of(name),
        **_gpu_flag(settings, name),
        "mem": settings.of("mem", name),
        "time": settings.time_of(name),
        "signal": f"B:USR1@{settings.warn_seconds}",
        "partition": settings.of("partition", name),
        "account": settings.account,
        "qos": settings.of("qos", name),
        "constraint": settings.of("constraint", name),
        "reservation": settings.of("reservation", name),
        "exclude": settings.exclude,
        "mail-user": settings.mail,
        "mail-type": "END,FAIL,REQUEUE" if settings.mail else "",
    }
    set_flags = [f"--{name}={shlex.quote(str(value))}" for name, value in flags.items() if value != ""]
    more = settings.download_args if stage.phase in ONLINE else settings.sbatch_args
    return ["--requeue", "--open-mode=append", *set_flags, *shlex.split(more)]


def _gpu_flag(settings: Settings, stage: str) -> dict[str, str]:
    """How a stage's jobs ask for their GPUs."""
    count = settings.gpus_of(stage)
    if count == 0:
        return {}
    kind = settings.of("gpu_type", stage)
    typed = f"{kind}:" if kind else ""
    if settings.gpu_request == "gres":
        return {"gres": f"gpu:{typed}{count}"}
    if settings.gpu_request == "gpus-per-node":
        return {"gpus-per-node": f"{typed}{count}"}
    return {"gpus-per-task": f"{typed}1"}


def rows(run: Path) -> list[Row]:
    """What was submitted for this run, oldest first."""
    path = run / "jobs.tsv"
    if not path.is_file():
        return []
    lines = path.read_text().splitlines()[1:]  # below COLUMNS
    cells = [line.split("\t") for line in lines]
    return [Row(*row) for row in cells if OLDER <= len(row) <= len(COLUMNS)]  # not a line that a crash cut off


def refuse_live(run: Path, besides: Sequence[str] = ()) -> None:
    """Raise ValueError when jobs of this run still wait or run: two chains would write the same folders.

    Args:
        besides: ids of jobs that may.
    """
    live = [job for job in live_jobs(run) if job.id not in besides]
    if live:
        shown = ", ".join(f"{job.id} {job.state}" for job in live[:6])
        if len(live) > 6:
            shown += " ..."
        raise ValueError(f"jobs of {run} are still live ({shown}): wait for them, or stop them with `cancel`")


def live_jobs(run: Path) -> list[slurm.Job]:
    """Jobs of this run that wait or run: those recorded, and what a killed submission did not come to record."""
    recorded = slurm.jobs(row.job for row in rows(run))
    ids = {job.id for job in recorded}
    unrecorded = [job for job in slurm.jobs_below(run / "slurm") if job.id not in ids]
    return [job for job in (*recorded, *unrecorded) if job.live]


def _arrays_of(
    settings: Settings,
    stage: Stage,
    elements: Sequence[int],
    folder: Path,
    waits_for: list[str],
    max_array_size: int | None,
) -> list[Order]:
    """One order, or as many as the cluster's limit makes of it, each with a script of its own that knows its offset."""
    throttle = f"%{settings.array_throttle}" if settings.array_throttle else ""
    orders = []
    per_job = settings.elements_of(stage.setting)
    for number, array in enumerate(arrays.split(elements, max_array_size, per_job)):
        script = folder / (f"{stage.name}-{number + 1}.sbatch" if number else f"{stage.name}.sbatch")
        flags = [f"--array={array.text}{throttle}"]
        orders.append(Order(stage, list(array.elements), script, flags, array.offset, waits_for, per_job=per_job))
    return orders


def _submit_all(settings: Settings, folder: Path, orders: Sequence[Order]) -> None:
    ids: dict[str, list[str]] = {}  # a stage may be several arrays
    tasks: dict[tuple[str, int], str] = {}  # (stage, element) -> as Slurm calls it
    with together.all_or_nothing(folder, release=not settings.held) as tell:
        for order in orders:
            name = order.stage.name
            parents = [job for parent in order.after for job in ids[parent]]
            parents += dict.fromkeys(tasks[name, element] for element in order.after_elements)
            hold = [] if parents else ["--hold"]
            waits = dependency(parents, order.even_if_failed) or dependency(settings.waits_for)
            parents = parents or settings.waits_for
            job = slurm.submit([*order.flags, *waits, *hold], str(order.script))
            ids.setdefault(name, []).append(job)
            elements = ",".join(map(str, order.elements))
            row = Row(
                submitted=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                stage=name,
                array=elements if order.stage.array else "-",
                job=job,
                depends=":".join(parents) or "-",
                script=str(order.script),
                offset=str(order.offset),
                per_job=str(order.per_job),
            )
            tasks |= {(name, element): f"{job}_{row.task(element)}" for element in order.elements}
            _record(settings.run, row)
            tell(job)
            _make_logs(settings.run, row, order)
            array = f" [{arrays.ranges(order.elements)}]" if order.stage.array else ""
            array += f" in {order.jobs} jobs" if order.per_job > 1 else ""
            waits_for = [*order.after, *(order.stage.artifacts[element] for element in order.after_elements)]
            more = ", ..." if len(waits_for) > NAMED else ""
            after = f" after {', '.join(waits_for[:NAMED])}{more}" if waits_for else ""
            say(f"{name}{array}: job {job}{after}")


def dependency(parents: Sequence[str], even_if_failed: bool = False) -> list[str]:
    """Flags that let a job start only when all parents ended well, and end it when one cannot.

    Args:
        even_if_failed: it starts however they ended, and looks itself at what they left.
    """
    if not parents:
        return []
    if even_if_failed:
        return [f"--dependency=afterany:{':'.join(parents)}"]
    return [f"--dependency=afterok:{':'.join(parents)}", "--kill-on-invalid-dep=yes"]


def _record(run: Path, row: Row) -> None:
    path = run / "jobs.tsv"
    is_new = not path.exists()
    with path.open("a") as f:
        if is_new:
            f.write("\t".join(COLUMNS) + "\n")
        f.write("\t".join(asdict(row).values()) + "\n")
        f.flush()
        os.fsync(f.fileno())


def _make_logs(run: Path, row: Row, order: Order) -> None:
    """The empty logs of a submission: where the disk is full Slurm could not make one, and would start no script."""
    for log in {row.job_log(element) for element in (order.elements if order.stage.array else [None])}:
        (run / "logs" / log).touch()


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """In the block no other process submits this run. Raises ValueError when one does."""
    folder = run / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"another submission of {run} is under way: look at `status` in a moment"
    try:
        give_back = lock(folder / "lock", busy).close
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        give_back = _without_flock(folder, busy)
    try:
        yield
    finally:
        give_back()


def _without_flock(folder: Path, busy: str) -> Callable[[], None]:
    """The lock that results are written under: a file that one process can make, taken over from a dead one.

    Returns:
        What gives it back.
    """
    try:
        return WriterLock(folder).release
    except ValueError as error:
        raise ValueError(f"{busy} ({error})") from None
