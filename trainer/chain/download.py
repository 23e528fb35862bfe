"""Stage download, on a CPU node with internet: fill the Hugging Face caches, so that compute nodes can work offline.

python -m trainer.chain.download --recipe RUN/slurm/1/recipe.yaml --out RUN
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from trainer.artifacts import versions, write_json
from trainer.chain.stages import hub_names
from trainer.config import load_recipe


def main() -> int:
    """Open the teacher and the data once, as the phases will, and leave RUN/download/result.json."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    recipe, started = load_recipe(options.recipe), time.monotonic()
    from models.teacher import load_teacher
    from trainer.data.sources import open_source

    try:
        if recipe.teacher.source:
            load_teacher(recipe.teacher.source)
        for split in ("train", "val"):
            open_source(recipe.data, split)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = Path(options.out) / "download"
    folder.mkdir(parents=True, exist_ok=True)
    seconds = time.monotonic() - started
    write_json(folder / "result.json", {"names": hub_names(recipe), "seconds": seconds, "versions": versions()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
