"""How many steps fit into one job before its warning, by what a step took in a finished stage of the same phase."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from trainer.chain.settings import Settings
from trainer.chain.submit import Order
from trainer.tracking.metrics import read_metrics


def slots(settings: Settings, orders: Sequence[Order]) -> list[str]:
    """A line for every stage whose step time is known from this run or --speed-from."""
    folders = [settings.run]
    if settings.speed_from:
        folders.append(Path(settings.speed_from))
    lines = []
    for order in orders:
        name = order.stage.setting
        step = _rank_seconds(folders, order.stage.phase)
        if step is None:
            continue
        rank_seconds, source = step
        ranks = settings.nodes_of(name) * settings.ranks_of(name)
        seconds = rank_seconds / ranks
        usable = settings.hours_of(name) * 3600 - settings.warn_seconds
        lines.append(
            f"{order.stage.name}: a job of {settings.time_of(name)}, less {settings.warn_seconds} s of warning, has "
            f"room for about {usable / seconds:.0f} steps of {seconds:.3g} s on {ranks} ranks (measured in {source})"
        )
    return lines


def _rank_seconds(folders: Sequence[Path], phase: str) -> tuple[float, Path] | None:
    """Rank-seconds of a step, evaluation and saving included, in the first finished stage of a phase; its folder."""
    for folder in folders:
        for path in sorted(folder.glob(f"{phase}*/result.json")):
            result = json.loads(path.read_text())
            metrics = path.with_name("metrics.jsonl")
            if result.get("phase") != phase or not result.get("seconds") or not metrics.is_file():
                continue
            steps = max((row["step"] for row in read_metrics(metrics) if row["kind"] == "train"), default=0)
            if steps:
                return result["seconds"] * result["world_size"] / steps, path.parent
    return None
