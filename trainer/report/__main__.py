"""The report of a run, or the comparison of several:  python -m trainer.report RUN_DIR [RUN_DIR2 ...]"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainer.report import write
from trainer.report.write import write_comparison, write_report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description=write.__doc__.split("\n\n")[1])
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run (its --out)")
    folders = parser.parse_args(arguments).run_dirs
    try:
        for folder in folders:
            print(write_report(folder))
            print(f"\nWritten: {folder / 'report.html'}")
        if len(folders) > 1:
            print(f"Written: {write_comparison(folders)}")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
