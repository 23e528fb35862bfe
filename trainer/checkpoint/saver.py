"""Saving and resuming inside a phase (format: files.py). Training waits for a copy to host memory only.

A save: all ranks copy their pieces of the training state (zero_state.py) into host memory, 12 bytes per trained
parameter that a rank keeps (16 with train.ema), and go on training; a thread of each rank writes them. Rank 0's thread
waits for the files of all ranks, then writes the manifest and replaces latest.json. So a kill at any point leaves the
previous checkpoint in force.

The threads meet through the checkpoint's folder, which all ranks see anyway, and not through a process group: a thread
never waits inside a collective, so a dead rank blocks nobody's end; nothing is created per phase; no second network is
needed beside NCCL's. What can only be agreed between living ranks (an error, the end of a save) is agreed by the
training threads, when the next save or close() finds them all there.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint import files
from trainer.checkpoint.files import LATEST, MANIFEST, NOTHING, Reader, record_of, sign, text_of
from trainer.checkpoint.writer import ADVICE, Staging, Writing, names_of
from trainer.config.runtime import RunConfig
from trainer.distributed import zero_state
from trainer.distributed.engine import Engine
from trainer.distributed.ranks import Dist

log = logging.getLogger(__name__)
BYTES_PER_PARAMETER = 12  # fp32 weight and two moments: on disk, and in the host memory of the rank that keeps them
AVERAGE_BYTES = 4  # more with train.ema


@dataclass(frozen=True)
class Resumed:
    """Where a phase goes on: steps done, what save() was given as `state`, `own` of every rank then, topology then."""

    step: int
    state: dict[str, Any]
    own: list[dict[str, Any]]
    topology: dict[str, Any]


class Saver:
    """Checkpoints of one phase; every method is for all ranks together."""

    def __init__(self, engine: Engine, folder: Path, run: RunConfig, dist: Dist):
        """`folder` is the phase's, OUT/PHASE."""
        self.engine = engine
        self.run = run
        self.dist = dist
        self.phase = folder.name
        self.root = folder / "checkpoints"
        self._staging = Staging(dist.device)
        self._writing: Writing | None = None
        self._last: int | None = None  # step of the checkpoint loaded or saved last
        self._shapes: dict[str, tuple[int, ...]] = {}

    @property
    def failed(self) -> bool:
        """Whether the save in flight has failed on this rank."""
        return self._writing is not None and self._writing.error is not None

    @property
    def host_bytes(self) -> int:
        """Host memory this rank keeps for the copy."""
        return self._staging.buffer.numel()

    def resume(self) -> Resumed | None:
        """Load the newest checkpoint that is whole into the engine; None when there is none at all.

        Raises:
            ValueError: none is whole, it does not fit the model, or it was saved with another global batch.
            OSError: the save in flight has failed.
        """
        self._settle()
        folder, manifest = self._newest()
        if folder is None:
            return None
        with self.dist.together():
            self._check_fits(folder, manifest)
            reader = Reader(folder, manifest)
            gaps = reader.gaps()
            if gaps:
                raise ValueError(f"checkpoint {folder}: {'; '.join(gaps[:3])}")
        zero_state.restore(
            self.engine.deepspeed,
            reader.read,
            step=manifest["optimizer_steps"],
            beside=self.engine.beside_masters,
        )
        own = _own_values(folder, manifest) if self.dist.main else None
        self._last = manifest["step"]
        return Resumed(
            step=manifest["step"],
            state=manifest["state"],
            own=self.dist.gather(own)[0],
            topology=manifest["topology"],
        )

    def save(
        self,
        step: int,
        *,
        state: dict[str, Any],
        own: dict[str, Any],
        score: float | None = None,
        wait: bool = False,
    ) -> None:
        """Start a checkpoint; the one before it is complete when this returns.

        Args:
            step: optimiser steps done.
            state: small JSON values the loop wants back; the same on every rank.
            own: JSON values of this rank alone that it wants back.
            score: of the evaluation at this step, more is better, for run.keep_best.
            wait: return only when the checkpoint is in force.

        Raises:
            OSError: this save or the one before has failed, with the bytes needed and free; the previous checkpoint
                is untouched.
        """
        self._settle()
        if step != self._last:
            self._start(step, state, own, score)
        if wait:
            self._settle()

    def close(self) -> None:
        """Wait for the save in flight and give the host memory back.

        Raises:
            OSError: the save has failed, on any rank.
        """
        try:
            self._settle()
        finally:
            self._staging = Staging(self.dist.device)

    def _start(self, step: int, state: dict[str, Any], own: dict[str, Any], score: float | None) -> None:
        folder = files.folder_of(self.root, step)
        pieces = zero_state.pieces(self.engine.deepspeed, self.engine.beside_masters)
        layout = files.plan([(f"{p.kind}/{p.name}@{p.start}", p.values.dtype, p.values.shape) for p in pieces])
        manifest = {
            "format": files.FORMAT,
            "phase": self.phase,
            "step": step,
            "score": score,
            "state": state,
            "optimizer_steps": zero_state.optimizer_steps(self.engine.deepspeed),
            "topology": self._topology(),
            "parameters": {name: list(shape) for name, shape in sorted(self._all_shapes().items())},
        }
        needed = self._bytes_needed(manifest, layout, own)
        with self.dist.together():
            if self.dist.main:
                self._make_room(folder, needed)
        data = self._staging.fill([piece.values for piece in pieces], layout)
        self._writing = Writing(folder, self.dist, layout, data, own, needed, lambda: self._commit(folder, manifest))
        self._writing.start()
        self._last = step

    def _bytes_needed(self, manifest: dict[str, Any], layout: files.Layout, own: dict[str, Any]) -> int:
        """Size of the whole checkpoint: every rank's two files, and the manifest that records them (collective)."""
        text = text_of({"own": own, "shard": {"bytes": layout.bytes, "sha256": NOTHING}})
        sizes_of_ranks = self.dist.gather((layout.bytes, len(text.encode())))
        records = {}
        for rank, sizes in enumerate(sizes_of_ranks):
            for name, size in zip(names_of(rank), sizes):
                records[name] = {"bytes": size, "sha256": NOTHING}
        signed = text_of(sign(manifest | {"files": records}))
        return sum(map(sum, sizes_of_ranks)) + len(signed.encode())

    def _settle(self) -> None:
        """Wait until the save in flight is in force, or raise what went wrong with it, on all ranks alike."""
        if self._writing is None:
            return
        writing = self._writing
        self._writing = None
        writing.on_disk.wait()
        writing.all_have_written(failed=any(self.dist.gather(writing.error is not None)))
        writing.join()
        try:
            self.dist.agree(writing.error)
        except Exception:
            self._last = None
            if self.dist.main and not (writing.folder / MANIFEST).exists():  # give the room back
                shutil.rmtree(writing.folder, ignore_errors=True)
            raise

    def _make_room(self, folder: Path, needed: int) -> None:
        """Rank 0: the empty folder of a checkpoint. Raises OSError when that cannot be, or the disk is too full."""
        self.root.mkdir(parents=True, exist_ok=True)
        newest = self._last if self._last is not None else files.step_of(folder) - 1
        good = {files.folder_of(self.root, step) for step in files.scores(self.root) if step <= newest}
        for old in self.root.glob("step_*"):
            # left by killed saves, or newer than the one this run went back to: they would count among those kept
            if old not in good:
                files.remove(old)
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise OSError(f"not enough room for checkpoint {folder}: {needed:,} bytes needed, {free:,} free. {ADVICE}")
        folder.mkdir()

    def _commit(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Rank 0, all files of all ranks being on disk: put the checkpoint in force and delete what is not kept."""
        records = {}
        for rank in range(self.dist.world):
            shard, own = names_of(rank)
            text = (folder / own).read_text()
            records |= {shard: json.loads(text)["shard"], own: record_of(text)}
        files.write_file(folder / MANIFEST, text_of(sign(manifest | {"files": records})))
        scores = files.scores(self.root)
        best = files.best_of(scores) if self.run.keep_best else None
        latest = {"tag": folder.name}
        if best is not None:
            latest["best"] = files.folder_of(self.root, best).name
        files.write_file(self.root / LATEST, text_of(latest))
        surplus = files.surplus(
            scores, keep=self.run.keep, keep_best=self.run.keep_best, keep_every=self.run.keep_every
        )
        for step in surplus:
            try:
                files.remove(files.folder_of(self.root, step))
            except OSError as error:  # this checkpoint is in force all the same, and the next save tries again
                log.warning("cannot delete an old checkpoint: %s", error)

    def _newest(self) -> tuple[Path | None, dict[str, Any]]:
        """The newest checkpoint that is whole, and its manifest; the ranks share the checking. (None, {}) = no save.

        Raises:
            ValueError: there are checkpoints and all of them are damaged.
        """
        candidates = files.candidates(self.root) if self.dist.main else None
        tags, problem = self.dist.gather(candidates)[0]
        problems = [problem] if problem else []
        for tag in tags:
            folder = self.root / tag
            of_rank_0 = _manifest(folder) if self.dist.main else None
            manifest, damage = self.dist.gather(of_rank_0)[0]
            names = sorted(manifest.get("files", ()))[self.dist.rank :: self.dist.world]
            for damage_of_rank in self.dist.gather(files.damage(folder, manifest, names)):
                damage += damage_of_rank
            if not damage:
                if problems and self.dist.main:
                    log.warning("DAMAGED: %s. GOING ON FROM %s, the newest that is whole", "; ".join(problems), folder)
                return folder, manifest
            problems.append(damage[0])
        if problems:
            listed = "; ".join(problems)
            raise ValueError(f"no checkpoint is whole: {listed}. To start this phase over, delete {self.root}")
        return None, {}

    def _check_fits(self, folder: Path, manifest: dict[str, Any]) -> None:
        """ValueError when a checkpoint is of another model, or its next step would see other images."""
        saved = manifest["topology"]
        here = self._topology()
        if saved["global_batch"] != here["global_batch"]:
            raise ValueError(
                f"checkpoint {folder} was saved with a global batch of {saved['global_batch']} images and this run has "
                f"{here['global_batch']} ({here['micro_batch']} x accumulation {here['accumulation']} x "
                f'{here["world"]} ranks): set "train_batch_size" to {saved["global_batch"]} in the DeepSpeed JSON, or '
                f'"train_micro_batch_size_per_gpu" and "gradient_accumulation_steps" so that they make it'
            )
        saved_shapes = {name: tuple(shape) for name, shape in manifest["parameters"].items()}
        model_shapes = self._all_shapes()
        differing = []
        for name in sorted(saved_shapes.keys() | model_shapes.keys()):
            in_checkpoint = saved_shapes.get(name, "missing")
            in_model = model_shapes.get(name, "missing")
            if in_checkpoint != in_model:
                differing.append(f"{name}: {in_checkpoint} there, {in_model} in the model")
        if differing:
            raise ValueError(
                f"checkpoint {folder} is of another model: {len(differing)} of its {len(saved_shapes)} parameters "
                f"differ, among them {'; '.join(differing[:3])}. Use the recipe it was made with, or another --out"
            )

    def _all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Plain name -> shape over all ranks (collective the first time)."""
        if not self._shapes:
            for part in self.dist.gather(zero_state.shapes(self.engine.deepspeed)):
                self._shapes |= part
        return self._shapes

    def _topology(self) -> dict[str, Any]:
        settings = self.engine.settings
        return {
            "world": self.dist.world,
            "ep_size": settings.ep_size,
            "zero_stage": settings.config["zero_optimization"]["stage"],
            "bf16": settings.bf16,
            "global_batch": settings.global_batch,
            "micro_batch": settings.micro_batch,
            "accumulation": settings.accumulation,
        }


def _own_values(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank gave to save() as `own`, by rank."""
    texts = [(folder / name).read_text() for name in sorted(manifest["files"]) if name.endswith(".json")]
    return [json.loads(text)["own"] for text in texts]


def _manifest(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The manifest of a checkpoint and what is wrong with it."""
    try:
        return files.read_manifest(folder), []
    except ValueError as error:
        return {}, [str(error)]
