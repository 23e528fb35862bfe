"""A chain on the test cluster: submit it, watch its training, disturb it, and compare what it left."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "tests/fixtures/slurm_tiny.yaml"
DS_CONFIG = "ds_configs/cpu_debug.json"
EP2 = "ds.trainer.ep_size=2"
ARTIFACTS = ("teacher", "meta", "distill_0", "distill_1", "distill_2", "train")
DRIVER = "slurm/m2mkd_vmoe.sh"
LIGHT = {
    "PYTHON": str(ROOT / "tests/slurm/light_python"),
    "LIGHT_STEPS": "50",
}  # settings of stages that pretend to train


class Chain:
    """One run folder on the cluster: two nodes with one rank each unless the settings say otherwise."""

    def __init__(self, cluster: Cluster, out: Path, root: Path = ROOT, **settings: str):
        self.cluster, self.out, self.root = cluster, out, root
        self.waiting: dict[str, float] = {}  # requeued jobs and since when they wait
        self.slow = out.with_name(out.name + ".slow")  # while it is there, warm ranks take their time
        self.settings = {
            "RECIPE": RECIPE, "DS_CONFIG": DS_CONFIG, "OUT": str(out), "NODES": "2", "GPUS_PER_NODE": "1",
            "CPUS_PER_TASK": "1", "TIME": "00:20:00", "ARRAY_THROTTLE": "1", "OVERRIDES": EP2, "ACCEPT": "across",
            "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "SLOW_WHILE": str(self.slow),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        } | settings  # fmt: skip

    def command(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
        """bash slurm/m2mkd_vmoe.sh ARGUMENTS on the login node."""
        return self.cluster.run("bash", DRIVER, *arguments, cwd=self.root, **self.settings | settings)

    def submit(self, *arguments: str) -> dict[str, str]:
        """Submit; returns stage -> job of this submission."""
        before = len(self.rows())
        done = self.command("submit", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return {row[1]: row[3] for row in self.rows()[before:]}

    def submit_by_driver(self) -> dict[str, str]:
        """sbatch slurm/m2mkd_vmoe.sh, as users do."""
        log = self.out.with_name(self.out.name + "-driver.log")
        done = self.cluster.run("sbatch", "--wait", "-o", str(log), DRIVER, cwd=self.root, **self.settings)
        assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
        return {row[1]: row[3] for row in self.rows()}

    def rows(self) -> list[list[str]]:
        """Lines of jobs.tsv without its head."""
        path = self.out / "jobs.tsv"
        return [line.split("\t") for line in path.read_text().splitlines()[1:]] if path.exists() else []

    def start(self, script: Path, *flags: str) -> str:
        """sbatch one job script by hand; returns its id."""
        return self.cluster.out("sbatch", "--parsable", *flags, str(script), cwd=self.root, **self.settings).strip()

    def state(self, job: str) -> str:
        """State of a job or an array element (12 or 12_3)."""
        lines = self.cluster.out("squeue", "-h", "--array", "-t", "all", "-o", "%i|%F|%T").splitlines()
        states = [line.split("|")[2] for line in lines if job in line.split("|")[:2]]
        assert states, f"no job {job} in {lines}"
        return states[0]

    def events(self, artifact: str) -> list[str]:
        """What the job body noted about a stage, in order."""
        path = self.out / f"slurm/events/{artifact}.tsv"
        return [" ".join(line.split("\t")[3:]) for line in path.read_text().splitlines()] if path.exists() else []

    def starts(self) -> int:
        """How often the job body has started, over all stages."""
        return sum(e.startswith("started") for name in ARTIFACTS for e in self.events(name))

    def step(self, artifact: str) -> int:
        """Newest step in metrics.jsonl, 0 without one."""
        path = self.out / artifact / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0

    def resumed(self, artifact: str) -> list[int]:
        """Steps at which rank 0 said to go on."""
        logs = sorted(self.out.glob("logs/*/*-rank0.out"))
        title = f"distill {int(artifact[-1]) + 1}/3" if artifact.startswith("distill") else artifact
        mark = f"[{title}] resumed after step "
        return [int(line.removeprefix(mark)) for log in logs for line in log.read_text().splitlines()
                if line.startswith(mark)]  # fmt: skip

    def ranks(self, pattern: str) -> list[str]:
        """Process ids of the trainer's ranks whose command line holds `pattern`, as the cluster sees them."""
        return self.cluster.run("pgrep", "-f", rf"^\S*python\S* .*/trainer/run.py .*{pattern}").stdout.split()

    def alive(self) -> list[str]:
        """What lives of the chain: its jobs, and its processes on any node."""
        ours = {row[3] for row in self.rows()}
        states = self.cluster.out("squeue", "-h", "--array", "-o", "%F|%i|%T").splitlines()
        jobs = [line for line in states if line.split("|")[0] in ours]
        return jobs + self.cluster.run("pgrep", "-af", rf"trainer/run.py .*{self.out}").stdout.splitlines()

    def hurry(self) -> None:
        """Slurm restarts a requeued job after two minutes; here after three seconds: the nodes have let go of it."""
        waiting = {}
        for line in self.cluster.out("squeue", "-h", "--array", "-t", "PD", "-o", "%i|%r").splitlines():
            job, reason = line.split("|")
            if reason == "BeginTime":
                waiting[job] = self.waiting.get(job, time.monotonic())
                if time.monotonic() - waiting[job] > 3:
                    self.cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")
        self.waiting = waiting

    @contextmanager
    def slowly(self) -> Iterator[None]:
        """Inside the block warm ranks make ten steps a second: training lasts until it has been disturbed."""
        self.slow.touch()
        try:
            yield
        finally:
            self.slow.unlink()

    def until(self, condition: Callable[[], bool], what: str, timeout: float = 150) -> None:
        """Wait, and fail with the logs when it takes too long."""
        end = time.monotonic() + timeout
        while not condition():
            self.hurry()
            assert time.monotonic() < end, (
                f"waited {timeout:.0f} s for {what}\n{self.command('status').stdout}\n{self.logs()}"
            )
            time.sleep(0.4)

    def until_ended(self, job: str, timeout: float = 200) -> str:
        """Wait until a job is neither waiting nor running; returns its state."""
        live = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")
        self.until(lambda: self.state(job) not in live, f"the end of job {job}", timeout)
        return self.state(job)

    def until_requeued(self, artifact: str, times: int = 1) -> None:
        """Wait until the job body noted that it put itself back into the queue."""
        self.until(lambda: len([e for e in self.events(artifact) if e.startswith("requeued")]) >= times,
                   f"requeue {times} of {artifact}")  # fmt: skip

    def until_training(self, artifact: str, step: int) -> None:
        """Wait until a stage has logged a step."""
        self.until(lambda: self.step(artifact) >= step, f"step {step} of {artifact}")

    def logs(self) -> str:
        """The end of every log, for a failing test."""
        files = sorted(self.out.glob("logs/**/*.out"))
        return "\n".join(f"== {f.relative_to(self.out)}\n{f.read_text(errors='replace')[-1500:]}" for f in files)


def same_weights(out: Path, reference: Path) -> None:
    """Every stage's weights are the reference's, bit for bit."""
    for artifact in ARTIFACTS:
        weights = f"{artifact}/model.safetensors"
        assert (out / weights).read_bytes() == (reference / weights).read_bytes(), f"{weights} differs"


def light_weights(artifact: str) -> str:
    """What tests/slurm/light_python leaves as the weights of a stage that made every step once."""
    digest = hashlib.sha256(artifact.encode()).hexdigest()
    for step in range(1, int(LIGHT["LIGHT_STEPS"]) + 1):
        digest = hashlib.sha256(f"{digest} {step}".encode()).hexdigest()
    return digest
