"""sbatch, squeue, scancel, scontrol and sinfo for unit tests: a queue that is a folder with one file per job.

What a test wants to go wrong it says by files beside them:

    slow        seconds an sbatch takes when its job is queued
    lost        the id of the job whose sbatch fails although it is queued
    refuse      sbatch fails where its arguments hold this text
    down        the controller gives no answer
    config, partition, nodes    what scontrol and sinfo print
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROGRAM = r"""#!/bin/bash
cd "$FAKE" || exit 1
program=$(basename "$0")
echo "$program $*" >>calls
if [[ -f down ]]; then echo "$program: error: Unable to contact slurm controller (connect failure)" >&2; exit 1; fi
case $program in
    sbatch)
        if [[ -f refuse && $* == *"$(cat refuse)"* ]]; then echo "sbatch: error: invalid partition" >&2; exit 1; fi
        if [[ $* == *--test-only* ]]; then echo "sbatch: Job 1 to start at 2026-01-01T00:00:00" >&2; exit 0; fi
        id=$(($(cat id) + 1)); echo "$id" >id
        reason=Priority
        [[ $* == *--hold* ]] && reason=JobHeldUser
        [[ $* == *--dependency* ]] && reason=Dependency
        echo "$id|$id|N/A|PENDING|$reason||0:00|${!#}" >queued && mv queued "queue/$id" # nobody reads half of it
        [[ -f slow ]] && sleep "$(cat slow)"
        if [[ -f lost && $(cat lost) == "$id" ]]; then echo "sbatch: error: Socket timed out" >&2; exit 1; fi
        echo "$id;cluster" ;;
    squeue) cat queue/* 2>/dev/null ;;
    scancel) for id in "$@"; do rm -f "queue/$id"; done ;;
    scontrol)
        case $1-$2 in
            release-*) for id in ${2//,/ }; do sed -i s/JobHeldUser/Priority/ "queue/$id"; done ;;
            show-config) cat config ;;
            show-partition) cat partition ;;
            show-job)
                if [[ ! -f job-$4 ]]; then echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi
                echo "JobId=$4 JobState=$(cat "job-$4") Reason=None" ;;
        esac ;;
    sinfo) cat nodes ;;
esac
exit 0
"""


class StandIn:
    """The folder behind the five programs."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "queue").mkdir(parents=True)
        for name in ("sbatch", "squeue", "scancel", "scontrol", "sinfo"):
            (folder / name).write_text(PROGRAM)
            (folder / name).chmod(0o755)
        self.says("id", "100")
        self.says("config", "MaxArraySize            = 1001\n")
        self.says("partition", "PartitionName=batch Default=YES State=UP MaxTime=UNLIMITED MaxNodes=UNLIMITED\n")
        self.says("nodes", "")

    def says(self, name: str, text: str) -> None:
        """Write one of the files that decide what the programs do."""
        (self.folder / name).write_text(text)

    def queue(self) -> dict[str, str]:
        """Reason by job, of those that are queued."""
        files = sorted((self.folder / "queue").iterdir())
        return {file.name: file.read_text().split("|")[4] for file in files}

    def calls(self, program: str) -> list[str]:
        """The arguments of every call of a program."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix(program + " ") for line in lines if line.startswith(program + " ")]

    @property
    def environ(self) -> dict[str, str]:
        """What makes a process find the programs."""
        return {"FAKE": str(self.folder), "PATH": f"{self.folder}:{os.environ['PATH']}"}


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> StandIn:
    """The five programs first on PATH."""
    made = StandIn(tmp_path / "slurm-stand-in")
    for name, value in made.environ.items():
        monkeypatch.setenv(name, value)
    return made
