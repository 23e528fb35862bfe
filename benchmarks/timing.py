"""What the benchmarks share: several kinds of work timed in turn, and what this machine can do at best.

Kinds are run one after another, round after round, and compared within a round: what else the machine does then falls
on all of them, and the median of the rounds' ratios holds where seconds do not.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from trainer import origin

Kinds = Mapping[str, Callable[[], object]]


def in_turn(kinds: Kinds, rounds: int, device: torch.device | str = "cpu") -> dict[str, list[float]]:
    """Seconds of every kind in every round, after one run of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for round_number in range(rounds + 1):
        for name, work in kinds.items():
            wait(device)
            start = time.perf_counter()
            work()
            wait(device)
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> float:
    """Median over the rounds of the time of one kind per time of another."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to]))


def wait(device: torch.device | str) -> None:
    """Until an accelerator has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(dtype: torch.dtype, device: torch.device | str = "cpu", size: int = 2048, rounds: int = 5) -> float:
    """FLOP/s of a product of square matrices, the best of some rounds: the floor of everything that multiplies."""
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / min(in_turn({"product": lambda: a @ a}, rounds, device)["product"])


def copy_rate(device: torch.device | str = "cpu", megabytes: int = 16, rounds: int = 9) -> float:
    """Bytes/s read and written by a copy into memory that is there already."""
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / min(in_turn({"copy": lambda: target.copy_(source)}, rounds, device)["copy"])


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    size = 2048 if torch.device(device).type == "cuda" else 512  # of products, which take minutes in bf16 on an old CPU
    cpuinfo = Path("/proc/cpuinfo")
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif cpuinfo.exists():
        lines = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = lines[0] if lines else name
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "matmul_float32": matmul_rate(torch.float32, device, size),
        "matmul_bfloat16": matmul_rate(torch.bfloat16, device, size),
        "copy": copy_rate(device),
    }


def describe(facts: Mapping[str, Any]) -> str:
    """One line of machine()."""
    return (
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}; products "
        f"{facts['matmul_float32'] / 1e9:.0f} GFLOP/s in float32, {facts['matmul_bfloat16'] / 1e9:.0f} in bfloat16; "
        f"copies {facts['copy'] / 1e9:.1f} GB/s"
    )


def write(path: Path | None, ratios: Mapping[str, float], **results: Any) -> None:
    """Keep results as JSON, where a path is given, with what they were made by; benchmarks/history.py reads such files.

    Args:
        ratios: what another machine or another day is compared by, by name.
        results: everything else; "machine" is what machine() says.
    """
    if path is None:
        return
    made_by = {
        "benchmark": Path(sys.argv[0]).stem,
        "arguments": sys.argv[1:],
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": origin.commit(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**made_by, "ratios": ratios, **results}, indent=1) + "\n")
