"""Small files on disk: written whole or not at all, and told apart by size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


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
