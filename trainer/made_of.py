"""What a result is made of: teacher, data, settings of DeepSpeed and code, recorded when it is begun.

Compared when it goes on after a stop, and with what every result was made of that it reads. A difference is refused
with both values, or accepted by name (run.accept).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer import artifacts
from trainer.config.load import shown
from trainer.disk import write_json

log = logging.getLogger(__name__)

FILE = "made_of.json"  # in the folder of a result
PINS = "sources.json"  # in OUT: the commit that each repository of the hub had when it was first read
COMMIT = re.compile(r"[^@\s,]+@[0-9a-f]{40}")
ROOT = Path(__file__).resolve().parents[1]
# rooms of trainer/ whose code changes no number
ONLY_SHOWN = ("chain", "cli", "hub", "plan", "report", "study", "tracking")


def begin(folder: Path, here: dict[str, Any], inputs: Sequence[Path], accepted: Sequence[str], *, begun: bool) -> None:
    """Record what a result is made of, once it is known to be what its inputs, and its own begin, were made of.

    Args:
        folder: of the result.
        here: teacher (source, sha256), data (as trainer/data/fingerprint.py tells each split), ds_config
            (ds_keys.numbers); parts that its phase does not read are left out. The code is added.
        inputs: folders of the results it is made from.
        accepted: parts that may differ.
        begun: it goes on where an earlier process stopped.

    Raises:
        ValueError: something differs and is not accepted; both values are named.
    """
    here = here | {
        "code": {"commit": artifacts.git_commit(), "sha256": code_digest()},
        "versions": artifacts.versions(),
    }
    for source in inputs:
        _compare(_read(source), here, ("teacher", "data", "code"), accepted, f"{folder.name} needs {source}, which")
    if begun:
        _compare(_read(folder), here, tuple(_DIFFERENCES), accepted, f"{folder}")
    write_json(folder / FILE, here | ({"accepted": list(accepted)} if accepted else {}))


def code_digest() -> str:
    """SHA-256 of the Python files that decide numbers: models/ and trainer/ but for rooms that only show or start."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "models").rglob("*.py"), *(ROOT / "trainer").rglob("*.py")]):
        name = path.relative_to(ROOT)
        if name.parts[1] not in ONLY_SHOWN:
            digest.update(str(name).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def pinned(out: Path, source: str) -> str:
    """A repository at the commit this run read first; other sources as they are."""
    return _json(out / PINS).get(source, source)


def pin(out: Path, source: str, resolved: str) -> None:
    """Keep the commit that a source resolved to, where it is one of the hub and none is kept yet (rank 0).

    Args:
        resolved: as loaders describe it: id@commit, perhaps with more behind it.
    """
    found = COMMIT.match(resolved)
    if not found or found[0] == source:
        return
    pins = _json(out / PINS)
    if source not in pins:
        write_json(out / PINS, pins | {source: found[0]})
        log.info("%s is read at %s from now on (%s)", source, found[0].partition("@")[2], out / PINS)


def _compare(there: Mapping[str, Any], here: Mapping[str, Any], parts: Sequence[str], accepted: Sequence[str],
             what: str) -> None:  # fmt: skip
    """Refuse, or log, the first difference of each part; a part that either side does not have is not compared."""
    for part in parts:
        if part not in there or part not in here:
            continue
        difference = _DIFFERENCES[part](there[part], here[part])
        if not difference:
            continue
        if part not in accepted:
            raise ValueError(
                f"{what} was made with {_WORDS[part]}: {difference}. Use what it was made with, or another --out; or "
                f"go on as it is now with run.accept=[{part}]"
            )
        log.warning("accepted (run.accept): %s was made with %s: %s", what, _WORDS[part], difference)
    if there and there.get("versions") != here["versions"]:
        changed = _first_difference(there.get("versions", {}), here["versions"])
        log.warning("%s was made with other packages: %s", what, changed)


_WORDS = {
    "teacher": "another teacher",
    "data": "other data",
    "ds_config": "another DeepSpeed JSON",
    "code": "other code",
}


def _first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    for key in dict.fromkeys((*there, *here)):
        if there.get(key) != here.get(key):
            return f"{key} {shown(there.get(key))} there, {shown(here.get(key))} here"
    return ""


def _of_teacher(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    if there["sha256"] == here["sha256"]:
        return ""
    return f"weights {there['sha256'][:12]} of {there['source']} there, {here['sha256'][:12]} of {here['source']} here"


def _of_code(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    if there["sha256"] == here["sha256"]:
        return ""
    return (
        f"files {there['sha256'][:12]} (commit {there['commit']}) there, {here['sha256'][:12]} (commit "
        f"{here['commit']}) here"
    )


def _of_data(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    for split in ("train", "val"):
        one, other = there[split], here[split]
        name = {"train": "training", "val": "validation"}[split]
        if one["classes"] != other["classes"]:
            return f"{name} classes {_some(one, other)} there, {_some(other, one)} here"
        if one["images"] != other["images"]:
            return f"{one['images']:,} {name} images there, {other['images']:,} here"
        for label, before, now in zip(one["classes"], one["per_class"], other["per_class"]):
            if before != now:
                return f"{before:,} {name} images of class {label} there, {now:,} here"
        if one["sha256"] != other["sha256"]:
            return f"{name} images {one['sha256'][:12]} there, {other['sha256'][:12]} here: as many, but other ones"
    return ""


def _some(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Classes that only one side has; all in their order where they are the same set."""
    only = [label for label in one["classes"] if label not in set(other["classes"])]
    names = only or one["classes"]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


_DIFFERENCES = {"teacher": _of_teacher, "data": _of_data, "ds_config": _first_difference, "code": _of_code}


def _read(folder: Path) -> dict[str, Any]:
    """What a result was made of; {} where an older version did not say, which is logged.

    Raises:
        ValueError: the record is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        log.info("%s does not say what it was made of (made by an older version): not compared", folder)
        return {}
    try:
        made = json.loads(path.read_text())
        for part in _DIFFERENCES:
            if part in made:
                _DIFFERENCES[part](made[part], made[part])  # of the form that is compared
        return dict(made)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(
            f"{path} is truncated or altered: delete {folder} and run {artifacts.command_of(folder.name)} again"
        ) from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it, and sources are read as they are now") from None
    return value if isinstance(value, dict) else {}
