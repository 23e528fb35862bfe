"""What this cluster's partitions allow, asked before anything is submitted.

`sbatch --test-only` does not tell all: by Slurm's defaults a job for a partition that is down, or longer than it
allows, is accepted and waits for ever.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.chain import slurm
from trainer.chain.settings import Settings, hours
from trainer.request.stages import Stage

GPU = re.compile(r"gpu(?::([^:,()]+))??:(\d+)(?=[,(]|$)")  # gpu:8, gpu:a100:4(S:0-1), gpu:1g.5gb:7


@dataclass(frozen=True)
class Partition:
    """One partition as scontrol shows it."""

    name: str
    values: dict[str, str]

    @property
    def max_hours(self) -> float:
        """Longest time limit of a job in hours; infinite without one."""
        text = self.values.get("MaxTime", "UNLIMITED")
        return float("inf") if text in ("UNLIMITED", "INFINITE", "NONE") else hours(text)

    @property
    def max_nodes(self) -> float:
        """Most nodes of a job; infinite without a limit."""
        text = self.values.get("MaxNodes", "UNLIMITED")
        limit = float(text) if text.isdigit() else float("inf")
        total = self.values.get("TotalNodes", "")
        return min(limit, float(total)) if total.isdigit() else limit

    def refuses(self, kind: str, name: str) -> str:
        """Why an account or QOS may not use this partition; empty when it may, or when it is not known.

        Args:
            kind: Accounts or Qos.
        """
        allowed = self.values.get(f"Allow{kind}", "ALL")
        denied = self.values.get(f"Deny{kind}", "").split(",")
        if not name:
            return ""
        if allowed != "ALL" and name not in allowed.split(","):
            return f"partition {self.name} allows only {allowed}, not {name!r}"
        return f"partition {self.name} does not allow {name!r}" if name in denied else ""


def partitions() -> list[Partition]:
    """All partitions that this user may see.

    Raises:
        SlurmError: NoAnswer when the controller does not answer.
    """
    found = []
    for line in slurm.call("scontrol", "show", "partition", "--oneliner").splitlines():
        values = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "PartitionName" in values:
            found.append(Partition(values["PartitionName"], values))
    return found


def settings_of_cluster() -> dict[str, str]:
    """`scontrol show config` by name, as MaxArraySize."""
    values = {}
    for line in slurm.call("scontrol", "show", "config").splitlines():
        name, equals, value = line.partition("=")
        if equals:
            values[name.strip()] = value.strip()
    return values


def max_array_size() -> int | None:
    """The number that task ids of an array stay below; None where Slurm does not say."""
    text = settings_of_cluster().get("MaxArraySize", "")
    return int(text) if text.isdigit() and int(text) > 0 else None


def problems(settings: Settings, stages: Sequence[Stage]) -> list[str]:
    """Why jobs of these stages would be refused or wait for ever, a line each; the same for several is said once.

    Raises:
        SlurmError: NoAnswer when the controller does not answer.
    """
    by_name = {partition.name: partition for partition in partitions()}
    default = [name for name, partition in by_name.items() if partition.values.get("Default") == "YES"]
    reasons: dict[str, list[str]] = {}  # -> stages
    for stage in stages:
        wanted = [name for name in settings.of("partition", stage.setting).split(",") if name] or default
        # of several partitions one that works is enough; one that is not shown (hidden, unknown) sbatch itself judges
        said = [_refusals(settings, stage.setting, by_name[name]) if name in by_name else [] for name in wanted]
        if said and all(said):
            for reason in said[0]:
                reasons.setdefault(reason, []).append(stage.name)
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _refusals(settings: Settings, stage: str, partition: Partition) -> list[str]:
    found = []
    state = partition.values.get("State", "UP")
    if state != "UP" and "down" not in settings.accepted:
        found.append(
            f"partition {partition.name} is {state}: jobs would wait until it is up. Choose another one with "
            "--partition, or --accept down to queue them all the same"
        )
    if settings.hours_of(stage) > partition.max_hours:
        found.append(
            f"time is {settings.time_of(stage)}, and partition {partition.name} allows {partition.values['MaxTime']}: "
            "lower --time; a job that runs out of time saves, and goes on in the next slot"
        )
    if settings.nodes_of(stage) > partition.max_nodes:
        found.append(
            f"{settings.nodes_of(stage)} nodes, and a job in partition {partition.name} may have "
            f"{partition.max_nodes:.0f}: lower --nodes"
        )
    account = settings.account or os.environ.get("SBATCH_ACCOUNT", "")
    qos = settings.of("qos", stage) or os.environ.get("SBATCH_QOS", "")
    for kind, name, flag in (("Accounts", account, "--account"), ("Qos", qos, "--qos")):
        reason = partition.refuses(kind, name)
        if reason:
            found.append(f"{reason}: choose with {flag}")
    mixed = _mixed_gpus(settings, stage, partition)
    return [*found, mixed] if mixed else found


def _mixed_gpus(settings: Settings, stage: str, partition: Partition) -> str:
    """Why the nodes of one job might have different GPUs; empty when they cannot."""
    count = settings.gpus_of(stage)
    is_chosen = settings.of("gpu_type", stage) or settings.of("constraint", stage) or "mixed" in settings.accepted
    if count == 0 or is_chosen or settings.nodes_of(stage) == 1:
        return ""
    kinds = set()
    for line in slurm.call(
        "sinfo", "--noheader", "--Node", f"--partition={partition.name}", "--format=%G"
    ).splitlines():
        kinds |= {kind for kind, has in GPU.findall(line) if int(has) >= count}
    if len(kinds) < 2:
        return ""
    named = ", ".join(sorted(kind or "untyped" for kind in kinds))
    return (
        f"nodes of partition {partition.name} have different GPUs ({named}), and a job of "
        f"{settings.nodes_of(stage)} nodes may get both: choose with --gpu-type or --constraint, or --accept mixed"
    )
