"""A copy of the code beside the job scripts: what waits in the queue runs the code that it was submitted with."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer import made_of, origin
from trainer.chain.settings import ONLINE
from trainer.config.recipe import Recipe
from trainer.disk import write_json, write_text
from trainer.request.stages import Stage

FOLDERS = ("models", "trainer", "slurm", "recipes", "ds_configs")  # of what jobs read; the rest is tests and pages
CHANGES = "changes.diff"


def freeze(root: Path, folder: Path) -> dict[str, Any]:
    """Copy the code as it is now, what is not committed included, into folder/code.

    Args:
        root: the checkout; without git its folders are copied whole.
        folder: RUN/slurm/<n>; `changes.diff` of it holds what differs from the commit.

    Returns:
        What submission.json tells of it: commit, digest of the sources that decide numbers, name of the diff or null.
    """
    target = folder / "code"
    made: set[Path] = set()
    for name in _files(root):
        place = target / name
        if place.parent not in made:
            place.parent.mkdir(parents=True, exist_ok=True)
            made.add(place.parent)
        shutil.copy(root / name, place)  # with its mode: scripts stay executable
    commit = origin.commit(root)
    write_json(target / origin.RECORD, {"commit": commit, "remote": origin.remote(root)})
    changes = _changes(root)
    if changes:
        write_text(folder / CHANGES, changes + "\n")
    about = {"git_commit": commit, "code_sha256": made_of.code_digest(target)}
    return about | {"changes": CHANGES if changes else None}


def refuse_other_code(root: Path, run: Path, recipe: Recipe, stages: Sequence[tuple[Stage, Sequence[int]]]) -> None:
    """Refuse what the jobs would refuse when they start: inputs or checkpoints that another version of the code made.

    Args:
        stages: what is to be submitted, each with its elements.

    Raises:
        ValueError: a result or a begun one of other code; both commits are named, and `run.accept=[code]`.
    """
    names: list[str] = []
    for stage, elements in stages:
        if stage.phase not in ONLINE:
            names += [*stage.inputs, *(stage.artifacts[element] for element in elements)]
    refuse_folders_of_other_code(root, [(run / name, recipe) for name in dict.fromkeys(names)])


def refuse_folders_of_other_code(root: Path, folders: Iterable[tuple[Path, Recipe]]) -> None:
    """The same of results, complete or begun, each with the recipe that goes on with it.

    Raises:
        ValueError: as above.
    """
    now = {"code": {"sha256": made_of.code_digest(root), "commit": origin.commit(root)}}
    for folder, recipe in folders:
        then = made_of.read(folder)
        if "code" in then:
            made_of.compare({"code": then["code"]}, now, folder, recipe.run.accept)


def _files(root: Path) -> list[str]:
    """Paths, relative to the checkout, of what git knows or does not ignore in FOLDERS, or of all that lies there."""
    listed = ("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *FOLDERS)
    try:
        # not git alone: the checkout may be a plain folder inside somebody's repository
        is_top = Path(origin.git(root, "rev-parse", "--show-toplevel")).resolve() == root.resolve()
        names = origin.git(root, *listed).split("\0") if is_top else None
    except (OSError, subprocess.SubprocessError):
        names = None
    if names is None:
        names = []
        for folder in FOLDERS:
            names += [str(path.relative_to(root)) for path in (root / folder).rglob("*")]
        names = [name for name in names if "__pycache__" not in name]
    return sorted(name for name in set(names) if name and os.path.isfile(root / name))  # not what was deleted


def _changes(root: Path) -> str:
    try:
        return origin.git(root, "diff", "HEAD", "--", *FOLDERS)
    except (OSError, subprocess.SubprocessError):
        return ""
