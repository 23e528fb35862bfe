"""Procedural images (data.source=fractals, textures), made once on this machine and kept in a cache folder.

A module of drawing/ with the name of the source draws them. A folder of the cache holds one split; its name tells the
parameters by a hash. It appears under that name only when it is complete, so a generator that was killed leaves nothing
that stands in the way.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.files.places import expanded
from trainer.config.data import DataConfig, ProceduralConfig
from trainer.data.base import ImageSource
from trainer.data.drawing import part as drawing_part
from trainer.data.drawing.common import TRAIN, VAL, colours
from trainer.disk import file_record, lock, move_into_place

logger = logging.getLogger(__name__)
FORMAT = 1  # raise it when the same parameters give other images or other files
ARRAYS = ("images", "palettes", "labels")
RECORD = "record.json"  # written last
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # what flock answers where there are none
JOBS = 20  # parts a split is made in, at most (where there are no more cores)
JOB_PIXELS = 1 << 22  # a part has at least as many


class ProceduralSource(ImageSource):
    """Images of `data.<family>`, sorted by class; the first to ask for them makes them, all others wait.

    Raises:
        OSError: the cache folder cannot be written, or has too little room; the message says how much is needed.
    """

    def __init__(self, data: DataConfig, config: ProceduralConfig, split: str):
        folder = cached(config, split)
        self._images_NSS = np.load(folder / "images.npy", mmap_mode="r")
        self._palettes_N23 = np.load(folder / "palettes.npy", mmap_mode="r")
        labels_N = np.load(folder / "labels.npy")
        kind = config.family.removesuffix("s")
        if config.seed:  # sets of two seeds have no class in common, so their names must not agree
            kind += f" of seed {config.seed},"
        names = [f"{kind} {label:03d}" for label in range(config.classes)]
        self.origin = f"procedural {config.family}, {folder.name}"
        super().__init__(f"{config.family} {split}", names, labels_N, data)

    def _read(self, row: int) -> Image.Image:
        image = Image.fromarray(self._images_NSS[row])
        image.putpalette(colours(self._palettes_N23[row]).tobytes())
        return image.convert("RGB")


def cached(config: ProceduralConfig, split: str) -> Path:
    """The folder with the images of `split` ("train" or "val"), made if it is not there yet.

    Safe to call from any number of processes: one makes the images, the others wait for it. Where the file system has
    no locks, each makes its own and the first to finish wins.

    Raises:
        OSError: see ProceduralSource.
    """
    family = config.family
    values = _parameters(config, split)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(expanded(config.cache or os.environ.get("M2MKD_CACHE") or "~/.cache/m2mkd"))
    folder = cache / f"{family}-{split}-{digest}"
    if _complete(folder, values):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")) as alone:
            if not _complete(folder, values):
                _make(folder, family, values, alone)
    except OSError as error:
        if error.errno is None:  # our own
            raise
        raise OSError(
            f"the {family} cannot be kept in {cache}: {error.strerror}. Choose another folder with data.{family}.cache "
            "or the variable M2MKD_CACHE."
        ) from error
    return folder


def _parameters(config: ProceduralConfig, split: str) -> dict[str, Any]:
    """All that the images depend on."""
    count = config.train_images if split == "train" else config.val_images
    return {
        "format": FORMAT,
        "split": split,
        "classes": config.classes,
        "per_class": count // config.classes,
        "size": config.size,
        "difficulty": float(config.difficulty),
        "seed": config.seed,
    }


def _complete(folder: Path, values: dict[str, Any]) -> bool:
    """Whether the folder has a record of these parameters, and every file the size in it (the sums are not checked)."""
    try:
        record = json.loads((folder / RECORD).read_text())
        if record["parameters"] != values:
            return False
        return all((folder / name).stat().st_size == about["bytes"] for name, about in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(folder: Path, family: str, values: dict[str, Any], alone: bool) -> None:
    """Draw the images beside `folder` and rename. Alone (under the lock), what killed generators left is removed."""
    if alone:
        for leftover in folder.parent.glob(f"{folder.name}.*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
    part = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.part")
    part.mkdir()
    try:
        _reserve(part, family, values)
        _draw(part, family, values)
        files = {f"{name}.npy": _sealed(part / f"{name}.npy") for name in ARRAYS}
        record = {"parameters": values, "files": files}
        (part / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        _sealed(part / RECORD)
        if folder.exists() and not _complete(folder, values):
            logger.warning("%s is damaged, its files are not those of its %s: made anew", folder, RECORD)
            shutil.rmtree(folder)
        move_into_place(part, folder, RECORD)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _reserve(part: Path, family: str, values: dict[str, Any]) -> None:
    """Create the arrays with all their bytes: a full disk is an error now and not a SIGBUS in the middle."""
    count = values["classes"] * values["per_class"]
    size = values["size"]
    shapes = {"images": (count, size, size), "palettes": (count, 2, 3)}  # bytes; a label takes 8
    needed = count * (size * size + 6 + 8)
    free = shutil.disk_usage(part).free
    if needed > free:
        raise _no_room(part, family, needed, free)
    try:
        for name, shape in shapes.items():
            path = part / f"{name}.npy"
            np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        np.save(part / "labels.npy", np.repeat(np.arange(values["classes"]), values["per_class"]))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(part, family, needed, free) from error
        raise


def _no_room(part: Path, family: str, needed: int, free: int) -> OSError:
    return OSError(
        f"the {family} need {needed:,} bytes in {part.parent}, where {free:,} are free. Make room, choose another "
        f"folder with data.{family}.cache, or lower data.{family}.size or train_images."
    )


def _draw(part: Path, family: str, values: dict[str, Any]) -> None:
    """Fill the arrays with as many processes as this one may use cores, class by class."""
    kind = TRAIN if values["split"] == "train" else VAL
    started = time.monotonic()
    cores = len(os.sched_getaffinity(0))
    classes = values["classes"]
    count = classes * values["per_class"]
    # parts: a core each at least, no smaller than a class
    worthwhile = min(JOBS, count * values["size"] ** 2 // JOB_PIXELS)
    parts = min(classes, max(cores, worthwhile))
    borders = [classes * number // parts for number in range(parts + 1)]
    jobs = list(itertools.pairwise(borders))  # first class, and the one after the last
    logger.info("making %d %s (%s) in %s", count, family, values["split"], part.parent)
    running: deque[subprocess.Popen] = deque()
    try:
        for number, labels in enumerate(jobs, 1):
            running.append(_started(part, family, kind, labels, values))
            while running and (len(running) == cores or number == len(jobs)):
                _finished(running[0], family)
                running.popleft()
                ready = number - len(running)
                logger.info("%s: %d%% after %.0f s", family, 100 * ready // len(jobs), time.monotonic() - started)
    finally:
        for process in running:
            process.kill()
            process.wait()


def _started(part: Path, family: str, kind: int, labels: tuple[int, int], values: dict[str, Any]) -> subprocess.Popen:
    """A process with numpy alone: it starts in a tenth of a second, and no thread or device of ours is copied."""
    task = {"folder": str(part), "family": family, "kind": kind, "labels": labels, "maker": os.getpid(), **values}
    command = [sys.executable, "-P", drawing_part.__file__, json.dumps(task)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _finished(process: subprocess.Popen, family: str) -> None:
    """Wait for a process that draws. Raises OSError when it has failed."""
    _, errors = process.communicate()
    if process.returncode == 0:
        return
    if process.returncode < 0:
        end = f"was killed by signal {-process.returncode} (9: out of memory, or somebody's kill)"
    else:
        lines = errors.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        end = f"ended with exit code {process.returncode}: {lines[-1]}"
    raise OSError(f"a process that draws {family} {end}. Nothing was kept; start the same command again.")


def _sealed(path: Path) -> dict[str, Any]:
    """Make sure that the file is on the disk; its size and SHA-256 for the record."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_record(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock file; False where the file system has no locks. The kernel frees it when the holder dies."""
    try:
        held = lock(path, f"another process makes these images: waiting for {path}", wait=True)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        held = None
    with held or contextlib.nullcontext():
        yield held is not None
