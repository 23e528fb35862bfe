"""The hand-over between phases: OUT/<phase>[_i]/ with weights, config.yaml and, written last, result.json.

Only these folders link two phases. result.json names every file with its size and SHA-256; a folder without it is
unfinished, and a folder made with another recipe is refused by the key that differs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer import made_of, origin, writer_lock
from trainer.config.load import build_recorded, first_difference, read_yaml, to_dict
from trainer.config.recipe import Recipe
from trainer.config.redaction import refuse_secrets
from trainer.disk import file_record, write_json, write_text
from trainer.request.graph import artifact_name, command_of, defining
from trainer.request.stages import DOWNLOAD, FOLLOWING, Stage

if TYPE_CHECKING:
    from torch import Tensor

NOT_RECORDED = ("result.json", "metrics.jsonl", made_of.RECORD)  # of an artifact's files
PACKAGES = ("torch", "deepspeed", "timm", "transformers", "datasets", "huggingface_hub", "safetensors", "numpy")


def open_folder(out: Path, name: str, recipe: Recipe, run: dict[str, Any]) -> tuple[Path, bool]:
    """Create or re-open an artifact's folder, write its config.yaml, and keep other processes from writing there.

    Args:
        out: the run's folder.
        name: as from artifact_name.
        run: what repeats this phase besides the recipe: phase, module, command, ds_config.

    Returns:
        (folder, whether the artifact is already complete).

    Raises:
        ValueError: the folder belongs to another recipe (the first differing key is named), or a token or password
            would be written, or another process is writing there.
    """
    folder = out / name
    begun = folder.is_dir() and any(not _says_nothing(path.name) for path in folder.iterdir())
    if begun:  # a folder left by a start that was refused holds nothing that a corrected recipe could spoil
        _refuse_other_recipe(folder, name, recipe, f"{folder} belongs to another run")
    if not begun or not (folder / "config.yaml").is_file():
        text = yaml.safe_dump(run | {"recipe": to_dict(recipe)}, sort_keys=False)
        refuse_secrets(text.splitlines(), "the recipe or the command line")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", text)
    complete = folder / "result.json"
    again = run["phase"] in FOLLOWING  # measured or pushed anew, whatever is there
    if again or not complete.is_file():
        writer_lock.hold(folder)
        if complete.is_file() and not again:  # another process has ended in this moment
            writer_lock.release(folder)
    return folder, complete.is_file()


def keep_config_true(folder: Path, ds_values: dict[str, Any]) -> None:
    """Let config.yaml of an unfinished result hold the DeepSpeed JSON that it goes on with."""
    path = folder / "config.yaml"
    saved = read_yaml(path.read_text(), str(path))
    if saved["ds_config"] != ds_values:
        text = yaml.safe_dump(saved | {"ds_config": ds_values}, sort_keys=False)
        refuse_secrets(text.splitlines(), "the recipe or the command line")
        write_text(path, text)


def require(out: Path, name: str, recipe: Recipe, needed_by: str) -> tuple[Path, dict[str, Any]]:
    """Find a finished artifact of this recipe and check its files.

    Returns:
        (folder, result).

    Raises:
        ValueError: missing, unfinished, made with another recipe, or a file truncated or altered.
    """
    folder = out / name
    command = command_of(name)
    if not folder.is_dir():
        raise ValueError(f"{needed_by} needs {folder}, which does not exist: run {command} --out {out} first")
    if not (folder / "result.json").is_file():
        raise ValueError(f"{needed_by} needs {folder}, which is unfinished (no result.json): run {command} again")
    _refuse_other_recipe(folder, name, recipe, f"{needed_by} needs {folder}, which was made with another recipe")
    try:
        result = json.loads((folder / "result.json").read_text())
        files = result["files"].items()
        start = name.partition("_")[2] or "distilled"
        made_as = artifact_name(result["phase"], result.get("module"), start, result.get("expert"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(
            f"{folder / 'result.json'} is truncated or altered: delete {folder} and run {command} again"
        ) from None
    if made_as != name:
        raise ValueError(f"{folder} holds the result of {made_as}: delete {folder} and run {command} again")
    for file, record in files:
        if Path(file).name != file:  # another folder's file is no part of this artifact
            raise ValueError(f"{folder / 'result.json'} names {file!r}: delete {folder} and run {command} again")
        if not (folder / file).is_file() or file_record(folder / file) != record:
            raise ValueError(
                f"{folder / file} is missing, truncated or altered (SHA-256 differs from result.json): "
                f"delete {folder} and run {command} again"
            )
    return folder, result


def load_weights(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an artifact, once they are known to fit.

    Args:
        expected: tensors with the names and shapes wanted, e.g. the state dict of a module on the meta device.

    Raises:
        ValueError: a name, shape or type that differs, or a value that is not finite; the tensor is named.
    """
    from models.files.checks import load_state

    with reading(folder):
        return load_state(folder, expected)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """A block that reads an artifact: a ValueError in it also says how to make the artifact again."""
    try:
        yield
    except ValueError as error:
        again = f"delete {folder} and run {command_of(folder.name)} again"
        raise ValueError(f"{str(error).rstrip('.')}: {again}") from None


def write_result(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Record the artifact's files, write result.json, the mark of completion, last, and give the folder back."""
    files = {}
    for path in sorted(folder.iterdir()):
        unrecorded = path.name in NOT_RECORDED or path.name.startswith(writer_lock.NAME) or path.suffix == ".tmp"
        if path.is_file() and not unrecorded:
            files[path.name] = file_record(path)
    result = result | {"git_commit": git_commit(), "versions": versions(), "files": files}
    if (folder / made_of.RECORD).is_file():
        result["made_of"] = json.loads((folder / made_of.RECORD).read_text())
    write_json(folder / "result.json", result)
    writer_lock.release(folder)
    return result


def _says_nothing(name: str) -> bool:
    """Whether a file of an artifact's folder is there before anything of the artifact is."""
    return name in ("config.yaml", made_of.RECORD) or name.startswith(writer_lock.NAME)


def git_commit() -> str | None:
    """Commit of the code, with "+changes" when the tree differs; None outside git."""
    return origin.commit()


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _refuse_other_recipe(folder: Path, name: str, recipe: Recipe, what: str) -> None:
    path = folder / "config.yaml"
    if not path.is_file():
        return
    try:
        # through the schema: a key that came later has its default, and nothing odd is compared or shown
        there = defining(to_dict(build_recorded(read_yaml(path.read_text(), str(path))["recipe"])), name)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is truncated or altered: delete {folder} and run {command_of(name)} again") from None
    difference = first_difference(there, defining(to_dict(recipe), name))
    if difference:
        raise ValueError(f"{what} ({difference}): use another --out, or the recipe in {path}")


def missing(stage: Stage, out: Path, recipe: Recipe) -> list[int]:
    """Array elements (0 for a plain job) whose artifact is not complete yet.

    Raises:
        ValueError: there is one of another recipe, or a file of it is damaged.
    """
    todo = []
    for i, name in enumerate(stage.artifacts):
        if not (out / name / "result.json").is_file():
            todo.append(i)
        elif stage.phase in FOLLOWING:
            if _is_stale(stage, name, out, recipe):
                todo.append(i)
        elif stage.phase != DOWNLOAD:
            require(out, name, recipe, "the chain")
    return todo


def _is_stale(stage: Stage, name: str, out: Path, recipe: Recipe) -> bool:
    """Whether an input was made anew since, or a push went elsewhere."""
    made = [(out / each / "result.json").stat().st_mtime for each in (*stage.inputs, name) if (out / each).is_dir()]
    if made != sorted(made):
        return True
    return stage.phase == "push" and _pushed_to(out, recipe) != [recipe.hub.repo, recipe.hub.revision]


def _pushed_to(out: Path, recipe: Recipe) -> list[str]:
    _, result = require(out, "push", recipe, "the chain")
    return [result["repo"], result["revision"]]
