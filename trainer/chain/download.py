"""Stage download, on a CPU node with internet, before all others: what can only be done there.

It fills the Hugging Face caches, so that compute nodes can work offline, and asks whether the push at the end may be.

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
    """Open teacher and data once, as the phases will, check the hub, and leave RUN/download/result.json."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    recipe, started = load_recipe(options.recipe), time.monotonic()
    from models.teacher import load_teacher
    from trainer import hub
    from trainer.data.sources import open_source

    try:
        if recipe.hub.repo:
            hub.check_hub(recipe.hub)
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
