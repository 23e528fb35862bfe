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

from trainer.config import gpus
from trainer.config.knobs import knob, require
from trainer.request.graph import stage_names
from trainer.request.stages import DOWNLOAD

COMMANDS = ("submit", "plan", "status", "cancel")
STAGES = (DOWNLOAD, *stage_names())
ONLINE = (DOWNLOAD, "push")  # one task without GPU on a node with internet
TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")


@dataclass(frozen=True)
class Settings:
    """One chain. `nodes` and `time` take one value, or one per stage: "4,distill=1,evaluate=1"."""

    recipe: str = knob("", "recipes/*.yaml: what is trained")
    ds_config: str = knob("", "ds_configs/*.json: how it is spread over ranks")
    out: str = knob("", "folder of the run, on a file system that every node sees")
    nodes: str = knob("1", "nodes per job; per stage: 4,distill=1,evaluate=1")
    gpus_per_node: int = knob(8, "GPUs per node; 0 = CPU only")
    tasks_per_node: int = knob(0, "ranks per node; 0 = one per GPU")
    cpus_per_task: int = knob(8, "CPU cores per rank")
    mem: str = knob("", "memory per node, as sbatch --mem; empty = the cluster's default")
    time: str = knob("24:00:00", "time limit of one job; per stage: 24:00:00,evaluate=01:00:00")
    partition: str = knob("", "partition; empty = the cluster's default, here and below")
    download_partition: str = knob("", "partition of the CPU jobs that download and push")
    account: str = knob("", "account to charge")
    qos: str = knob("", "quality of service")
    constraint: str = knob("", "node features")
    exclude: str = knob("", "nodes to avoid")
    mail: str = knob("", "address for END, FAIL and REQUEUE mails")
    sbatch_args: str = knob("", "more sbatch flags, separated by spaces")
    srun_args: str = knob("", "more srun flags, e.g. --container-image=... of pyxis")
    env_file: str = knob("", "shell file sourced before python starts: modules, conda, variables")
    python: str = knob("python", "interpreter on login and compute nodes, after env_file")
    array_throttle: int = knob(0, "jobs of one array (modules, experts) running at once; 0 = all")
    level: str = knob("", "distillation jobs: one per module, or one per expert first (expert); empty = as the recipe")
    warn_seconds: int = knob(300, "warning before the time limit: a save and an evaluation must fit in")
    max_requeues: int = knob(20, "restarts of one job, whatever the reason")
    max_idle_requeues: int = knob(1, "restarts in a row that gained no training step")
    speed_from: str = knob("", "plan: a finished run folder whose measured speed the estimate uses")
    gpu_kind: str = knob("", "plan: GPU of the nodes, e.g. h200 (docs/scaling.md): memory, traffic and time by phase")
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("recipe", "ds_config", "out"):
            path = getattr(self, name)
            require(path, name, path, f"a path: set {name.upper()} or --{_flag(name)}")
        require(self.level in ("", "module", "expert"), "level", self.level, "module or expert, or nothing")
        require(self.gpus_per_node >= 0, "gpus_per_node", self.gpus_per_node, "0 (CPU only) or more")
        if self.gpus_per_node == 0:
            expected = "1 or more ranks per node when gpus_per_node is 0"
            require(self.tasks_per_node > 0, "tasks_per_node", self.tasks_per_node, expected)
        if self.gpu_kind:
            gpus.parse(self.gpu_kind)
        for name in ("cpus_per_task", "warn_seconds", "max_idle_requeues"):
            value = getattr(self, name)
            require(value >= 1, name, value, "1 or more")
        for stage in STAGES:
            require(self.nodes_of(stage) >= 1, "nodes", self.nodes, "1 or more")
            require(TIME.fullmatch(self.time_of(stage)), "time", self.time, "[days-]hours:minutes:seconds")

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
    def ranks_per_node(self) -> int:
        """One rank per GPU unless tasks_per_node says otherwise."""
        return self.tasks_per_node or self.gpus_per_node

    @property
    def run(self) -> Path:
        """The run's folder, absolute: jobs start elsewhere."""
        return Path(self.out).absolute()

    @property
    def held(self) -> bool:
        """Whether the user wants the jobs held: they release them by themselves."""
        return not {"-H", "--hold"}.isdisjoint(shlex.split(self.sbatch_args))

    def nodes_of(self, stage: str) -> int:
        """Nodes of a stage's jobs."""
        value = _per_stage("nodes", self.nodes, stage)
        require(value.isdigit(), "nodes", self.nodes, 'a whole number, or "4,distill=1"')
        return 1 if stage in ONLINE else int(value)

    def time_of(self, stage: str) -> str:
        """Time limit of a stage's jobs."""
        return _per_stage("time", self.time, stage)

    def hours_of(self, stage: str) -> float:
        """The same in hours."""
        days, _, clock = self.time_of(stage).rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if days:  # days-hours[:minutes[:seconds]]
            hours, minutes, seconds = [*parts, 0, 0][:3]
        elif len(parts) == 1:  # minutes
            hours, minutes, seconds = [0, *parts, 0]
        else:  # [hours:]minutes:seconds
            hours, minutes, seconds = [0, *parts][-3:]
        return int(days or 0) * 24 + hours + minutes / 60 + seconds / 3600


def read(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[str, Settings]:
    """The command and the settings: a flag beats the environment, which beats the default.

    Raises:
        ValueError: a setting without a meaning; the message names it.
    """
    fields = [field for field in dataclasses.fields(Settings) if field.name != "overrides"]
    parser = argparse.ArgumentParser(
        prog="slurm/m2mkd_vmoe.sh",
        epilog="section.key=value overrides the recipe, ds.section.key=value the DeepSpeed JSON.",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="submit|plan|status|cancel [section.key=value ...]")
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
    overrides = (*environ.get("OVERRIDES", "").split(), *words)
    return command, Settings(**values, overrides=overrides)


def _per_stage(name: str, text: str, stage: str) -> str:
    """What `text` says for this stage: its first value, or that of the last stage=value."""
    default, *exceptions = text.split(",")
    chosen = default.strip()
    for exception in exceptions:
        key, equals, value = exception.strip().partition("=")
        if not equals or key not in STAGES:
            raise ValueError(f"{name} is {text!r}: {key!r} is no stage. Stages are {', '.join(STAGES)}")
        if key == stage:
            chosen = value
    return chosen


def _number(name: str, text: str) -> int:
    require(text.strip().isdigit(), name, text, "a whole number")
    return int(text)


def _flag(name: str) -> str:
    return name.replace("_", "-")
