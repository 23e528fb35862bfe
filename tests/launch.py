"""Starts trainer/run.py as users do (deepspeed, torchrun, plain python), and ends every process it started.

finished = launch("deepspeed", 2, [*TINY, "--phase", "all", "--out", out])
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
RUN = str(ROOT / "trainer/run.py")
TINY_RECIPE = str(ROOT / "tests/fixtures/tiny.yaml")
TINY = ["--ds_config", str(ROOT / "ds_configs/cpu_debug.json"), "--recipe", TINY_RECIPE]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Finished:
    """How a job ended: exit code (negative = signal) and everything it wrote."""

    code: int
    output: str


class Job:
    """A running launch."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self.process, self.log = process, log

    def wait(self, timeout: float = 240) -> Finished:
        """Wait for the end. Raises AssertionError with the output when it takes longer than `timeout` seconds."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not finished after {timeout} s:\n{self.log.read_text()}") from None
        return Finished(code, self.log.read_text(errors="replace"))

    def kill(self) -> None:
        """kill -9 the launcher and all it started: first stopped, so that none of them can react to another's end."""
        if self.process.poll() is not None:
            return
        tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in tree:
                try:
                    process.send_signal(number)
                except psutil.NoSuchProcess:
                    continue
        psutil.wait_procs(tree, timeout=30)
        self.process.wait(30)


@contextmanager
def started(launcher: str, ranks: int, arguments: list[str]) -> Iterator[Job]:
    """Start trainer/run.py with `launcher` ("deepspeed", "torchrun" or "python"); nothing survives the block."""
    scripts = Path(sys.executable).parent
    command = {
        "deepspeed": [sys.executable, str(scripts / "deepspeed"), "--num_gpus", str(ranks),
                      "--master_port", free_port()],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
                     "--master_port", free_port()],
        "python": [sys.executable],
    }[launcher]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "output"
        with log.open("w") as out:
            process = subprocess.Popen([*command, RUN, *map(str, arguments)], stdout=out, stderr=subprocess.STDOUT,
                                       cwd=folder, env=environment(), start_new_session=True)  # fmt: skip
        job = Job(process, log)
        try:
            yield job
        finally:
            job.kill()


def launch(launcher: str, ranks: int, arguments: list[str]) -> Finished:
    """The same to its end."""
    with started(launcher, ranks, arguments) as job:
        return job.wait()


def environment() -> dict[str, str]:
    """One thread per rank, the interpreter's own scripts first on PATH, and no ranks of an outer launcher."""
    kept = {name: value for name, value in os.environ.items()
            if name not in RANK_VARIABLES and not name.startswith("SLURM_")}  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"OMP_NUM_THREADS": "1", "PATH": path, "DS_ACCELERATOR": "cpu"}


def free_port() -> str:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
