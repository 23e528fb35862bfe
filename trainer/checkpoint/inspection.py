"""What a checkpoint, an artifact or a whole run holds, whether it is whole, and a checkpoint as one usual model.

trainer/run.py inspect runs/demo
trainer/run.py export runs/demo/train --out student
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.checkpoint import files
from trainer.checkpoint.files import LATEST, MANIFEST, TAG, Reader
from trainer.disk import file_record, replacing

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
SHARDS = "model*.safetensors"  # a large published model has several


class Damaged(ValueError):
    """What inspect found damaged, in one line; `text` is all it found."""

    def __init__(self, message: str, text: str):
        super().__init__(message)
        self.text = text


def inspect(path: str | Path) -> str:
    """Describe a checkpoint (step_*), a phase's folder, its checkpoints folder, a run's folder or a saved model.

    Every file with a recorded SHA-256 is read and checked.

    Returns:
        A few lines of text per checkpoint and artifact.

    Raises:
        Damaged: something is not whole; its `text` is the same text with a line "DAMAGED: ..." for each damage.
        ValueError: there is nothing of ours at `path`.
    """
    path = Path(path).resolve()
    lines = list(_describe(path))
    if not lines:
        raise ValueError(
            f"nothing to inspect at {path}: expected a run's folder, OUT/PHASE, its checkpoints, a step_* folder in "
            "them, or a folder with model.safetensors"
        )
    text = "\n".join(lines)
    damages = [line.strip() for line in lines if line.lstrip().startswith("DAMAGED")]
    if damages:
        raise Damaged(f"{len(damages)} damaged in {path}: {damages[0]}", text)
    return text


def export(checkpoint: str | Path, out: str | Path) -> str:
    """Write the weights of a checkpoint as one safetensors model under the names of plain torch, tensor by tensor.

    Trained parameters are the fp32 masters, also of a bf16 run, or their average where the phase publishes that
    (train.ema). A checkpoint of phase train becomes a directory that VMoE.from_pretrained loads.

    Args:
        checkpoint: a step_* folder, or a phase's folder or its checkpoints for the newest one that is whole.
        out: the directory to make; must not hold a model yet.

    Returns:
        One line of what was written.

    Raises:
        ValueError: no checkpoint there, a damaged one, or a model in the way.
        OSError: no room.
    """
    folder = _whole(Path(checkpoint).resolve())
    out = Path(out)
    manifest = files.read_manifest(folder)
    reader = Reader(folder, manifest)
    config = folder.parents[1] / CONFIG
    makes_student = manifest["phase"].startswith("train")
    if makes_student and not config.is_file():
        raise ValueError(f"{config} is missing, which says how the model of {folder} is built: start its phase again")
    if (out / WEIGHTS).exists() or (out / CONFIG).exists():
        raise ValueError(f"{out} holds a model already: give another --out")
    saved_names = sorted(reader.shapes)
    prefix = ""
    if all(name.startswith("meta.") for name in saved_names):  # phase meta publishes its model without it
        prefix = "meta."
    names = {name.removeprefix(prefix): name for name in saved_names}
    written = _write(out, reader, names)
    if makes_student:
        shutil.copyfile(config, out / CONFIG)
    what = f"{manifest['phase']} after step {manifest['step']}, {len(names)} tensors, {written:,} bytes"
    return f"{out / WEIGHTS}: {what}"


def _write(out: Path, reader: Reader, names: dict[str, str]) -> int:
    """Write OUT/model.safetensors, tensor by tensor.

    Args:
        names: name to publish -> name in the checkpoint.

    Returns:
        Bytes of the file.
    """
    tensors = []
    for public_name, name in names.items():
        is_trained = reader.kind(name) == files.MASTER
        dtype = torch.float32 if is_trained else reader.whole(name).dtype
        tensors.append((public_name, dtype, reader.shapes[name]))
    layout = files.plan(tensors)
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < layout.bytes:
        raise OSError(f"not enough room in {out}: {layout.bytes:,} bytes needed, {free:,} free")
    in_file_order = sorted(zip(layout.places, names.values()))
    parts = (_bytes(reader.whole(name, published=True)) for _, name in in_file_order)
    with replacing(out / WEIGHTS) as unfinished:
        files.write_tensors(unfinished, layout, parts)
    return layout.bytes


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _whole(path: Path) -> Path:
    """The checkpoint meant by a path, every file checked. Raises ValueError when there is none, or none is whole."""
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if (path / MANIFEST).exists():
        folders = [path]
    else:
        tags, _ = files.candidates(root)
        folders = [root / tag for tag in tags]
    problems = []
    for folder in folders:
        damage = _damage(folder)
        if not damage:
            return folder
        problems += damage
    if problems:
        raise ValueError(f"no checkpoint at {path} is whole: {'; '.join(problems)}")
    raise ValueError(f"no checkpoint at {path}: expected a step_* folder, or OUT/PHASE with checkpoints in it")


def _describe(path: Path) -> Iterator[str]:
    """Lines about whatever is at a path; none when it is nothing of ours."""
    if TAG.fullmatch(path.name) or (path / MANIFEST).exists():
        yield from _checkpoint(path)
    elif (path / LATEST).exists() or any(path.glob("step_*")):
        yield from _checkpoints(path)
    elif (path / "config.yaml").exists() or (path / "result.json").exists():
        yield from _phase(path)
    elif any(path.glob(SHARDS)):
        yield f"{path}: a model; there is no record to check it against"
        yield from _weights(path)
    elif path.is_dir():
        for folder in sorted(path.iterdir()):
            if (folder / "config.yaml").exists() or (folder / "result.json").exists():
                yield from _phase(folder)


def _phase(folder: Path) -> Iterator[str]:
    """The artifact of a phase, then its checkpoints."""
    if (folder / "result.json").exists():
        yield from _artifact(folder)
    else:
        yield f"{folder}: unfinished (no result.json)"
    if (folder / "checkpoints").is_dir():
        yield from _checkpoints(folder / "checkpoints")


def _artifact(folder: Path) -> Iterator[str]:
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text())
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
        about = f"{result['phase']}, {result['steps']} steps, {result['epochs']} epochs, {result['world_size']} ranks"
        size = sum(record["bytes"] for record in result["files"].values())
        problems = []
        for name, record in result["files"].items():
            if not (folder / name).is_file() or file_record(folder / name) != record:
                problems.append(f"{folder / name} is missing, truncated or altered")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        yield f"{folder}: artifact"
        yield f"  DAMAGED: {path} is truncated or altered"
        return
    yield f"{folder}: artifact, {'damaged' if problems else 'whole'}"
    yield f"  {about}, commit {result.get('git_commit')}"
    yield f"  {metrics or 'no metrics'}"
    yield f"  {len(result['files'])} files, {size:,} bytes"
    yield from (f"  DAMAGED: {problem}" for problem in problems)
    if any(folder.glob(SHARDS)):
        yield from _weights(folder)


def _weights(folder: Path) -> Iterator[str]:
    """The weights of a model, in one file or in shards."""
    tensors = 0
    parameters = 0
    dtypes = set()
    for path in sorted(folder.glob(SHARDS)):
        try:
            with safe_open(path, framework="pt") as weights:
                slices = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118  not a dict
                tensors += len(slices)
                parameters += sum(math.prod(part.get_shape()) for part in slices)
                dtypes.update(part.get_dtype() for part in slices)
        except (OSError, SafetensorError) as error:
            yield f"  DAMAGED: {path}: {error}"
    yield f"  {SHARDS}: {tensors} tensors, {parameters:,} parameters, {', '.join(sorted(dtypes))}"


def _checkpoints(root: Path) -> Iterator[str]:
    """Every checkpoint of a phase, and which one is in force."""
    tags, problem = files.candidates(root)
    in_force = tags[0] if tags and (root / LATEST).exists() else "none"
    if problem:
        yield f"{root}: in force unknown"
        yield f"  DAMAGED: {problem}"
    else:
        yield f"{root}: in force {in_force}"
        if in_force != "none" and not (root / in_force).is_dir():
            yield f"  DAMAGED: {root / LATEST} names {in_force}, which does not exist"
    for folder in sorted(root.glob("step_*")):
        if (folder / MANIFEST).exists() or folder.name == in_force:
            yield from _checkpoint(folder)
        else:
            yield f"{folder}: a save that was not finished; the next save removes it"


def _checkpoint(folder: Path) -> Iterator[str]:
    problems = _damage(folder)
    yield f"{folder}: checkpoint, {'damaged' if problems else 'whole'}"
    try:
        manifest = files.read_manifest(folder)
    except ValueError:
        manifest = None
    if manifest:
        yield from (f"  {line}" for line in _contents(folder, manifest, bool(problems)))
    yield from (f"  DAMAGED: {problem}" for problem in problems)


def _contents(folder: Path, manifest: dict[str, Any], damaged: bool) -> Iterator[str]:
    score = "no score" if manifest["score"] is None else f"score {manifest['score']:.4g}"
    yield f"{manifest['phase']} after step {manifest['step']}, {score}"
    t = manifest["topology"]
    precision = "bf16" if t["bf16"] else "fp32"
    yield (
        f"saved by {t['world']} ranks, ep {t['ep_size']}, ZeRO {t['zero_stage']}, {precision}, "
        f"global batch {t['global_batch']} = {t['micro_batch']} x {t['accumulation']} x {t['world']}"
    )
    shapes = manifest["parameters"].values()
    parameters = sum(math.prod(shape) for shape in shapes)
    kinds = "" if damaged else f", as {', '.join(Reader(folder, manifest).kinds)}"
    yield f"{len(shapes)} tensors, {parameters:,} parameters{kinds}"
    size = sum(record["bytes"] for record in manifest["files"].values())
    yield f"{len(manifest['files'])} files, {size:,} bytes"


def _damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each."""
    try:
        manifest = files.read_manifest(folder)
        return files.damage(folder, manifest, sorted(manifest["files"])) or Reader(folder, manifest).gaps()
    except ValueError as error:
        return [str(error)]
