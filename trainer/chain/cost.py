"""What a chain will cost: each stage by what it took in this run or in --speed-from, start-up and saving included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from trainer.chain.following import events
from trainer.chain.following.spent import held
from trainer.chain.settings import ONLINE, Settings
from trainer.chain.submit import Order
from trainer.config import gpus
from trainer.plan.cost import ASSUMED_FLOPS, Measured, Speeds, finished, measured_speed
from trainer.tracking.console import table


def cost(settings: Settings, orders: Sequence[Order], flops: Mapping[str, float], speeds: Speeds) -> str:
    """Table of GPU-hours: expected, and at most by the time limits; and below it where the expectation is from.

    Args:
        flops: of each result, all ranks together; what is not in it is not known.
        speeds: what finished results took.
    """
    unit = settings.unit
    rows = []
    total_expected = 0.0
    total_limit = 0.0
    unmeasured: list[str] = []
    for order in orders:
        stage = order.stage
        nodes = settings.nodes_of(stage.setting)
        ranks = 0 if stage.phase in ONLINE else nodes * settings.ranks_of(stage.setting)
        jobs = order.jobs
        names = [stage.artifacts[element] for element in order.elements]
        hours = [expected_hours(settings, stage.setting, ranks, name, flops.get(name), speeds) for name in names]
        expected_cell = "-"
        if None not in hours:
            expected_cell = f"{sum(hours):.3g}"
            total_expected += sum(hours)
        if ranks and any(speeds.of(name) is None for name in names):
            unmeasured.append(stage.name)
        # rank-hours at most = jobs x ranks x time limit
        limit = jobs * ranks * settings.hours_of(stage.setting)
        total_limit += limit
        time = settings.time_of(stage.setting)
        rows.append((stage.name, str(jobs), str(nodes), str(ranks), time, expected_cell, f"{limit:.3g}"))
    rows.append(("total", "", "", "", "", f"{total_expected:.3g}", f"{total_limit:.3g}"))
    head = ("stage", "jobs", "nodes", f"{unit}s", "time limit", f"{unit}-hours expected", "at most")
    return f"{table(head, rows)}\n{_source(settings, speeds, unmeasured)}"


def expected_hours(
    settings: Settings, setting: str, ranks: int, name: str, flops: float | None, speeds: Speeds
) -> float | None:
    """Rank-hours of one result: its start, once for each time limit it fills, and its work; None = not known.

    Args:
        setting: what `time` calls its stage.
        ranks: of its job.
        flops: of its training; None = it trains nothing, or that is not known.
    """
    if not ranks:
        return 0.0
    measured = speeds.of(name)
    if measured is None:
        slowest = speeds.slowest
        if flops is None:
            return None
        return flops / (slowest.flops_per_second if slowest else ASSUMED_FLOPS) / 3600
    work = measured.rank_seconds  # of what trains nothing: as it took there
    if flops is not None and measured.flops_per_second:
        work = flops / measured.flops_per_second
    limit = settings.hours_of(setting) * 3600
    slot = max(limit - settings.warn_seconds - measured.startup, 1.0)  # seconds of work before the warning
    starts = math.ceil(work / ranks / slot)
    return (work + max(starts, 1) * measured.startup * ranks) / 3600


def speeds_of(settings: Settings) -> Speeds:
    """What is finished in this run folder, and then in --speed-from."""
    return Speeds([each for folder in _folders(settings) for each in _finished(folder)])


def gpu_of(settings: Settings) -> str:
    """The GPU a plan counts on: at the share of its peak that a finished stage has reached, where there is one."""
    measured = measured_speed(_folders(settings))
    if measured is None or "share=" in settings.gpu_kind:
        return settings.gpu_kind
    flops_per_second, _ = measured
    share = flops_per_second / (gpus.parse(settings.gpu_kind).tflops * 1e12)
    return f"{settings.gpu_kind},share={min(share, 1.0):.3g}"


def _source(settings: Settings, speeds: Speeds, unmeasured: Sequence[str]) -> str:
    """Where the expectation is from."""
    slowest = speeds.slowest
    if slowest is None:
        return (
            f"expected: {ASSUMED_FLOPS / 1e12:.0f} TFLOP/s per GPU, an assumption (no stage of {settings.run} is "
            "finished; --speed-from FINISHED_RUN uses what each stage took there); start-up, evaluation and saving "
            "come on top"
        )
    folders = dict.fromkeys(str(each.folder) for each in speeds.by_name.values())
    said = f"expected: what each stage took in {' and '.join(folders)}, start-up, evaluation and saving included"
    if not unmeasured:
        return said
    return (
        f"{said}; {', '.join(unmeasured)}, of which nothing is finished, by the slowest there ({slowest.name}, "
        f"{slowest.flops_per_second / 1e9:.3g} GFLOP/s per rank), and start-up comes on top"
    )


def _folders(settings: Settings) -> list[Path]:
    """Run folders whose speed counts, the first one first."""
    folders = [settings.run]
    if settings.speed_from:
        folders.append(Path(settings.speed_from))
    return folders


def _finished(folder: Path) -> list[Measured]:
    """The finished results of a run; where jobs made them, with the start-up that the notes of the bodies tell.

    A job holds its nodes before python starts and after it has ended, too. What it held over all its starts is the work
    on what it made, and as many start-ups.
    """
    results = finished(folder)
    notes = {each.name: events.read(folder, each.name) for each in results}
    measured = []
    for each in results:
        if any(note.kind == "done" for note in notes[each.name]):
            made = [each.seconds]  # and what the same job made beside, which has no notes of its own
            made += [other.seconds for other in results if other.phase == each.phase and not notes[other.name]]
            starts = [seconds for _, seconds in held(notes[each.name], [], None)]
            each = replace(each, startup=max(0.0, sum(starts) - sum(made)) / len(starts))
        measured.append(each)
    return measured
