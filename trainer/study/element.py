"""The job of one cell of a study, on every rank: links what other jobs made for it, makes the rest.

python -m trainer.study.element --cells RUN/slurm/1/cells.json --ds_config RUN/slurm/1/ds_config.json m2mkd/seed0
Called by slurm/phase.sbatch. A cell that is complete leaves RUN/<cell>/result.json, which the job body and `status`
look for. The exit codes are those of trainer/run.py (trainer/request/job.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from trainer.config.load import one_line
from trainer.disk import write_json
from trainer.distributed import interrupt
from trainer.distributed.launchers import ranks_from_environment
from trainer.request.job import EXIT_BAD_INPUT, EXIT_FAILED
from trainer.study.runner import link_artifact
from trainer.study.waves import Part, Work

PATIENCE = 300  # seconds for which other ranks wait for what rank 0 links


def main(arguments: list[str] | None = None) -> int:
    """0 = the cell is complete, 1 = failed, 2 = what it needs is not there, 75 = stopped by a signal and saved."""
    interrupt.listen()  # before the slow imports
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--cells", required=True, type=Path)
    parser.add_argument("--ds_config", required=True, type=Path)
    parser.add_argument("cell")
    options = parser.parse_args(arguments)
    run = options.cells.resolve().parents[2]  # RUN/slurm/<n>/cells.json
    work = read_works(options.cells)[options.cell]
    rank = ranks_from_environment()["rank"]
    try:
        if rank == 0:
            link(work)
        else:
            wait_for_links(work)
    except (ValueError, OSError) as error:
        if rank == 0:
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED
    from trainer.study import worker

    names = [part.name for part in work.parts if not part.source]
    code = worker.main(Path(work.folder), options.ds_config, names)
    if code == 0 and rank == 0:
        mark(run / work.cell, Path(work.folder) / work.last)
    return code


def read_works(path: Path) -> dict[str, Work]:
    """What a submission's cells.json says, by cell."""
    works = {}
    for values in json.loads(path.read_text()):
        parts = tuple(Part(**part) for part in values["parts"])
        works[values["cell"]] = Work(**values | {"parts": parts, "waits_for": tuple(values["waits_for"])})
    return works


def link(work: Work) -> None:
    """Link what is complete elsewhere.

    Raises:
        ValueError: something is not, since the job that was to make it failed; both are named.
    """
    if work.teacher and not _is_complete(Path(work.teacher)):
        raise ValueError(
            f"{work.cell} needs the shared teacher of {work.teacher}, which is not complete: see how its job ended "
            "(`status`), then submit the study again"
        )
    for part in work.parts:
        target = Path(work.folder) / part.name
        if not part.source or _is_complete(target):
            continue
        if not _is_complete(Path(part.source)):
            raise ValueError(
                f"{work.cell} needs {part.name} of {part.maker}, which is not complete: see how its job ended "
                "(`status`), then submit the study again"
            )
        link_artifact(Path(part.source), target)


def wait_for_links(work: Work) -> None:
    """Wait until rank 0 has linked everything.

    Raises:
        ValueError: it has not, within PATIENCE; rank 0 says why.
    """
    end = time.monotonic() + PATIENCE
    for part in work.parts:
        while part.source and not _is_complete(Path(work.folder) / part.name):
            if time.monotonic() > end:
                raise ValueError(f"rank 0 has not linked {part.name} within {PATIENCE} s")
            time.sleep(0.5)


def mark(folder: Path, last: Path) -> None:
    """Leave the mark of a complete cell, result.json.

    Args:
        folder: RUN/<cell>.
        last: its last artifact, whose metrics are what `status` shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = json.loads((last / "result.json").read_text())
    write_json(folder / "result.json", {"folder": str(last.parent), "metrics": result.get("metrics", {})})


def _is_complete(artifact: Path) -> bool:
    return (artifact / "result.json").is_file()


if __name__ == "__main__":
    sys.exit(main())
