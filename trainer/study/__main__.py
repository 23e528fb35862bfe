"""Run a study, go on with one, or sum one up.

    python -m trainer.study recipes/study_ablation.yaml --out runs/study [--jobs 2] [section.key=value ...]

As jobs of Slurm: slurm/study.sh (trainer/study/jobs.py).
Writes OUT/<variant>/seed<k>/ (a run folder each; before it, for what is tuned, OUT/tuning/<variant>/<choice>/seed<k>/)
and OUT/study.json, study.md and study.html.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from trainer.chain.settings import JOBS
from trainer.chain.slurm import SlurmError
from trainer.chain.submit import refuse_live
from trainer.config.redaction import refuse_secrets
from trainer.request.job import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from trainer.study.plan import Cell, Study, cells, only, other_recipe, read_study, trials
from trainer.study.report import report
from trainer.study.runner import Runner
from trainer.study.tuning import chosen, edge_warnings, tuned


def main(arguments: list[str] | None = None) -> int:
    """0 = complete, 1 = a cell failed, 2 = bad input, 75 = stopped by a signal and saved."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_intermixed_args(words)
    try:
        refuse_secrets(words, "the command line")
        if options.jobs < 1:
            raise ValueError(f"--jobs is {options.jobs}, expected 1 or more")
        study = read_study(Path(options.study), options.overrides)
        out = Path(options.out)
        if options.report and not out.is_dir():
            raise ValueError(f"--out is {out}, where no study was made: without --report this command makes it")
        if not options.report:
            _refuse_live_jobs(out)
        trial_cells = trials(study, out)
        # first the trials, then what they chose; what is known of the choices stands in both reports
        plan = cells(study, out, chosen(tuned(study, trial_cells)))
        code = 0
        if trial_cells and not options.report:
            code = _run(study, trial_cells, [*trial_cells, *plan], options)
        if code != EXIT_INTERRUPTED:
            grids = tuned(study, trial_cells)
            for line in edge_warnings(grids):
                print(f"warning: {line}", file=sys.stderr)
            plan = cells(study, out, chosen(grids))
            if options.report:
                for why in filter(None, map(other_recipe, [*trial_cells, *plan])):
                    print(f"warning: left out: {why}", file=sys.stderr)
            else:
                code = _run(study, plan, [*trial_cells, *plan], options) or code
        print(*report(study, [*trial_cells, *plan], out), sep="\n")
        return code
    except (ValueError, OSError, SlurmError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _run(study: Study, todo: list[Cell], shown: list[Cell], options: argparse.Namespace) -> int:
    """Make what is missing of `todo`, or of the part of it that --only names; the report is of the cells in `shown`."""
    out = Path(options.out)
    runner = Runner(
        only(todo, study, options.only), study.ds_config, out, options.jobs, after=lambda: report(study, shown, out)
    )
    code = runner.run()
    runner.lock.close()  # trials and the final runs follow each other in one process
    return code


def _refuse_live_jobs(out: Path) -> None:
    """Raises ValueError where the study is at work as jobs of Slurm, which write the same folders."""
    if (out / JOBS / "jobs.tsv").is_file() and shutil.which("squeue"):
        refuse_live(out / JOBS)


def _parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog="python -m trainer.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags.add_argument("study", help="recipes/study_*.yaml")
    flags.add_argument("--out", required=True, help="folder of the study")
    flags.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once; default: cores")
    flags.add_argument("--report", action="store_true", help="only write table and plots of what is there")
    flags.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="VARIANT",
        help="run these alone (m2mkd, or 'm2mkd*'); may be repeated",
    )
    flags.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every cell")
    return flags


if __name__ == "__main__":
    sys.exit(main())
