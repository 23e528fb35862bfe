"""The Slurm commands the chain calls, with their failures as one clear line each."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# states of a job that neither waits nor runs
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "REVOKED",
)
TIMEOUT = 90  # seconds: with the controller down the clients try for about 30
UNANSWERED = ("unable to contact", "socket timed out", "connection refused", "connection timed out", "slurmctld down")
TOO_MANY = (
    "So many jobs may not be allowed in the queue at once, and each job of an array counts. MaxSubmitJobs: "
    "sacctmgr show assoc user=$USER format=account,maxsubmitjobs; sacctmgr show qos format=name,maxsubmitjobsperuser. "
    "Let a job make several elements, --elements-per-job 1,expert=8 (of a study: 8), or take another --qos"
)
# part of what Slurm says -> what to do about it
ADVICE = {
    "invalid partition": "Partitions: sinfo -s; choose one with --partition",
    "invalid job array": "The cluster's largest array: scontrol show config | grep MaxArraySize; use fewer modules or "
    "student.moe.num_experts, or --level module",
    "pathname": "A path of this run is too long for Slurm: use a shorter --out",
    "submitjob": TOO_MANY,
    "job submit limit": TOO_MANY,
    "invalid account": "Accounts: sacctmgr show assoc user=$USER; choose one with --account",
    "configuration source": "There is no Slurm configuration here: run this on a login node (or set SLURM_CONF)",
    "unable to contact": "The controller does not answer (scontrol ping): submit when it is back",
    "requested node configuration": "Nodes and GPUs of a partition: sinfo -o '%P %D %c %m %G'; see --nodes, "
    "--gpus-per-node, --cpus-per-task and --mem",
}


class SlurmError(RuntimeError):
    """A Slurm command failed; the message says which, why, and what to do."""


class NoAnswer(SlurmError):
    """The controller did not answer: nothing is known, which is not the same as a job that is not there."""


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
    script: str = ""

    @property
    def live(self) -> bool:
        """Whether it still waits or runs."""
        return self.state not in ENDED


def require_sbatch() -> None:
    """Raise SlurmError where jobs cannot be submitted from, before anything is asked or written."""
    if not shutil.which("sbatch"):
        raise _absent("sbatch")


def submit(flags: Sequence[str], script: str) -> str:
    """sbatch; returns the job's id."""
    last_line = call("sbatch", "--parsable", *flags, script).strip().splitlines()[-1]
    job, _, _ = last_line.partition(";")  # "id;cluster" on federations
    return job


def jobs(ids: Iterable[str]) -> list[Job]:
    """State of these jobs, one entry per array element. Jobs the controller has forgotten are left out."""
    asked_for = set(ids)
    if not asked_for:
        return []
    return [job for job in _queue("--states=all") if job.array in asked_for]


def jobs_below(folder: Path) -> list[Job]:
    """Jobs that wait or run and whose script lies below a folder, one entry per array element."""
    folder = folder.resolve()
    return [job for job in _queue() if job.script and folder in Path(job.script).resolve().parents]


def _queue(*flags: str) -> list[Job]:
    """All jobs of this user."""
    # without -j: one unknown id among them would be an error
    text = call("squeue", "--noheader", "--me", "--array", *flags, "--format=%i|%F|%K|%T|%r|%N|%M|%o")
    known = []
    for line in text.splitlines():
        # the script comes last: its path may hold the separator
        name, array, index, state, reason, nodes, used, *script = line.split("|", 7)
        element = int(index) if index.isdigit() else None  # N/A of a plain job
        known.append(Job(name, array, element, state, reason, nodes, used, "".join(script)))
    return known


def release(ids: Sequence[str]) -> None:
    """Let held jobs start, all by one call."""
    if ids:
        call("scontrol", "release", ",".join(ids))


def refuse_as_parent(job: str) -> None:
    """Raise ValueError where a job cannot be waited for: Slurm starts what depends on an unknown or ended one at once.

    Raises:
        SlurmError: NoAnswer when the controller does not answer.
    """
    try:
        text = call("scontrol", "show", "job", "--oneliner", job)
    except NoAnswer:
        raise
    except SlurmError as error:
        raise ValueError(f"after names job {job}, which Slurm does not know ({error})") from None
    states = {word.removeprefix("JobState=") for word in text.split() if word.startswith("JobState=")}
    bad = states & set(ENDED) - {"COMPLETED"}
    if bad:
        raise ValueError(f"after names job {job}, which has ended {sorted(bad)[0]}: it cannot end well any more")


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
        SlurmError: not installed, or refused, with Slurm's own words; NoAnswer when the controller is silent.
    """
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env=clean_environ(),
            start_new_session=True,  # Ctrl-C and a closed terminal reach this process only, never half of a call
        )
    except FileNotFoundError:
        raise _absent(program) from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(
            f"{program} gave no answer within {TIMEOUT} s: is the controller up (scontrol ping)? Look at squeue --me "
            "before submitting again"
        ) from None
    if done.returncode:
        said = done.stderr or done.stdout
        words = " ".join(said.split()) or f"exit code {done.returncode}"
        kind = NoAnswer if any(sign in words.lower() for sign in UNANSWERED) else SlurmError
        raise kind(f"{program} failed: {words}{_advice(words)}")
    return done.stdout + (done.stderr if keep_stderr else "")


def clean_environ() -> dict[str, str]:
    """The environment without what the job we may be in was given: a new job must not inherit its nodes or memory."""
    environ = {}
    for name, value in os.environ.items():
        of_a_job = name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name != "SLURM_CONF"
        if not of_a_job:
            environ[name] = value
    return environ


def _absent(program: str) -> SlurmError:
    return SlurmError(f"{program} is not on PATH: run this on a login node of a Slurm cluster")


def _advice(words: str) -> str:
    for part, advice in ADVICE.items():
        if part in words.lower():
            return f". {advice}"
    return ""
