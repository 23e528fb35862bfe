"""Where this copy of the code is from: commit and remote, from git or, in a frozen copy, from the record beside it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = "frozen.json"  # at the top of a frozen copy (trainer/chain/frozen.py), which lies in no git of its own


def commit(root: Path = ROOT) -> str | None:
    """Commit of the code, with "+changes" when the tree differs; None outside git."""
    frozen = _frozen(root)
    if frozen is not None:
        return frozen["commit"]
    try:
        head = git(root, "rev-parse", "HEAD")
        changes = git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if changes else head


def remote(root: Path = ROOT) -> str:
    """Address of the git remote origin as git keeps it; empty where there is none."""
    frozen = _frozen(root)
    if frozen is not None:
        return frozen["remote"]
    try:
        return git(root, "config", "--get", "remote.origin.url")
    except (OSError, subprocess.SubprocessError):
        return ""


def git(root: Path, *arguments: str) -> str:
    """Output of one git command without the white space around it.

    Raises:
        OSError: no git on this machine.
        subprocess.SubprocessError: it failed, or took longer than 10 s.
    """
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _frozen(root: Path) -> dict[str, str] | None:
    path = root / RECORD
    return json.loads(path.read_text()) if path.is_file() else None
