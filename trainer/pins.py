"""OUT/sources/: the commit that each hub id without one resolved to first; every later job of the run loads that one.

One small file per id, which appears whole or not at all and is never replaced: jobs of an array start together.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from pathlib import Path

FOLDER = "sources"
COMMIT = re.compile("[0-9a-f]{40}")


def pinned(out: Path, source: str) -> str:
    """A source as the run loads it: id@commit once that is recorded, else as it is written.

    Raises:
        ValueError: the record is truncated or altered.
    """
    path = _path(out, source)
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return source
    except ValueError:
        record = {}
    resolved = record.get("resolved") if isinstance(record, dict) else None
    if not isinstance(resolved, str) or not COMMIT.fullmatch(resolved.rpartition("@")[2]):
        raise ValueError(f"{path} is truncated or altered: delete it, and {source} is asked for its commit anew")
    return resolved


def pin(out: Path, source: str, resolved: str) -> None:
    """Record what a source resolved to, unless that is done.

    Args:
        resolved: id@commit; whatever else it is (a directory) is not recorded.

    Raises:
        ValueError: another job has recorded another commit in this moment.
    """
    if not COMMIT.fullmatch(resolved.rpartition("@")[2]) or COMMIT.fullmatch(source.rpartition("@")[2]):
        return
    path = _path(out, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    unfinished.write_text(json.dumps({"source": source, "resolved": resolved}) + "\n")
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            os.replace(unfinished, path)
    unfinished.unlink(missing_ok=True)
    first = pinned(out, source)
    if first != resolved:
        raise ValueError(f"{source} moved from {first} to {resolved} while jobs started: start this one again")


def _path(out: Path, source: str) -> Path:
    return out / FOLDER / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.json"
