"""A page of the results that were kept: docs/benchmarks.md, from benchmarks/history/*.json.

    python benchmarks/step.py --json benchmarks/history/2026-11-30-step.json    # measure and keep
    python benchmarks/history.py                                               # write the page

Only ratios within one run stand side by side: they hold where seconds of another day or machine do not.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import timing

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks/history"
PAGE = ROOT / "docs/benchmarks.md"
HEAD = """# Benchmarks over time

Ratios of two things measured in turn in one run, as they were on different days and machines. Written by `python
benchmarks/history.py` from the files in benchmarks/history; to add a run, give a benchmark `--json
benchmarks/history/DATE-NAME.json`, commit that file, and write the page again.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page(folder: Path = KEPT) -> str:
    """The page in Markdown: a part for each benchmark, a column for each run of it, the newest first.

    Raises:
        KeyError: a file that timing.write did not make.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        runs.setdefault(run["benchmark"], []).append(run)
    return "\n".join([HEAD, *(_part(name, of_one) for name, of_one in sorted(runs.items()))])


def _part(name: str, runs: list[dict[str, Any]]) -> str:
    runs = sorted(runs, key=lambda run: run["date"], reverse=True)
    lines = [f"## benchmarks/{name}.py", ""]
    lines += [f"{number}. {_about(name, run)}" for number, run in enumerate(runs, start=1)]
    ratios = list(dict.fromkeys(ratio for run in runs for ratio in run["ratios"]))
    lines += ["", f"| ratio | {' | '.join(f'run {number}' for number in range(1, len(runs) + 1))} |"]
    lines.append(f"|---|{'---:|' * len(runs)}")
    for ratio in ratios:
        values = [f"{run['ratios'][ratio]:.2f}" if ratio in run["ratios"] else "" for run in runs]
        lines.append(f"| {ratio} | {' | '.join(values)} |")
    return "\n".join([*lines, ""])


def _about(name: str, run: dict[str, Any]) -> str:
    machine = run["machine"]
    commit, changes, _ = (run["commit"] or "unknown").partition("+changes")
    typed = shlex.join(["python", f"benchmarks/{name}.py", *_without_json(run["arguments"])])
    return f"{run['date']} UTC, commit {commit[:10]}{changes}, {timing.describe(machine)}: `{typed}`"


def _without_json(arguments: list[str]) -> list[str]:
    """The command without where its result was kept."""
    if "--json" not in arguments:
        return arguments
    at = arguments.index("--json")
    return arguments[:at] + arguments[at + 2 :]


if __name__ == "__main__":
    main()
