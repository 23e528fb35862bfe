"""The Slurm commands the chain calls, with their failures as one clear line each."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE",
         "PREEMPTED", "REVOKED")  # fmt: skip
TIMEOUT = 90  # seconds: with the controller down the clients try for about 30


class SlurmError(RuntimeError):
    """A Slurm command failed; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Job:
    """What the controller knows of a job, or of one element of an array."""

    id: str  # as scancel takes it: 12, or 12_3
    array: str  # id that sbatch returned
    element: int | None
    state: str
    reason: str
    nodes: str
    used: str  # time since it started

    @property
    def live(self) -> bool:
        """Whether it still waits or runs."""
        return self.state not in ENDED


def submit(flags: Sequence[str], script: str) -> str:
    """sbatch; returns the job's id."""
    text = call("sbatch", "--parsable", *flags, script)
    return text.strip().splitlines()[-1].split(";")[0]  # "id;cluster" on federations


def jobs(ids: Iterable[str]) -> list[Job]:
    """State of these jobs, one entry per array element. Jobs the controller has forgotten are left out."""
    wanted = set(ids)
    if not wanted:
        return []
    # without -j: one unknown id among them would be an error
    lines = call(
        "squeue", "--noheader", "--me", "--array", "--states=all", "--format=%i|%F|%K|%T|%r|%N|%M"
    ).splitlines()
    found = []
    for line in lines:
        name, array, element, state, reason, nodes, used = line.split("|")
        if array in wanted:
            found.append(Job(name, array, int(element) if element.isdigit() else None, state, reason, nodes, used))
    return found


def cancel(ids: Sequence[str]) -> None:
    """scancel; ids that have ended are no error."""
    if ids:
        call("scancel", *ids)


def test_only(flags: Sequence[str], script: str) -> str:
    """What the scheduler says to this submission without making it."""
    return call("sbatch", "--test-only", *flags, script, keep_stderr=True).strip()


def call(program: str, *arguments: str, keep_stderr: bool = False) -> str:
    """Run one Slurm command and return its output.

    Raises:
        SlurmError: not installed, no answer, or refused, with Slurm's own words.
    """
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=TIMEOUT, env=clean_environ()
        )
    except FileNotFoundError:
        raise SlurmError(f"{program} is not on PATH: run this on a login node of a Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{program} gave no answer within {TIMEOUT} s: is the controller up (scontrol ping)? Look at squeue --me "
            "before submitting again"
        ) from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{program} failed: {words}{_advice(words)}")
    return done.stdout + (done.stderr if keep_stderr else "")


def clean_environ() -> dict[str, str]:
    """The environment without what the job we may be in was given: a new job must not inherit its nodes or memory."""
    kept = ("SLURM_CONF",)
    return {k: v for k, v in os.environ.items() if k in kept or not k.startswith(("SLURM_", "SLURMD_", "SRUN_"))}


def _advice(words: str) -> str:
    known = {
        "invalid partition": ". Partitions: sinfo -s; choose one with --partition",
        "invalid job array": ". The cluster's largest array: scontrol show config | grep MaxArraySize; use fewer "
        "modules or student.moe.num_experts, or --level module",
        "invalid account": ". Accounts: sacctmgr show assoc user=$USER; choose one with --account",
        "configuration source": ". There is no Slurm configuration here: run this on a login node (or set SLURM_CONF)",
        "Unable to contact": ". The controller does not answer (scontrol ping): submit when it is back",
        "Requested node configuration": ". Nodes and GPUs of a partition: sinfo -o '%P %D %c %m %G'; see --nodes, "
        "--gpus-per-node, --cpus-per-task and --mem",
    }
    return next((advice for text, advice in known.items() if text.lower() in words.lower()), "")
