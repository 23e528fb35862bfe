"""What a chain of jobs needs from the user: each setting by environment (slurm/m2mkd_vmoe.sh exports them) or flag."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.chain.following.options import HELP as FOLLOWING_HELP
from trainer.config import gpus
from trainer.config.knobs import knob, require
from trainer.request.graph import stage_names
from trainer.request.stages import CELL, DOWNLOAD, GATHER

COMMANDS = ("submit", "plan", "status", "logs", "wait", "cancel")
STAGES = (DOWNLOAD, *stage_names(), CELL, GATHER)
ONLINE = (DOWNLOAD, "push", GATHER)  # one task without GPU; the first two on a node with internet
JOBS = "jobs"  # folder of a study's jobs, below its own
ONLINE_CPUS = "4"  # of such a task, unless cpus_per_task names one for it
TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")
SIGNAL_EARLY = 60  # seconds that Slurm may send --signal before its time (man sbatch)
GPU_REQUESTS = ("gres", "gpus-per-node", "gpus-per-task")
# settings that take values per stage
PER_STAGE = (
    "nodes",
    "gpus_per_node",
    "gpu_type",
    "cpus_per_task",
    "mem",
    "time",
    "partition",
    "qos",
    "constraint",
    "reservation",
    "elements_per_job",
)
# what is refused unless it is asked for by name -> in words
ACCEPT = {
    "across": "expert groups that straddle nodes",
    "down": "a partition that is not up",
    "mixed": "jobs whose nodes may have different GPUs",
}


@dataclass(frozen=True)
class Settings:
    """One chain. What is marked "per stage" takes one value, or exceptions by stage: "4,distill=1,evaluate=1".

    Stages download and push need no GPU: of mem, qos, constraint, reservation and cpus_per_task they take only what
    names them ("400G,download=8G"), and of sbatch_args nothing.
    """

    recipe: str = knob("", "recipes/*.yaml: what is trained")
    ds_config: str = knob("", "ds_configs/*.json: how it is spread over ranks")
    out: str = knob("", "folder of the run, on a file system that every node sees")
    nodes: str = knob("1", "nodes per job, per stage: 4,distill=1,evaluate=1")
    gpus_per_node: str = knob("8", "GPUs per node, per stage; 0 = CPU only")
    gpu_type: str = knob("", "type of these GPUs, as in --gres=gpu:a100:8, per stage; empty = any")
    gpu_request: str = knob("gres", f"how GPUs are asked for: {', '.join(GPU_REQUESTS)}")
    tasks_per_node: int = knob(0, "ranks per node; 0 = one per GPU")
    cpus_per_task: str = knob("8", f"CPU cores per rank, per stage; download and push: {ONLINE_CPUS} unless named")
    mem: str = knob("", "memory per node, as sbatch --mem, per stage; empty = the cluster's default")
    time: str = knob("24:00:00", "time limit of one job, per stage: 24:00:00,evaluate=01:00:00")
    partition: str = knob("", "partition, per stage: gpu,distill=a100; empty = the cluster's default, here and below")
    download_partition: str = knob("", "partition of the CPU jobs that download and push")
    download_args: str = knob("", "more sbatch flags of these two, separated by spaces")
    account: str = knob("", "account to charge; empty = that of the driver job, or your default")
    qos: str = knob("", "quality of service, per stage")
    constraint: str = knob("", "node features, per stage")
    reservation: str = knob("", "reservation to run in, per stage")
    exclude: str = knob("", "nodes to avoid")
    after: str = knob("", "ids of other jobs, 12:13, that must end well before the first stages start")
    mail: str = knob("", "address for END, FAIL and REQUEUE mails")
    hook: str = knob("", 'shell command run by a job at done, failed and requeued; "$1" result, "$2" event, "$3" text')
    sbatch_args: str = knob("", "more sbatch flags, separated by spaces; not of download and push")
    srun_args: str = knob("", "more srun flags")
    container: str = knob("", "image that the ranks run in; the driver and the node check do not")
    container_runtime: str = knob("pyxis", "pyxis (flags of srun), or a command such as apptainer or singularity")
    container_mounts: str = knob("", "more folders it sees, /data:/data,...; the run and the checkout it always sees")
    env_file: str = knob("", "shell file sourced before python starts: modules, conda, variables")
    python: str = knob("python", "interpreter on login and compute nodes, after env_file")
    array_throttle: int = knob(0, "jobs of one array (modules, experts) running at once; 0 = all")
    elements_per_job: str = knob("1", "elements of an array that one job makes in turn, per stage: 1,expert=8")
    level: str = knob("", "distillation jobs: one per module, or one per expert first (expert); empty = as the recipe")
    warn_seconds: int = knob(300, "warning before the time limit: a save and an evaluation must fit in")
    max_requeues: int = knob(20, "restarts of one job, whatever the reason")
    max_idle_requeues: int = knob(1, "restarts in a row that gained no training step")
    accept: str = knob("", f"go on with what is refused otherwise: {', '.join(ACCEPT)} (docs/slurm.md)")
    speed_from: str = knob("", "plan: a finished run folder whose measured speed the estimate uses")
    gpu_kind: str = knob("", "plan: GPU of the nodes, e.g. h200 (docs/scaling.md): memory, traffic and time by phase")
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("recipe", "ds_config", "out"):
            path = getattr(self, name)
            require(path, name, path, f"a path: set {name.upper()} or --{_flag(name)}")
        require(self.level in ("", "module", "expert"), "level", self.level, "module or expert, or nothing")
        require(self.gpu_request in GPU_REQUESTS, "gpu_request", self.gpu_request, "one of " + ", ".join(GPU_REQUESTS))
        require(all(job.isdigit() for job in self.waits_for), "after", self.after, "job ids, as 12:13")
        for word in self.accepted:
            require(word in ACCEPT, "accept", self.accept, "of " + ", ".join(ACCEPT))
        if self.gpu_kind:
            gpus.parse(self.gpu_kind)
        for name in ("warn_seconds", "max_idle_requeues"):
            value = getattr(self, name)
            require(value >= 1, name, value, "1 or more")
        for stage in STAGES:
            self._check(stage)

    def _check(self, stage: str) -> None:
        """What is given for one stage."""
        require(self.nodes_of(stage) >= 1, "nodes", self.nodes, "1 or more")
        require(self.cpus_of(stage) >= 1, "cpus_per_task", self.cpus_per_task, "1 or more")
        require(self.elements_of(stage) >= 1, "elements_per_job", self.elements_per_job, "1 or more")
        if self.gpus_of(stage) == 0 and stage not in ONLINE:
            expected = "1 or more ranks per node when gpus_per_node is 0"
            require(self.tasks_per_node > 0, "tasks_per_node", self.tasks_per_node, expected)
        require(TIME.fullmatch(self.time_of(stage)), "time", self.time, "[days-]hours:minutes:seconds")
        seconds = self.hours_of(stage) * 3600
        if stage not in (*ONLINE, "evaluate") and seconds <= self.warn_seconds + SIGNAL_EARLY:
            raise ValueError(
                f"time of {stage} is {self.time_of(stage)} and warn_seconds is {self.warn_seconds}: the warning may "
                f"come {SIGNAL_EARLY} s early, so such a job would be told to stop when it starts. Raise --time, "
                "or lower --warn-seconds to what a save and an evaluation take"
            )
        for name in ("partition", "qos", "constraint", "reservation", "mem", "gpu_type"):
            self.of(name, stage)

    @property
    def recipe_overrides(self) -> list[str]:
        """What changes the recipe, the later the stronger."""
        words = [word for word in self.overrides if not word.startswith("ds.")]
        if self.level:
            words.insert(0, f"distill.level={self.level}")
        return words

    @property
    def ds_overrides(self) -> list[str]:
        """What changes the DeepSpeed JSON."""
        return [word for word in self.overrides if word.startswith("ds.")]

    @property
    def run(self) -> Path:
        """The run's folder, absolute: jobs start elsewhere."""
        return Path(self.out).absolute()

    @property
    def title(self) -> str:
        """What the names of its jobs begin with."""
        return self.run.parent.name if self.run.name == JOBS else self.run.name

    @property
    def held(self) -> bool:
        """Whether the user wants the jobs held: they release them by themselves."""
        return not {"-H", "--hold"}.isdisjoint(shlex.split(self.sbatch_args))

    @property
    def waits_for(self) -> list[str]:
        """Ids of the jobs before the first stages."""
        return self.after.split(":") if self.after else []

    @property
    def accepted(self) -> tuple[str, ...]:
        """Words of ACCEPT that were given."""
        return tuple(word.strip() for word in self.accept.split(",") if word.strip())

    @property
    def unit(self) -> str:
        """What hours are counted of: GPU, or rank where no stage has any."""
        return "GPU" if any(self.gpus_of(stage) for stage in STAGES) else "rank"

    def of(self, name: str, stage: str) -> str:
        """A setting as a stage has it; what GPU jobs are given is not handed on to download and push."""
        text = str(getattr(self, name))
        chosen = _per_stage(name, text, stage)
        if stage in ONLINE and not _names(text, stage):
            return self.download_partition or chosen if name == "partition" else ""
        return chosen

    def nodes_of(self, stage: str) -> int:
        """Nodes of a stage's jobs."""
        nodes = _count("nodes", self.nodes, stage)
        return 1 if stage in ONLINE else nodes

    def gpus_of(self, stage: str) -> int:
        """GPUs per node of a stage's jobs."""
        count = _count("gpus_per_node", self.gpus_per_node, stage)
        return 0 if stage in ONLINE else count

    def ranks_of(self, stage: str) -> int:
        """Ranks per node of a stage's jobs: one per GPU unless tasks_per_node says otherwise."""
        return 1 if stage in ONLINE else self.tasks_per_node or self.gpus_of(stage)

    def cpus_of(self, stage: str) -> int:
        """CPU cores per rank of a stage's jobs."""
        count = _count("cpus_per_task", self.cpus_per_task, stage)
        return int(self.of("cpus_per_task", stage) or ONLINE_CPUS) if stage in ONLINE else count

    def elements_of(self, stage: str) -> int:
        """Elements of a stage's array that share a job, at most."""
        return _count("elements_per_job", self.elements_per_job, stage)

    def time_of(self, stage: str) -> str:
        """Time limit of a stage's jobs."""
        return _per_stage("time", self.time, stage)

    def hours_of(self, stage: str) -> float:
        """The same in hours."""
        return hours(self.time_of(stage))


def hours(text: str) -> float:
    """A time as Slurm writes it, [days-]hours:minutes:seconds, minutes:seconds or minutes, in hours."""
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:  # days-hours[:minutes[:seconds]]
        whole, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 1:  # minutes
        whole, minutes, seconds = [0, *parts, 0]
    else:  # [hours:]minutes:seconds
        whole, minutes, seconds = [0, *parts][-3:]
    return int(days or 0) * 24 + whole + minutes / 60 + seconds / 3600


def read(
    arguments: Sequence[str],
    environ: Mapping[str, str] = os.environ,
    program: str = "slurm/m2mkd_vmoe.sh",
    more_help: str = "",
) -> tuple[str, Settings]:
    """The command and the settings: a flag beats the environment, which beats the default.

    Args:
        program: what --help calls it.
        more_help: the end of its text.

    Raises:
        ValueError: a setting without a meaning; the message names it.
    """
    fields = [field for field in dataclasses.fields(Settings) if field.name != "overrides"]
    parser = argparse.ArgumentParser(
        prog=program,
        epilog=f"section.key=value overrides the recipe, ds.section.key=value the DeepSpeed JSON.\n\n{FOLLOWING_HELP}"
        + more_help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="submit|plan|status|logs|wait|cancel [section.key=value ...]")
    for field in fields:
        parser.add_argument(f"--{_flag(field.name)}", dest=field.name, help=field.metadata["help"])
    flags = vars(parser.parse_intermixed_args(arguments))
    words = flags.pop("words")
    command = "submit"
    if words and "=" not in words[0]:
        command = words.pop(0)
    require(command in COMMANDS, "command", command, "one of " + ", ".join(COMMANDS))
    values: dict[str, Any] = {}
    for field in fields:
        text = flags[field.name]
        if text is None:
            text = environ.get(field.name.upper(), "")
        if text == "":
            continue
        values[field.name] = _number(field.name, text) if isinstance(field.default, int) else text
    if "account" not in values and environ.get("SLURM_JOB_ACCOUNT"):  # of the driver job
        values["account"] = environ["SLURM_JOB_ACCOUNT"]
    overrides = (*environ.get("OVERRIDES", "").split(), *words)
    return command, Settings(**values, overrides=overrides)


def _per_stage(name: str, text: str, stage: str) -> str:
    """What `text` says for this stage: its first value, or that of the last stage=value.

    A part without "=" belongs to the value before it, so that a partition may be "a,b,distill=c,d".
    """
    values = _by_stage(name, text)
    return values.get(stage, values[""])


def stages_named(settings: Settings) -> dict[str, list[str]]:
    """Stages that have a value of their own, each with the settings that give it."""
    named: dict[str, list[str]] = {}
    for name in PER_STAGE:
        for stage in _by_stage(name, str(getattr(settings, name))):
            if stage:
                named.setdefault(stage, []).append(name)
    return named


def _names(text: str, stage: str) -> bool:
    """Whether a setting has a value for just this stage."""
    return stage in _by_stage("", text)


def _by_stage(name: str, text: str) -> dict[str, str]:
    """The value of every stage that is named, and under "" that of the others."""
    values = {"": ""}
    last = ""
    for i, part in enumerate(text.split(",")):
        key, equals, value = part.strip().partition("=")
        if equals:
            if key not in STAGES:
                raise ValueError(f"{name} is {text!r}: {key!r} is no stage. Stages are {', '.join(STAGES)}")
            last = key
            values[key] = value
        elif i == 0:
            values[""] = part.strip()
        else:
            values[last] += f",{part.strip()}"
    return values


def _count(name: str, text: str, stage: str) -> int:
    value = _per_stage(name, str(text), stage)
    require(value.isdigit(), name, text, 'a whole number, or "4,distill=1"')
    return int(value)


def _number(name: str, text: str) -> int:
    require(text.strip().isdigit(), name, text, "a whole number")
    return int(text)


def _flag(name: str) -> str:
    return name.replace("_", "-")
