"""Run a study, go on with one, or sum one up.

    python -m trainer.study recipes/study_ablation.yaml --out runs/study [--jobs 2] [section.key=value ...]

Writes OUT/<variant>/seed<k>/ (a run folder each) and OUT/study.json, study.md and study.html.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from trainer.config.redaction import refuse_secrets
from trainer.request.job import EXIT_BAD_INPUT
from trainer.study.figures import collect
from trainer.study.plan import cells, read_study
from trainer.study.report import write_report
from trainer.study.runner import Runner


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
        plan = cells(study, out)

        def report() -> list[Path]:
            return write_report(collect(study, plan), out)

        code = 0
        if not options.report:
            code = Runner(plan, study.ds_config, out, options.jobs, after=report).run()
        print(*report(), sep="\n")
        return code
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


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
    flags.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every cell")
    return flags


if __name__ == "__main__":
    sys.exit(main())
