"""Repeat what was run, from its folder: a phase from OUT/PHASE/config.yaml, a whole run from OUT."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config.ds_config import read_ds_config
from trainer.config.load import build_recorded, first_difference, read_yaml, to_dict
from trainer.config.recipe import Recipe


@dataclass(frozen=True)
class Saved:
    """What a folder remembers of the command that made it."""

    recipe: Recipe
    ds_values: dict[str, Any]
    phase: str
    module: int | str | None
    command: str  # as it was typed
    path: Path  # of this config.yaml
    expert: int | str | None = None


def read_saved(path: Path) -> Saved:
    """The request behind a config.yaml, or behind the folder of a whole run.

    A run's folder gives the phase that was asked for: all, or the one phase when nothing else was run.

    Raises:
        ValueError: nothing saved there, not what a run writes, or phases of different recipes in one folder.
    """
    if not path.is_dir():
        return _read(path)
    artifacts = [_read(file) for file in sorted(path.glob("*/config.yaml"))]
    if not artifacts:
        raise ValueError(f"no saved configuration below {path}: expected OUT/PHASE/config.yaml of an earlier run")
    first = artifacts[0]  # train_scratch, with its own start as train.start, stands behind the others
    for saved in artifacts:
        _refuse_other_run(saved, first)
    phases = {saved.phase for saved in artifacts}
    asked_for_all = any("--phase all" in saved.command.replace("=", " ") for saved in artifacts)
    if asked_for_all or len(phases) > 1:
        return replace(first, phase="all", module=None, expert=None)
    if len(artifacts) > 1:  # several modules or experts
        return replace(first, module=None, expert=None)
    return first


def _refuse_other_run(saved: Saved, first: Saved) -> None:
    difference = first_difference(_without_start(saved.recipe), _without_start(first.recipe))
    what = "recipe"
    if not difference:
        difference = first_difference(saved.ds_values, first.ds_values)
        what = "ds_config"
    if difference:
        raise ValueError(
            f"{saved.path} and {first.path} are of different runs ({what}: {difference}): repeat one phase with "
            f"--config {saved.path}"
        )


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
    return Saved(
        recipe=build_recorded(saved["recipe"]),
        ds_values=read_ds_config(saved["ds_config"]),
        phase=str(saved["phase"]),
        module=saved.get("module"),
        command=str(saved.get("command", "")),
        path=path,
        expert=saved.get("expert"),
    )


def _without_start(recipe: Recipe) -> dict[str, Any]:
    """Trainings of one run differ in train.start, in where each job finds its data and teacher, in what is accepted."""
    values = to_dict(recipe)
    del values["train"]["start"]
    del values["data"]["path"]
    del values["teacher"]["source"]
    del values["run"]["accept"]
    return values
