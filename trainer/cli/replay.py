"""Repeat what was run, from its folder: a phase from OUT/PHASE/config.yaml, a whole run from OUT."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config.ds_config import read_ds_config
from trainer.config.load import build, first_difference, read_yaml, to_dict
from trainer.config.recipe import Recipe


@dataclass(frozen=True)
class Saved:
    """What a folder remembers of the command that made it."""

    recipe: Recipe
    ds_values: dict[str, Any]
    phase: str
    module: int | str | None
    command: str
    path: Path
    expert: int | str | None = None


def read_saved(path: Path) -> Saved:
    """The request behind a config.yaml, or behind the folder of a whole run.

    A run's folder gives the phase that was asked for: all, or the one phase when nothing else was run.

    Raises:
        ValueError: nothing saved there, not what a run writes, or phases of different recipes in one folder.
    """
    if not path.is_dir():
        return _read(path)
    found = [_read(file) for file in sorted(path.glob("*/config.yaml"))]
    if not found:
        raise ValueError(f"no saved configuration below {path}: expected OUT/PHASE/config.yaml of an earlier run")
    first = found[0]  # train_scratch, with its own start as train.start, stands behind the others
    for saved in found:
        for what, ours, theirs in (
            ("recipe", _without_start(first.recipe), _without_start(saved.recipe)),
            ("ds_config", first.ds_values, saved.ds_values),
        ):
            if different := first_difference(theirs, ours):
                raise ValueError(
                    f"{saved.path} and {first.path} are of different runs ({what}: {different}): repeat one phase with "
                    f"--config {saved.path}"
                )
    asked_for_all = any("--phase all" in saved.command.replace("=", " ") for saved in found)
    if asked_for_all or len({saved.phase for saved in found}) > 1:
        return replace(first, phase="all", module=None, expert=None)
    return first if len(found) == 1 else replace(first, module=None, expert=None)


def _read(path: Path) -> Saved:
    if not path.is_file():
        raise ValueError(f"no saved configuration at {path}: expected OUT/PHASE/config.yaml of an earlier run, or OUT")
    try:
        saved = read_yaml(path.read_text(), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: {error}") from None
    if not isinstance(saved, dict) or not {"phase", "recipe", "ds_config"} <= saved.keys():
        raise ValueError(f"{path} is not a saved configuration: expected phase, recipe and ds_config, as a run writes")
    if not isinstance(saved["ds_config"], dict):
        raise ValueError(f"{path} is not a saved configuration: its ds_config is not a section")
    recipe, ds_values = build(Recipe, saved["recipe"]), read_ds_config(saved["ds_config"])
    command, expert = str(saved.get("command", "")), saved.get("expert")
    return Saved(recipe, ds_values, str(saved["phase"]), saved.get("module"), command, path, expert)


def _without_start(recipe: Recipe) -> dict[str, Any]:
    values = to_dict(recipe)
    del values["train"]["start"]
    return values
