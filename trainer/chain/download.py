"""Stage download, on a CPU node with internet, before all others: what can only be done there.

It fills the Hugging Face caches, so that compute nodes can work offline, and asks whether the push at the end may be.

python -m trainer.chain.download --recipe RUN/slurm/1/recipe.yaml --out RUN
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from trainer.artifacts import versions
from trainer.config.load import load_recipe
from trainer.config.recipe import Recipe
from trainer.disk import write_json
from trainer.request.graph import artifact_name
from trainer.request.stages import hub_names


def main() -> int:
    """Open models and data once, as the phases will, check the hub, and leave RUN/download/result.json."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    recipe, started = load_recipe(options.recipe), time.monotonic()
    from trainer.hub.push import check_hub

    try:
        if recipe.hub.repo:
            check_hub(recipe.hub)
        _open_all(recipe)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = Path(options.out) / "download"
    folder.mkdir(parents=True, exist_ok=True)
    seconds = time.monotonic() - started
    write_json(folder / "result.json", {"names": hub_names(recipe), "seconds": seconds, "versions": versions()})
    return 0


def _open_all(recipe: Recipe) -> None:
    from models.files.hub import CheckpointFiles
    from models.teacher.load import load_teacher
    from trainer.data.sources import open_source
    from trainer.teaching import bases
    from trainer.teaching.families import family_of

    dense = "" if recipe.student.init == "teacher" else recipe.student.init
    for source in filter(None, (recipe.teacher.source, dense)):
        load_teacher(source)
    if recipe.train.init:
        family_of(recipe).load(recipe.train.init)
    modules = [artifact_name("distill", i) for i in range(recipe.modules)]
    for source, names in ((recipe.meta.source, ["meta"]), (recipe.distill.source, modules)):
        for files in [CheckpointFiles(source, folder=name) for name in names if source]:
            for file in ("result.json", "config.yaml", bases.FILE):
                files.find(file)
            files.weights()
    for split in ("train", "val"):
        open_source(recipe.data, split)


if __name__ == "__main__":
    sys.exit(main())
