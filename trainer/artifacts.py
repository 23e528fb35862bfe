"""The hand-over between phases: OUT/<phase>[_i]/ with weights, config.yaml and, written last, result.json.

Only these folders link two phases. result.json names every file with its size and SHA-256; a folder without it is
unfinished, and a folder made with another recipe is refused by the key that differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer.config import build, first_difference, read_yaml, to_dict
from trainer.redaction import refuse_secrets
from trainer.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor

# The sections of the recipe an artifact depends on (evaluate: those of what it measures); others may change.
_TEACHER = ("seed", "data", "augment", "teacher")
_META = (*_TEACHER, "modules", "meta")
_STUDENT = (*_META, "distill", "expert", "student")
_ALL = (*_STUDENT, "refine", "train")
DEFINED_BY = {
    "teacher": _TEACHER,
    "meta": _META,
    "incubate": (*_META, "incubate"),
    "assemble": (*_META, "incubate", "assemble"),
    "cluster": (*_META, "expert", "student"),
    "expert": _STUDENT,
    "distill": _STUDENT,
    "refine": (*_STUDENT, "refine"),
    "train": _ALL,
    "train_scratch": (*_TEACHER, "student", "train"),
    "train_upcycled": (*_TEACHER, "modules", "student", "train"),
    "train_scratch_equal_cost": _ALL,
    "push": _ALL,
}
BY_MODULE = ("incubate", "cluster", "expert", "distill", "refine")  # each module is a job and an artifact of its own
NOT_DEFINING = {"data": ("workers", "fractals.cache"), "train": ("start", "baselines")}
PACKAGES = ("torch", "deepspeed", "timm", "transformers", "datasets", "huggingface_hub", "safetensors", "numpy")


def preparation(recipe: Recipe) -> list[str]:
    """Names of every artifact that is made on the way from the teacher to the student's end-to-end training."""
    modules, apart = range(recipe.modules), taught_by_expert(recipe)
    refined = [f"refine_{i}" for i in modules] if recipe.refine.epochs else []
    experts = range(recipe.student.moe.num_experts)
    parts = [name for i in modules for name in (f"cluster_{i}", *(f"expert_{i}_{j}" for j in experts)) if apart]
    return ["meta", *parts, *(f"distill_{i}" for i in modules), *refined]


def own_teacher(recipe: Recipe) -> tuple[str, ...]:
    """The artifact that holds the teacher a run makes itself, which is also its phase; empty when it is given."""
    if recipe.teacher.source:
        return ()
    return ("assemble",) if recipe.teacher.grown else ("teacher",)


def taught_by_expert(recipe: Recipe) -> bool:
    """Whether this run teaches the experts of its modules one by one before the modules."""
    return recipe.distill.level == "expert" and not recipe.distill.source


def in_one_job(recipe: Recipe, phase: str) -> bool:
    """Whether a phase that goes by module makes those of all modules in one training, and takes no module."""
    return phase == "refine" and recipe.refine.order == "together"


def trained_again(recipe: Recipe, module: int) -> bool:
    """Whether the second round trains this module: the first is fed images either way, but has to be taught once."""
    return module > 0 or not recipe.distill.epochs or in_one_job(recipe, "refine")


def taught_in(recipe: Recipe) -> str:
    """The phase whose result tells what a module has learned: the first round, unless it was left out."""
    return "distill" if recipe.distill.epochs or not recipe.refine.epochs else "refine"


def artifact_name(phase: str, module: int | None = None, start: str = "distilled", expert: int | None = None) -> str:
    """Folder name of a phase's artifact: distill_2, expert_2_0, train, train_scratch."""
    if phase in ("train", "evaluate") and start != "distilled":
        return f"{phase}_{start}"
    return "_".join(str(part) for part in (phase, module, expert) if part is not None)


def open_folder(out: Path, name: str, recipe: Recipe, run: dict[str, Any]) -> tuple[Path, bool]:
    """Create or re-open an artifact's folder and write its config.yaml.

    Args:
        out: the run's folder.
        name: as from artifact_name.
        run: what repeats this phase besides the recipe: phase, module, command, ds_config.

    Returns:
        (folder, whether the artifact is already complete).

    Raises:
        ValueError: the folder belongs to another recipe (the first differing key is named), or a token or password
            would be written.
    """
    folder = out / name
    begun = folder.is_dir() and any(path.name != "config.yaml" for path in folder.iterdir())
    if begun:  # a folder left by a start that was refused holds nothing that a corrected recipe could spoil
        _refuse_other_recipe(folder, name, recipe, f"{folder} belongs to another run")
    if not begun or not (folder / "config.yaml").is_file():
        text = yaml.safe_dump(run | {"recipe": to_dict(recipe)}, sort_keys=False)
        refuse_secrets(text.splitlines(), "the recipe or the command line")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", text)
    return folder, (folder / "result.json").is_file()


def require(out: Path, name: str, recipe: Recipe, needed_by: str) -> tuple[Path, dict[str, Any]]:
    """Find a finished artifact of this recipe and check its files.

    Returns:
        (folder, result).

    Raises:
        ValueError: missing, unfinished, made with another recipe, or a file truncated or altered.
    """
    folder = out / name
    command = _command(name)
    if not folder.is_dir():
        raise ValueError(f"{needed_by} needs {folder}, which does not exist: run {command} --out {out} first")
    if not (folder / "result.json").is_file():
        raise ValueError(f"{needed_by} needs {folder}, which is unfinished (no result.json): run {command} again")
    _refuse_other_recipe(folder, name, recipe, f"{needed_by} needs {folder}, which was made with another recipe")
    try:
        result = json.loads((folder / "result.json").read_text())
        files = result["files"].items()
        made_as = artifact_name(result["phase"], result.get("module"), name.partition("_")[2] or "distilled",
                                result.get("expert"))  # fmt: skip
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
    from models.checkpoint_checks import load_state

    with reading(folder):
        return load_state(folder, expected)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """A block that reads an artifact: a ValueError in it also says how to make the artifact again."""
    try:
        yield
    except ValueError as error:
        again = f"delete {folder} and run {_command(folder.name)} again"
        raise ValueError(f"{str(error).rstrip('.')}: {again}") from None


def write_result(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Record the artifact's files and write result.json, the mark of completion, last."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    left_out = ("result.json", "metrics.jsonl")
    files = {name: file_record(folder / name) for name in names if name not in left_out and not name.endswith(".tmp")}
    result = result | {"git_commit": git_commit(), "versions": versions(), "files": files}
    write_json(folder / "result.json", result)
    return result


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as f:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: beside it first, flushed, then renamed."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; a value that is not finite is an error, not invalid JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def git_commit() -> str | None:
    """Commit of the code, with "+changes" when the tree differs; None outside git."""
    root = Path(__file__).resolve().parents[1]
    try:
        run = [subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True)
               for args in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))]  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run[0].stdout.strip() + ("+changes" if run[1].stdout.strip() else "")


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
        there = defining(to_dict(build(Recipe, read_yaml(path.read_text(), str(path))["recipe"])), name)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is truncated or altered: delete {folder} and run {_command(name)} again") from None
    difference = first_difference(there, defining(to_dict(recipe), name))
    if difference:
        raise ValueError(f"{what} ({difference}): use another --out, or the recipe in {path}")


def _command(name: str) -> str:
    """The flags that make an artifact."""
    phase, _, rest = name.partition("_")
    if phase == "upcycle":  # made by whichever phase needs it first
        return "the phase"
    if not rest:
        return f"--phase {phase}"
    if phase == "expert":
        return "--phase expert --module {} --expert {}".format(*rest.split("_"))
    if phase in BY_MODULE:
        return f"--phase {phase} --module {rest}"
    return f"--phase {phase} train.start={rest}"


def defining(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """The part of a recipe (as from to_dict) that decides what the artifact `name` holds."""
    phase = name.partition("_")[0]
    kind = phase if phase in BY_MODULE else name.replace("evaluate", "train")
    keys = DEFINED_BY[kind]
    if recipe["teacher"]["grown"] and kind not in ("meta", "incubate"):  # those come before the teacher
        keys = dict.fromkeys((*keys, *DEFINED_BY["assemble"]))
    kept = {}
    for key in keys:
        if key == "expert" and recipe["distill"]["level"] == "module":
            continue  # has no effect there
        value = recipe.get(key)
        if isinstance(value, dict):
            whole = kind == key == "teacher"  # it is cut into modules later
            value = _without(value, ("depths",) if whole else NOT_DEFINING.get(key, ()))
        kept[key] = value
    return kept


def _without(section: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A section without these keys; dotted ones lie in a section inside it."""
    kept = {key: value for key, value in section.items() if key not in keys}
    for inner, _, key in (dotted.partition(".") for dotted in keys if "." in dotted):
        if isinstance(kept.get(inner), dict):
            kept[inner] = _without(kept[inner], (key,))
    return kept
