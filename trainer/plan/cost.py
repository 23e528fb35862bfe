"""How fast a rank is, for the estimates of plan and dry run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

ASSUMED_FLOPS = 1e14  # per GPU and second: about a tenth of an H100's peak (trainer/config/gpus.py, ASSUMED_SHARE)


def measured_speed(folders: Sequence[Path]) -> tuple[float, str] | None:
    """FLOP/s of one rank in the slowest finished stage of the first of these run folders that has one, and its name."""
    for folder in folders:
        found = []
        for path in sorted(folder.glob("*/result.json")):
            result = json.loads(path.read_text())
            if result.get("flops") and result.get("seconds"):
                found.append((result["flops"] / result["seconds"] / result["world_size"], path.parent.name))
        if found:
            slowest, stage = min(found)
            return slowest, f"{slowest / 1e9:.3g} GFLOP/s per rank, measured in {folder / stage} (its slowest stage)"
    return None
