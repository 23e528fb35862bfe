"""The last job of a submission of a study: writes the tables; after trials of tuning it submits what they chose.

python -m trainer.study.gather --submission RUN/slurm/1 --work CHECKOUT --name choose [--only VARIANT]
Called by slurm/phase.sbatch. It submits once: cells of its own submission that failed are not tried again, and what it
submits ends with a job that only gathers.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from trainer.chain.following.spent import submitted_settings
from trainer.chain.settings import Settings
from trainer.chain.slurm import SlurmError
from trainer.chain.submit import new_submission
from trainer.chain.together import MARK
from trainer.config.ds_config import read_ds_config
from trainer.config.load import one_line
from trainer.disk import write_json
from trainer.request.job import EXIT_BAD_INPUT, EXIT_FAILED
from trainer.study.element import read_works
from trainer.study.jobs import hand_in_cells, plan_of
from trainer.study.plan import Study, read_study, trials
from trainer.study.report import report
from trainer.study.tuning import edge_warnings, tuned


def main(arguments: list[str] | None = None) -> int:
    """0 = tables are written, and the rest is submitted where there is one; 1 = Slurm refused it, 2 = bad input."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--submission", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--name", required=True, choices=["choose", "gather"])
    parser.add_argument("--only", action="append", default=[])
    options = parser.parse_args(arguments)
    try:
        run = options.submission.parents[1]
        settings = submitted_settings(options.submission)
        study = read_study(options.submission / "study.yaml", settings.recipe_overrides)
        planned = plan_of(study, run.parent, options.only)
        grids = tuned(study, trials(study, run.parent))
        for line in edge_warnings(grids):
            print(f"warning: {line}", flush=True)
        print(*report(study, planned.every, run.parent), sep="\n", flush=True)
        if options.name == "choose" and not _has_successor(options.submission):
            _submit_rest(options, settings, study)
    except (ValueError, OSError, SlurmError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED
    (run / options.name).mkdir(parents=True, exist_ok=True)
    write_json(run / options.name / "result.json", {"missing": [work.cell for work in planned.todo]})
    return 0


def _submit_rest(options: argparse.Namespace, settings: Settings, study: Study) -> None:
    """Submit the cells whose choice is known now, and nothing that this submission has tried."""
    run = options.submission.parents[1]
    tried = list(read_works(options.submission / "cells.json"))
    planned = plan_of(study, run.parent, options.only, without=tried)
    if not planned.todo:
        print("no choice is known that was not before: nothing more to submit", flush=True)
        return
    ds_values = read_ds_config(study.ds_config, settings.ds_overrides)
    settings = replace(settings, after="")  # those have ended
    with new_submission(run, besides=[os.environ.get("SLURM_JOB_ID", "")]) as folder:
        hand_in_cells(
            settings, planned, options.submission / "study.yaml", ds_values, folder, options.only, options.work
        )


def _has_successor(submission: Path) -> bool:
    """Whether a start of this job before has submitted the rest already."""
    later = [folder for folder in submission.parent.glob("[0-9]*") if int(folder.name) > int(submission.name)]
    return any((folder / "submission.json").is_file() and not (folder / MARK).exists() for folder in later)


if __name__ == "__main__":
    sys.exit(main())
