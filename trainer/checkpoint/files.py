"""The format of a checkpoint: written, read and checked with torch and safetensors alone.

FOLDER/checkpoints/latest.json    {"tag", "best"}: the newest complete one, and the best when run.keep_best is on
FOLDER/checkpoints/step_00000123/
  rank_00000.safetensors    what rank 0 held: 1-D tensors "KIND/NAME@START". KIND is fp32 (the weights), exp_avg,
                            exp_avg_sq, momentum_buffer, ..., ema (their average) or state (buffers and frozen
                            parameters); NAME is the parameter's on plain torch; START is the tensor's place in the
                            flattened parameter
  rank_00000.json           {"own": what this rank wants back, "shard": {"bytes", "sha256"}}
  manifest.json             what it is of, {name: shape} of every parameter, size and SHA-256 of every file and of
                            itself; written last, so a folder without it is an unfinished save

Files are written here and not by safetensors, because its writer gives no hash: a shard would be read once more.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.disk import file_record, write_text
from trainer.distributed.zero_state import AVERAGE, MASTER, UNTRAINED

FORMAT = 2  # 1 was DeepSpeed's own files
LATEST = "latest.json"
MANIFEST = "manifest.json"
TAG = re.compile(r"step_\d+")
FILE = re.compile(r"rank_\d{5,}\.(safetensors|json)")
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 1 << 24  # bytes written and hashed at a time, without python's lock
NOTHING = "0" * 64  # stands for a SHA-256 where only the length of a text matters


@dataclass(frozen=True)
class Layout:
    """Bytes of a safetensors file."""

    header: bytes
    places: list[tuple[int, int]]  # begin and end of every tensor behind the header, in the order given

    @property
    def data_bytes(self) -> int:
        """Size of what follows the header."""
        return max((end for _, end in self.places), default=0)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.data_bytes


def plan(tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> Layout:
    """Lay tensors out in a safetensors file: (key, type, shape) of each, keys all different."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places = [(0, 0)] * len(tensors)
    begin = 0
    # the widest types first: every tensor lies aligned this way
    for number in sorted(range(len(tensors)), key=lambda number: -tensors[number][1].itemsize):
        key, dtype, shape = tensors[number]
        end = begin + math.prod(shape) * dtype.itemsize
        entries[key] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        places[number] = (begin, end)
        begin = end
    assert len(entries) == 1 + len(tensors), "two tensors of a shard have one key"
    # safetensors: 8 bytes of length, then JSON padded with spaces to a multiple of 8
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Layout(len(text).to_bytes(8, "little") + text, places)


def write_tensors(path: Path, layout: Layout, parts: Iterable[Tensor]) -> dict[str, Any]:
    """Write a safetensors file and flush it to disk.

    Args:
        parts: the bytes behind the header, in order; uint8 on the CPU.

    Returns:
        {"bytes", "sha256"} as file_record would find them, without reading the file.

    Raises:
        OSError: no room, or another failure of the disk.
    """
    digest = hashlib.sha256(layout.header)
    with path.open("wb") as f:
        f.write(layout.header)
        for part in parts:
            view = memoryview(part.numpy())
            for start in range(0, len(view), CHUNK):
                chunk = view[start : start + CHUNK]
                f.write(chunk)
                digest.update(chunk)
        f.flush()
        os.fsync(f.fileno())
    return {"bytes": layout.bytes, "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class _SavedPiece:
    """Elements start to stop (exclusive) of a flattened tensor, in a shard."""

    start: int
    stop: int
    shard: Any  # as from safe_open
    key: str  # there


class Reader:
    """Any range of any tensor of a checkpoint, from the memory-mapped shards of all ranks."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        """Read the shards' headers. Raises ValueError when one is damaged."""
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in manifest["parameters"].items()}
        self._pieces: dict[tuple[str, str], list[_SavedPiece]] = defaultdict(list)  # by kind and name
        for file in sorted(manifest["files"]):
            if file.endswith(".safetensors"):
                try:
                    self._add(safe_open(folder / file, framework="pt"))
                except (OSError, ValueError, SafetensorError) as error:
                    raise ValueError(f"{folder / file} is not a shard of a checkpoint: {error}") from None
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: (piece.start, piece.stop))

    def _add(self, shard: Any) -> None:
        """Take note of what an open shard holds: keys are KIND/NAME@START."""
        for key in shard.keys():  # noqa: SIM118  not a dict
            kind, _, rest = key.partition("/")
            name, _, start = rest.rpartition("@")
            count = math.prod(shard.get_slice(key).get_shape())
            self._pieces[kind, name].append(_SavedPiece(int(start), int(start) + count, shard, key))

    @property
    def kinds(self) -> list[str]:
        """What is saved of the parameters."""
        return sorted({kind for kind, _ in self._pieces})

    def kind(self, name: str) -> str:
        """Where the values of a parameter of the model are: among the trained, or the untrained."""
        return MASTER if (MASTER, name) in self._pieces else UNTRAINED

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements start to stop (exclusive) of a flattened tensor; (stop - start,) on the CPU, in its saved type.

        Raises:
            ValueError: the checkpoint does not hold all of them.
        """
        parts = []
        have = start  # elements start to have are in parts
        for piece in self._pieces.get((kind, name), ()):
            end = min(stop, piece.stop)
            if piece.start <= have < end:
                parts.append(piece.shard.get_slice(piece.key)[have - piece.start : end - piece.start])
                have = end
        if have < stop:
            raise ValueError(f"checkpoint {self.folder} lacks {kind} of {name}, elements {have} to {stop}")
        if not parts:
            return torch.empty(0)
        if len(parts) == 1:  # not copied
            return parts[0]
        return torch.cat(parts)

    def whole(self, name: str, published: bool = False) -> Tensor:
        """A parameter or buffer of the model in its shape; a trained one in fp32, the average if that is published."""
        kind = self.kind(name)
        if published and (AVERAGE, name) in self._pieces:
            kind = AVERAGE
        shape = self.shapes[name]
        return self.read(kind, name, 0, math.prod(shape)).view(shape)

    def gaps(self) -> list[str]:
        """What is missing or there twice; empty when every kind holds every element of its parameters once."""
        problems = []
        expected = {(self.kind(name), name) for name in self.shapes}
        for kind, name in sorted(expected.union(self._pieces)):
            pieces = self._pieces.get((kind, name), ())
            starts = [piece.start for piece in pieces]
            stops = [piece.stop for piece in pieces]
            count = math.prod(self.shapes.get(name, (0,)))
            # each piece begins where the one before it ends, and the last one ends with the parameter
            if [*starts, count] != [0, *stops]:
                problems.append(f"{kind} of {name} is not complete")
        return problems


def text_of(value: Any) -> str:
    """The JSON text of a value as it stands in a file."""
    return json.dumps(value, indent=1) + "\n"


def record_of(text: str) -> dict[str, Any]:
    """What file_record finds of a file with this text."""
    data = text.encode()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sign(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest as JSON keeps it (keys are texts), with its own SHA-256."""
    manifest = json.loads(json.dumps(manifest))
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return manifest | {"sha256": digest}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: missing, truncated, altered, or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        signature = manifest.pop("sha256")
        intact = signature == sign(manifest)["sha256"] and all(map(FILE.fullmatch, manifest["files"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is missing, truncated or altered")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {manifest.get('format', 1)}, expected {FORMAT}")
    return manifest


def damage(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> list[str]:
    """What is wrong with these files of a checkpoint, one line each."""
    problems = []
    for name in names:
        try:
            whole = file_record(folder / name) == manifest["files"][name]
        except OSError:
            whole = False
        if not whole:
            problems.append(f"{folder / name} is missing, truncated or altered")
    return problems


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies below FOLDER/checkpoints."""
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Number of the step a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step_"))


def complete(root: Path) -> list[Path]:
    """Checkpoints with a manifest below FOLDER/checkpoints, oldest first."""
    folders = (path.parent for path in root.glob(f"step_*/{MANIFEST}"))
    return sorted((folder for folder in folders if TAG.fullmatch(folder.name)), key=step_of)


def candidates(root: Path) -> tuple[list[str], str | None]:
    """Tags of the checkpoints to try: the one latest.json names, then older ones, newest first.

    Returns:
        (tags, what is wrong with latest.json or None). A latest.json that is missing is no damage: the first save may
        have been killed before it; whatever is complete is tried.
    """
    tags = [folder.name for folder in reversed(complete(root))]
    path = root / LATEST
    if not path.exists():
        return tags, None
    try:
        named = str(json.loads(path.read_text())["tag"])
        if not TAG.fullmatch(named):
            raise ValueError(named)
    except (OSError, ValueError, TypeError, KeyError):
        return tags, f"{path} is truncated or altered"
    older = [tag for tag in tags if step_of(root / tag) < step_of(root / named)]
    return [named, *older], None


def scores(root: Path) -> dict[int, float | None]:
    """Step -> score of every checkpoint with a good manifest."""
    score_of = {}
    for folder in complete(root):
        try:
            score_of[step_of(folder)] = read_manifest(folder)["score"]
        except ValueError:
            continue
    return score_of


def best_of(scores: dict[int, float | None]) -> int | None:
    """The step with the highest score, the first of equals; None when none was evaluated."""
    evaluated = {step: score for step, score in scores.items() if score is not None and math.isfinite(score)}
    return max(sorted(evaluated), key=evaluated.__getitem__, default=None)


def surplus(scores: dict[int, float | None], *, keep: int, keep_best: bool, keep_every: int) -> set[int]:
    """Steps of the checkpoints to delete, given step -> score of all complete ones."""
    kept = set(sorted(scores)[-keep:])
    if keep_best:
        kept.add(best_of(scores))
    if keep_every:
        kept.update(step for step in scores if step % keep_every == 0)
    return set(scores) - kept


def remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves an unfinished save, never a damaged checkpoint.

    Raises:
        OSError: it cannot be deleted.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def write_file(path: Path, text: str) -> None:
    """Write a small file atomically, and flush it and its name to disk."""
    write_text(path, text)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
