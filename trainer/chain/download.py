"""Stage download, on a CPU node with internet, before all others: what can only be done there.

It fills the Hugging Face caches, so that compute nodes can work offline, and asks whether the push at the end may be.

python -m trainer.chain.download --recipe RUN/slurm/1/recipe.yaml [MORE ...] --out RUN
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
    parser.add_argument("--recipe", required=True, nargs="+")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    recipes = [load_recipe(path) for path in options.recipe]
    started = time.monotonic()
    from trainer.hub.push import check_hub

    try:
        for recipe in recipes:
            if recipe.hub.repo:
                check_hub(recipe.hub)
            _open_all(recipe)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = Path(options.out) / "download"
    folder.mkdir(parents=True, exist_ok=True)
    seconds = time.monotonic() - started
    names = list(dict.fromkeys(name for recipe in recipes for name in hub_names(recipe)))
    write_json(folder / "result.json", {"names": names, "seconds": seconds, "versions": versions()})
    return 0


def _open_all(recipe: Recipe) -> None:
    from models.files.hub import CheckpointFiles
    from models.teacher.load import load_teacher
    from trainer.data.sources import open_source
    from trainer.teaching import bases, upcycling
    from trainer.teaching.families import family_of

    if recipe.teacher.source:
        load_teacher(recipe.teacher.source, image_size=recipe.teacher.image_size)
    if recipe.student.init not in ("", "teacher"):  # a dense ViT
        load_teacher(recipe.student.init)
    if recipe.train.init:
        family_of(recipe).load(recipe.train.init)
    reused = []  # (run folder or hub id, artifact in it)
    if recipe.meta.source:
        reused.append((recipe.meta.source, "meta"))
    if recipe.distill.source:
        reused += [(recipe.distill.source, artifact_name("distill", i)) for i in range(recipe.modules)]
    for source, name in reused:
        files = CheckpointFiles(source, folder=name)
        for file in ("result.json", "config.yaml", bases.FILE):
            files.find(file)
        files.weights()
    if recipe.distill.source and recipe.student.init:  # where its start was computed, modules lie in its basis
        files = CheckpointFiles(recipe.distill.source, folder=upcycling.FOLDER)
        if files.find("result.json", optional=True):
            files.find(bases.FILE, optional=True)
            files.weights()
    for split in ("train", "val"):
        open_source(recipe.data, split, labels_needed=bool(recipe.needs_labels()))


if __name__ == "__main__":
    sys.exit(main())
