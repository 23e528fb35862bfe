"""Saving and resuming inside a phase: DeepSpeed's files and one atomic commit.

FOLDER/checkpoints/step_00000123/...   what DeepSpeed writes, rank_{r}.json, manifest.json (sizes and SHA-256)
FOLDER/checkpoints/latest.json         names the newest complete one; replaced last, so a kill at any point before
                                       leaves the previous checkpoint in force
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.artifacts import file_record, write_json
from trainer.dist import Dist
from trainer.engine import Engine
from trainer.schema import RunConfig

BYTES_PER_PARAMETER = 16  # fp32 weight, two moments, and the working copy: what a first checkpoint needs at most


@dataclass(frozen=True)
class Resumed:
    """Where a phase goes on: steps done, what save() was given as `state`, `own` of every rank then, topology then."""

    step: int
    state: dict[str, Any]
    own: list[dict[str, Any]]
    topology: dict[str, Any]


class Saver:
    """Checkpoints of one phase."""

    def __init__(self, engine: Engine, folder: Path, run: RunConfig, dist: Dist):
        self.engine, self.folder, self.run, self.dist = engine, folder, run, dist
        self.failed = False

    def resume(self) -> Resumed | None:
        """Load the newest checkpoint (collective)."""
        found = resume(self.engine, self.folder, self.dist)
        return None if found is None else Resumed(found["step"], found["state"], self.dist.gather(found["own"]), {})

    def save(self, step: int, *, state: dict[str, Any], own: dict[str, Any], score: float | None = None,
             wait: bool = False) -> None:  # fmt: skip
        """Write a checkpoint (collective)."""
        save(self.engine, self.folder, step=step, state=state, own=own, keep=self.run.keep, dist=self.dist)

    def close(self) -> None:
        """Wait for the save in flight."""


def save(engine: Engine, folder: Path, *, step: int, state: dict[str, Any], own: dict[str, Any], keep: int,
         dist: Dist) -> None:  # fmt: skip
    """Write a checkpoint of all ranks and make it the newest (collective).

    Args:
        folder: the phase's folder.
        step: optimiser steps done.
        state: small JSON values the loop wants back.
        own: values and tensors of this rank alone that it wants back.
        keep: how many checkpoints stay.

    Raises:
        OSError: no room; nothing of the previous checkpoint is touched.
    """
    root = folder / "checkpoints"
    tag = f"step_{step:08d}"
    dist.agree(_prepare(engine, root, tag) if dist.main else None)
    try:
        engine.deepspeed.save_checkpoint(str(root), tag=tag, save_latest=False)
        (root / tag / f"rank_{dist.rank:05d}.json").write_text(json.dumps(own))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of several lines
        reason = str(error).splitlines()[0]
        raise OSError(f"cannot write checkpoint {root / tag}: {reason}. {_ADVICE}") from error
    dist.barrier()
    records = _records(root / tag, dist)
    if dist.main:
        manifest = {"step": step, "state": state, "topology": _topology(engine, dist), "files": records}
        write_json(root / tag / "manifest.json", manifest | {"sha256": _digest(manifest)})
        write_json(root / "latest.json", {"tag": tag})
        for old in sorted(root.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def resume(engine: Engine, folder: Path, dist: Dist) -> dict[str, Any] | None:
    """Load the newest checkpoint into the engine and this rank's generators.

    Returns:
        {"step": steps done, "state" and "own": what was given to save}, or None when there is no checkpoint.

    Raises:
        ValueError: a file is missing, truncated or altered, or the number of ranks or the ep size has changed.
    """
    root = folder / "checkpoints"
    if not (root / "latest.json").is_file():
        return None
    tag, manifest, problem = "", {}, None
    try:
        tag, manifest = _read_manifest(root)
        _check(root, tag, manifest, _topology(engine, dist), dist)
    except ValueError as error:
        problem = error
    dist.agree(problem)
    engine.deepspeed.load_checkpoint(str(root), tag=tag)
    own = json.loads((root / tag / f"rank_{dist.rank:05d}.json").read_text())
    return {"step": manifest["step"], "state": manifest["state"], "own": own}


def _read_manifest(root: Path) -> tuple[str, dict[str, Any]]:
    """Tag and manifest of the newest checkpoint; ValueError when one of the two files is damaged."""
    path, tag = root / "latest.json", ""
    try:
        tag = str(json.loads(path.read_text())["tag"])
        path = root / tag / "manifest.json"
        manifest = json.loads(path.read_text())
        if manifest.pop("sha256") != _digest(manifest):
            raise ValueError("altered")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise _damaged(root, tag, path) from None
    return tag, manifest


def _check(root: Path, tag: str, manifest: dict, topology: dict, dist: Dist) -> None:
    """ValueError when this checkpoint cannot be loaded. Each rank checks its share of the files."""
    if manifest["topology"] != topology:
        raise ValueError(
            f"checkpoint {root / tag} was saved with {manifest['topology']} and this run has {topology}: "
            "resume with the same ranks and DeepSpeed JSON, or use another --out"
        )
    for name in sorted(manifest["files"])[dist.rank :: dist.world]:
        path = root / tag / name
        if not path.is_file() or file_record(path) != manifest["files"][name]:
            raise _damaged(root, tag, path)


def _damaged(root: Path, tag: str, path: Path) -> ValueError:
    """What is wrong with a file of checkpoint `tag` ("" = not known), and the way back."""
    complete = sorted(p.parent.name for p in root.glob("step_*/manifest.json"))
    older = [name for name in complete if not tag or name < tag]
    advice = (
        f"to go back to {older[-1]}, write {json.dumps({'tag': older[-1]})} into {root / 'latest.json'}"
        if older
        else f"to start this phase over, delete {root}"
    )
    return ValueError(f"checkpoint file {path} is missing, truncated or altered: {advice}")


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _topology(engine: Engine, dist: Dist) -> dict[str, Any]:
    settings = engine.settings
    zero = settings.config["zero_optimization"]["stage"]
    return {"world": dist.world, "ep_size": settings.ep_size, "zero_stage": zero, "bf16": settings.bf16}


_ADVICE = "The previous checkpoint is untouched; free some space and start the same command again"


def _prepare(engine: Engine, root: Path, tag: str) -> OSError | None:
    """Make the empty folder of a checkpoint, or say why it cannot be."""
    try:
        for old in root.glob("step_*"):
            # left by killed saves, or newer than the one a user went back to: they would count among those kept
            if old.name >= tag or not (old / "manifest.json").is_file():
                shutil.rmtree(old)
        (root / tag).mkdir(parents=True)
    except OSError as error:
        return error
    needed = BYTES_PER_PARAMETER * sum(p.numel() for p in engine.module.parameters()) * engine.settings.ep_size
    free = shutil.disk_usage(root).free
    if free >= needed:
        return None
    return OSError(f"not enough room for a checkpoint in {root}: {needed:,} bytes needed, {free:,} free. {_ADVICE}")


def _records(folder: Path, dist: Dist) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, flushed to disk; the ranks share the work."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    mine = {}
    for path in files[dist.rank :: dist.world]:
        with path.open("rb") as f:
            os.fsync(f.fileno())
        mine[str(path.relative_to(folder))] = file_record(path)
    return {name: record for part in dist.gather(mine) for name, record in part.items()}
