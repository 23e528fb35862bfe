"""One process of a study: the given artifacts of one cell, one after another (started by trainer/study/runner.py).

python -m trainer.study.worker CELL DS_CONFIG distill_0 distill_1 train
CELL/recipe.yaml says what is trained; the exit codes are those of trainer/run.py (trainer/request/job.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.config.load import load_recipe, one_line
from trainer.distributed import interrupt
from trainer.request.graph import in_one_job
from trainer.request.job import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED
from trainer.study.plan import Step
from trainer.tracking.console import quieten, set_up_logging


def main(cell: Path, ds_config: Path, names: list[str]) -> int:
    """Make the artifacts; 75 after a warning signal and a save."""
    interrupt.listen()  # before the slow imports; a signal in their time is seen at the first step
    quieten()
    set_up_logging(main=True)
    from trainer.api import run_phase

    recipe = load_recipe(cell / "recipe.yaml")
    try:
        for name in names:
            step = Step(name)
            part = {}
            if not in_one_job(recipe, step.phase):
                part = dict(zip(("module", "expert"), step.numbers))
            run_phase(recipe, step.phase, out=cell, ds_config=ds_config, **part)
    except interrupt.Interrupted as stop:
        print(stop, file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"error: {name}: {one_line(error)}", file=sys.stderr, flush=True)
        if isinstance(error, ValueError):
            return EXIT_BAD_INPUT
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
