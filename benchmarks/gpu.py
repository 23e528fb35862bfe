"""Everything that only a GPU can tell, in one run of under 8 minutes: a page to send back.

    python benchmarks/gpu.py [--out gpu-page]                                   # one GPU
    python -m torch.distributed.run --nproc_per_node 8 benchmarks/gpu.py        # and the all-to-all of several

On rank 0, one after another, each in a process of its own that is ended when its time is up: the MoE layer against
DeepSpeed's (benchmarks/moe_block.py), whole steps of V-MoE, dense ViT and a pair of modules at sizes S and B in bf16
with their memory (benchmarks/step.py), and the times a step waits for the device (benchmarks/health_cost.py). With
several ranks first the bandwidth of all-to-all, all-reduce and all-gather over sizes. OUT/page.md has all of it,
OUT/*.json the figures. Not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
MEGABYTES = (1, 16, 128)
REPEATS = 10
# title -> arguments of a script, seconds it may take
SCRIPTS = {
    "The MoE layer": (
        ["moe_block.py", "--experts", "8", "64", "--tokens", "6304", "50432", "--type", "bfloat16", "--rounds", "7"],
        150,
    ),
    "Steps, size S": (["step.py", "--size", "S", "--batch", "128", "--type", "bfloat16", "--rounds", "7"], 90),
    "Steps, size B": (["step.py", "--size", "B", "--batch", "64", "--type", "bfloat16", "--rounds", "7"], 120),
    "The watch over a training": (["health_cost.py", "--rounds", "3"], 90),
}


def main() -> None:
    """Measure and write OUT/page.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-page"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py measures a GPU, and torch sees none here; on a CPU run the scripts it names.")
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = [_collectives()] if int(os.environ.get("WORLD_SIZE", "1")) > 1 else []
    if int(os.environ.get("RANK", "0")):
        return
    for title, (arguments, limit) in SCRIPTS.items():
        parts.append(f"## {title}\n\n{_run(arguments, limit, options.out)}")
    seconds = time.monotonic() - started
    head = f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {seconds:.0f} s\n"
    page = "\n\n".join([head, *parts])
    (options.out / "page.md").write_text(page + "\n")
    print(page)


def _run(arguments: list[str], limit: int, out: Path) -> str:
    """What a script prints, or why it did not."""
    script, *rest = arguments
    if script != "health_cost.py":
        rest += ["--json", str((out / f"{'-'.join(arguments[:3])}.json").absolute())]
    command = [sys.executable, str(ROOT / "benchmarks" / script), *rest]
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    typed = " ".join(["python", f"benchmarks/{script}", *rest])
    try:
        done = subprocess.run(command, env=alone, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode()
        return f"`{typed}`\n\n{said}\nstopped after {limit} s"
    problem = "" if done.returncode == 0 else f"\n\nexit code {done.returncode}:\n\n```text\n{done.stderr[-2000:]}\n```"
    return f"`{typed}`\n\n{done.stdout}{problem}"


def _collectives() -> str:
    """GB/s that each rank sends, by NCCL, for tensors of some sizes; all ranks call it, rank 0 gets the table."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    world = dist.get_world_size()
    lines = [
        f"## Collectives of {world} ranks\n",
        "| MB | all-to-all | all-reduce | all-gather |",
        "|---:|---:|---:|---:|",
    ]
    for megabytes in MEGABYTES:
        numbers = megabytes * 2**20 // 2 // world * world
        tensor = torch.zeros(numbers, dtype=torch.bfloat16, device="cuda")
        other = torch.empty_like(tensor)
        part = tensor[: numbers // world].clone()
        # bytes a rank sends for a tensor of n: n (p-1)/p, twice that for an all-reduce
        share = 2 * numbers * (world - 1) / world
        kinds = [
            (share, lambda a=tensor, b=other: dist.all_to_all_single(b, a)),
            (2 * share, lambda a=tensor: dist.all_reduce(a)),
            (share, lambda a=part, b=other: dist.all_gather_into_tensor(b, a)),
        ]
        rates = [sent / _seconds(call) / 1e9 for sent, call in kinds]
        lines.append(f"| {megabytes} | " + " | ".join(f"{rate:.1f} GB/s" for rate in rates) + " |")
    dist.destroy_process_group()
    return "\n".join(lines)


def _seconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / REPEATS


if __name__ == "__main__":
    main()
