"""What the commands that follow a chain (status, logs, wait) can be asked for beside the settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.knobs import require

HELP = """following a chain:
  status [--watch] [--json]                  the table; again and again until the chain has ended; as JSON
  logs STAGE [-f] [--rank N | --job-log] [--lines N]    e.g. logs distill_1 -f
  wait                                       until the chain has ended; the exit code tells how
  --every S                                  seconds between two questions to Slurm (10)"""


@dataclass(frozen=True)
class View:
    """How something is shown."""

    follow: bool = False
    watch: bool = False
    json: bool = False
    job_log: bool = False
    rank: int | None = None
    lines: int = 40
    every: float = 10.0  # seconds between two questions to Slurm

    def __post_init__(self):
        require(self.every > 0, "every", self.every, "more than 0 seconds")
        require(self.lines > 0, "lines", self.lines, "1 or more")


def take(arguments: Sequence[str]) -> tuple[View, list[str]]:
    """The flags of following, and the arguments without them."""
    parser = argparse.ArgumentParser(prog="slurm/m2mkd_vmoe.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("-f", "--follow", action="store_true")
    for name in ("watch", "json", "job-log"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--lines", type=int, default=View.lines)
    parser.add_argument("--every", type=float, default=View.every)
    known, rest = parser.parse_known_args(arguments)
    return View(**vars(known)), rest
