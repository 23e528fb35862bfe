"""What a result is made of beside the recipe, compared with what its inputs and its own beginning were made of.

made_of.json in a result's folder is written when its phase begins, so that it is there after a kill, and goes into
result.json. A difference in teacher, data, DeepSpeed JSON or code is refused with both values unless run.accept names
it; one in package versions is warned about.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config import ds_keys
from trainer.disk import write_json

log = logging.getLogger(__name__)
RECORD = "made_of.json"
ROOT = Path(__file__).resolve().parents[1]
WAY_ON = "Put it back, use another --out, or go on all the same with 'run.accept=[{}]'"
# of the project's sources, those that decide numbers; the rest reads the request, plans, submits, reports and pushes
CODE = ("models", *(f"trainer/{room}" for room in ("data", "distributed", "evaluation", "loop", "objectives")))
CODE += ("trainer/phases", "trainer/teaching", "trainer/checkpoint", "trainer/context.py", "trainer/heads.py")


def read(folder: Path) -> dict[str, Any]:
    """What a begun or complete result was made of; empty where an older version made it.

    A result.json of an older version still tells its teacher.
    """
    record = _read_object(folder / RECORD)
    result = _read_object(folder / "result.json")
    if isinstance(result.get("made_of"), dict):
        record = result["made_of"]
    if isinstance(result.get("teacher"), dict):
        record = {"teacher": result["teacher"]} | record
    return record


def write(folder: Path, now: Mapping[str, Any]) -> None:
    """Keep what a result is made of in its folder."""
    write_json(folder / RECORD, dict(now))


def compare(then: Mapping[str, Any], now: Mapping[str, Any], folder: Path, accept: Sequence[str]) -> list[str]:
    """Refuse what differs from what made `folder`.

    Args:
        then, now: teacher, checkpoint, data, ds_config, code, versions, as far as they are known and count.
        accept: those that may differ.

    Returns:
        The differences that were accepted, a line each; they are logged as well.

    Raises:
        ValueError: a difference that is not accepted, with both values and the way to go on.
    """
    if not then:
        log.info("%s does not record what it was made of (an older version): nothing to compare", folder)
    accepted = []
    for kind, describe in DESCRIBED.items():
        if not isinstance(then.get(kind), dict) or not isinstance(now.get(kind), dict):
            continue
        try:
            difference = describe(then[kind], now[kind])
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"the record of {kind} in {folder} is truncated or altered: delete {folder}") from None
        if not difference:
            continue
        line = f"{folder} was made with another {NAMED[kind]}: {difference}"
        accepted_as = ACCEPTED_AS.get(kind, kind)
        if accepted_as not in accept:
            raise ValueError(f"{line}. {WAY_ON.format(accepted_as)}")
        log.warning("%s; accepted by run.accept", line)
        accepted.append(line)
    changed = _changed(then.get("versions"), now.get("versions"))
    if changed:
        log.warning("%s was made with other packages: %s", folder, ", ".join(changed))
    return accepted


def ds_numbers(values: Mapping[str, Any], clip: float | None) -> dict[str, Any]:
    """What changes numbers in a DeepSpeed JSON as read, by dotted key.

    Args:
        clip: of the recipe's section, which fills "auto".
    """
    numbers = ds_keys.numbers(values)
    numbers["gradient_clipping"] = float(numbers.get("gradient_clipping", clip or 0.0))
    numbers["bf16.enabled"] = bool(numbers.get("bf16.enabled", False))
    return numbers


@functools.cache
def code_digest(root: Path = ROOT) -> str:
    """SHA-256 of the Python sources that decide numbers, comments included."""
    digest = hashlib.sha256()
    for part in CODE:
        path = root / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _teacher(then: dict[str, Any], now: dict[str, Any]) -> str:
    if then["sha256"] == now["sha256"]:
        return ""
    return (
        f"{then.get('source')} (weights {then['sha256'][:12]}) then, "
        f"{now.get('source')} (weights {now['sha256'][:12]}) now"
    )


def _data(then: dict[str, Any], now: dict[str, Any]) -> str:
    for split in ("train", "val"):
        difference = _split(then[split], now[split])
        if difference:
            return f"split {split}: {difference}"
    return ""


def _split(then: dict[str, Any], now: dict[str, Any]) -> str:
    gone = [name for name in then["classes"] if name not in now["classes"]]
    came = [name for name in now["classes"] if name not in then["classes"]]
    if gone or came:
        return f"class names: only then {gone[:3]}, only now {came[:3]}"
    counts = [
        f"class {name!r} {then['classes'][name]} then, {count} now"
        for name, count in now["classes"].items()
        if count != then["classes"][name]
    ]
    if then["images"] != now["images"] or counts:
        return f"{then['images']} images then, {now['images']} now ({', '.join(counts[:3])})"
    if then["sha256"] != now["sha256"]:
        return f"other files or contents, fingerprint {then['sha256'][:12]} then, {now['sha256'][:12]} now"
    return ""


def _ds_config(then: dict[str, Any], now: dict[str, Any]) -> str:
    for key in sorted({*then, *now}):
        if then.get(key) != now.get(key):
            return f'"{key}" is {then.get(key, "absent")} then, {now.get(key, "absent")} now'
    return ""


def _code(then: dict[str, Any], now: dict[str, Any]) -> str:
    if then["sha256"] == now["sha256"]:
        return ""
    return (
        f"commit {then.get('commit')} (sources {then['sha256'][:12]}) then, "
        f"{now.get('commit')} (sources {now['sha256'][:12]}) now"
    )


# checkpoint: the teacher before its probe; backbone, boxes: of a detector
ACCEPTED_AS = {"checkpoint": "teacher", "backbone": "teacher", "boxes": "data"}
DESCRIBED = {
    "teacher": _teacher,
    "checkpoint": _teacher,
    "backbone": _teacher,
    "data": _data,
    "boxes": _data,
    "ds_config": _ds_config,
    "code": _code,
}
NAMED = {
    "teacher": "teacher",
    "checkpoint": "teacher",
    "backbone": "backbone",
    "boxes": "data set with boxes",
    "data": "data set",
    "ds_config": "DeepSpeed JSON",
    "code": "version of the code",
}


def _changed(then: Any, now: Any) -> list[str]:
    if not isinstance(then, dict) or not isinstance(now, dict):
        return []
    return [f"{name} {then[name]} then, {now[name]} now" for name in now if name in then and then[name] != now[name]]


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read (whoever needs the result says so)."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
