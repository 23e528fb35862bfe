"""How long until the trainer answers, and until the embedded demo has done its first training step.

    python benchmarks/startup.py --rounds 5

Beside each the floor: a python that imports what must be imported, started the same way. The targets are 0.3 s and 15 s
on 2 quiet cores; on a busy machine look at the processor seconds and at the ratio to the floor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # after which a start has failed
STUB = "import os, sys, time, torch, deepspeed\nopen(sys.argv[-1] + os.environ['RANK'], 'w').write(str(time.time()))\n"


def main() -> None:
    """Print the median of each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    cases = {
        "floor of --help: python, argparse, yaml": lambda: answer("-c", "import argparse, yaml"),
        "--help": lambda: answer("trainer/run.py", "--help"),
        "floor of a start: launcher, torch, deepspeed": lambda: first_sign(stub),
        "first training step of the demo": lambda: first_sign(demo),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(rounds):  # in turn, so that a busy minute meets all of them
        for name, measure in cases.items():
            seconds[name].append(measure())
    print(f"median of {rounds}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print("| | wall s | processor s |\n|---|---:|---:|")
    for name, pairs in seconds.items():
        walls, processors = zip(*pairs)
        print(f"| {name} | {statistics.median(walls):.2f} | {statistics.median(processors):.2f} |")


def answer(*arguments: str) -> tuple[float, float]:
    """Wall and processor seconds of a python that ends by itself."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with exit code {process.returncode}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def first_sign(case: Callable[[Path], tuple[list[str], Callable[[], float | None]]]) -> tuple[float, float]:
    """Start two ranks through the launcher; wall seconds until `sign` says when, processor seconds of all by then."""
    with tempfile.TemporaryDirectory() as folder:
        arguments, sign = case(Path(folder))
        binaries = Path(sys.executable).parent
        launcher = [sys.executable, str(binaries / "deepspeed"), "--num_gpus", "2", "--master_port", _free_port()]
        log = Path(folder) / "log"
        started = time.time()
        with log.open("w") as log_file:
            process = subprocess.Popen(
                [*launcher, *arguments],
                cwd=ROOT,
                stdout=log_file,
                stderr=log_file,
                env={**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"},
                start_new_session=True,
            )
        processor: dict[int, float] = {}  # by process id, of the whole tree, also those that have ended
        try:
            seen_at = sign()
            while seen_at is None:
                # asked once more after the end: the sign may have come in between
                ended_without = process.poll() is not None and sign() is None
                if ended_without or time.time() - started > SECONDS:
                    raise SystemExit(f"no first step:\n{log.read_text()}")
                for member in _tree(process):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        processor[member.pid] = sum(member.cpu_times()[:2])  # user and system
                time.sleep(0.05)
                seen_at = sign()
        finally:
            _end(process)
    return seen_at - started, sum(processor.values())


def demo(folder: Path) -> tuple[list[str], Callable[[], float | None]]:
    """`make demo` with a metrics row after every step."""
    rows = folder / "out/teacher/metrics.jsonl"

    def sign() -> float | None:
        if not rows.is_file():
            return None
        lines = rows.read_text().splitlines()
        if not lines:
            return None
        return json.loads(lines[0])["time"]

    files = ["--ds_config", "ds_configs/cpu_debug.json", "--recipe", "recipes/demo_projected.yaml"]
    return ["trainer/run.py", *files, "--phase", "all", "--out", str(folder / "out"), "run.log_every=1"], sign


def stub(folder: Path) -> tuple[list[str], Callable[[], float | None]]:
    """Two ranks that import torch and deepspeed, and say when."""
    (folder / "stub.py").write_text(STUB)

    def sign() -> float | None:
        times = [path.read_text() for path in folder.glob("rank*")]
        if len(times) < 2 or not all(times):
            return None
        return max(float(text) for text in times)

    return [str(folder / "stub.py"), str(folder / "rank")], sign


def _end(process: subprocess.Popen) -> None:
    """kill -9 the launcher and its ranks, which share its session."""
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        tree = _tree(process)
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        psutil.wait_procs(tree, timeout=30)
    process.wait(30)


def _tree(process: subprocess.Popen) -> list[psutil.Process]:
    """A process and all below it."""
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


if __name__ == "__main__":
    main()
