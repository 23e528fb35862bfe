"""Files on disk: written whole or not at all, told apart by size and SHA-256, and locks between processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

log = logging.getLogger(__name__)


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as f:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The block writes the path it is given, PATH.tmp; then that is renamed to PATH, in place of what was there.

    So a reader meets the old file or the whole new one. What must survive a power cut, the block flushes to disk. After
    an exception PATH is untouched, and PATH.tmp stays until the next writer replaces it.
    """
    unfinished = path.with_name(path.name + ".tmp")
    yield unfinished
    os.replace(unfinished, path)


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically, its bytes flushed to disk."""
    with replacing(path) as unfinished, unfinished.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; a value that is not finite is an error, not invalid JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def move_into_place(folder: Path, target: Path, last: str) -> bool:
    """Give a whole folder its name in one step; several processes may do so at the same time.

    Args:
        last: file that is written last, so that a folder which has it is whole.

    Returns:
        False when another process was first: its folder stays, and `folder` is the caller's to delete.

    Raises:
        OSError: the disk, or something that is no whole folder is in the way.
    """
    try:
        folder.rename(target)
    except OSError:
        if not (target / last).is_file():
            raise
        return False
    return True


def lock(path: Path, busy: str, *, wait: bool = False) -> TextIO:
    """Lock a file (made if need be) until it is closed, or the last process that has inherited it ends.

    Args:
        busy: what is said when another process holds the lock.
        wait: log that, and wait.

    Raises:
        ValueError: another process holds the lock; only without `wait`.
        OSError: the file cannot be opened, or the file system has no locks.
    """
    file = path.open("a")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise ValueError(busy) from None
            log.info("%s", busy)
            fcntl.flock(file, fcntl.LOCK_EX)
    except BaseException:
        file.close()
        raise
    return file
