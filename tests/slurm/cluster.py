"""A real Slurm cluster on one machine: munged, slurmctld and one slurmd per node, each node in its own network.

Everything lives below one temporary folder and inside one set of namespaces (pid, mount, network, host name): ending
its first process ends all of it, also when the tests are killed. Nothing listens outside these namespaces.

    python tests/slurm/cluster.py            # brings one up, opens a shell on its login node, takes it down
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
PR_SET_PDEATHSIG = 1
CONF = """
ClusterName=m2mkd
SlurmctldHost=head(10.213.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/run/ctld.pid
SlurmdPidFile={state}/run/slurmd.%n.pid
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=bf_interval=2,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/filetxt
JobCompLoc={state}/log/jobcomp.txt
MinJobAge=36000
KillWait=10
MessageTimeout=10
SlurmdTimeout=30
ReturnToService=1
NodeName=node[1-{nodes}] NodeAddr=10.213.0.1[1-{nodes}] CPUs=64 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
EnforcePartLimits=ALL
PartitionName=batch Nodes=node[1-{nodes}] Default=YES MaxTime=1-0 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=node[1-{nodes}] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a Slurm test cluster needs Linux and root (namespaces, munge)"
    absent = [p for p in PROGRAMS if not shutil.which(p)]
    if absent:
        return f"{', '.join(absent)} not installed; on Debian: apt-get install {PACKAGES}"
    return None


class Cluster:
    """Two nodes with two fake GPUs each, a partition `batch` that can be preempted, and one `urgent`."""

    def __init__(self, nodes: int = 2, gpus: int = 2):
        self.nodes = nodes
        self.state = Path(tempfile.mkdtemp(prefix="m2mkd-slurm-"))
        self.state.chmod(0o755)  # munged wants to see others pass
        self.environ = {**os.environ, "SLURM_CONF": str(self.state / "slurm.conf")}
        for name in ("ctld", "spool", "run", "log", "dev", "munge"):
            (self.state / name).mkdir()
        self._write_files(gpus)
        self.outer: subprocess.Popen | None = None

    def start(self, timeout: float = 60.0) -> Cluster:
        """Start every daemon and wait until all nodes are idle. Raises RuntimeError with the daemons' last words."""
        command = ["unshare", "--fork", "--pid", "--kill-child", "--mount", "--mount-proc", "--net", "--uts",
                   "bash", str(HERE / "cluster_init.sh"), str(self.state), str(self.nodes)]  # fmt: skip
        self.outer = subprocess.Popen(command, env=self.environ, preexec_fn=_die_with_parent, start_new_session=True)
        try:
            self.wait_for(lambda: (self.state / "run/started").exists(), timeout, "the daemons")
            self.wait_for(self._idle, timeout, "idle nodes")
        except RuntimeError as error:
            words = "\n".join(f"== {p.name}\n{p.read_text()[-1500:]}" for p in sorted(self.state.glob("log/*")))
            self.stop()
            raise RuntimeError(f"{error}\n{words}") from None
        return self

    def run(self, *command: str, cwd: Path | str = "/", timeout: float = 120, **environ: str):
        """Run a command on the login node; returns the CompletedProcess with text output."""
        return subprocess.run(self.inside(command, cwd), env=self.environ | environ, capture_output=True, text=True,
                              timeout=timeout)  # fmt: skip

    def out(self, *command: str, **options) -> str:
        """Standard output of a command that must succeed."""
        done = self.run(*command, **options)
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def inside(self, command, cwd: Path | str) -> list[str]:
        """The same command line, entering the login node's namespaces."""
        enter = [shutil.which("nsenter"), "-t", str(self._first_pid()), "-m", "-n", "-u", "-p", "--"]
        return [*enter, "/bin/bash", "-c", 'cd "$1" && shift && exec "$@"', "_", str(cwd), *command]

    def stop_controller(self) -> None:
        """Stop slurmctld, as when the head node is down."""
        self.out("kill", (self.state / "run/slurmctld.pid").read_text().strip())
        self.wait_for(lambda: "DOWN" in self.run("scontrol", "ping").stdout, 30, "the controller to stop")

    def start_controller(self) -> None:
        """Start slurmctld again with its saved state."""
        with (self.state / "log/slurmctld.out").open("a") as log:
            subprocess.Popen(self.inside(["slurmctld", "-D"], "/"), env=self.environ, stdout=log, stderr=log,
                             preexec_fn=_die_with_parent)  # fmt: skip
        self.wait_for(lambda: "UP" in self.run("scontrol", "ping").stdout, 30, "the controller to start")
        asked = ["sbatch", "--test-only", f"--nodes={self.nodes}", "--gres=gpu:1", "--wrap=true"]
        # until the nodes have registered again it knows of no GPUs, and refuses what asks for them
        self.wait_for(lambda: self.run(*asked).returncode == 0, 60, "the controller to know its nodes")
        pid = self.out("pgrep", "-o", "-x", "slurmctld").strip()
        (self.state / "run/slurmctld.pid").write_text(pid)

    def kill_node(self, number: int) -> None:
        """Kill every process of a node at once: its slurmd, Slurm's steps and the ranks, as when it loses power."""
        pid = (self.state / f"run/node{number}.pid").read_text().strip()
        program = (
            'ns=$(readlink "/proc/$1/ns/net"); for p in /proc/[0-9]*; do '
            '[[ $(readlink "$p/ns/net") != "$ns" ]] || kill -KILL "${p#/proc/}"; done'
        )
        self.out("bash", "-c", program, "_", pid)
        gone = lambda: "veth" + str(number) not in self.out("ip", "-o", "link")  # noqa: E731
        self.wait_for(gone, 30, f"the network of node{number} to go")

    def start_node(self, number: int) -> None:
        """Start a node that was killed."""
        command = self.inside(["bash", str(HERE / "cluster_node.sh"), str(self.state), str(number)], "/")
        subprocess.run(command, env=self.environ, check=True, timeout=60)

    def stop(self) -> None:
        """End the first process, and with it everything inside, and remove the folder."""
        if self.outer is not None:
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(self._first_pid(), signal.SIGKILL)
            self.outer.kill()
            self.outer.wait(30)
        shutil.rmtree(self.state, ignore_errors=True)

    @staticmethod
    def wait_for(condition, timeout: float, what: str) -> None:
        """Poll until condition() is true. Raises RuntimeError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                raise RuntimeError(f"waited {timeout:.0f} s for {what}")
            time.sleep(0.2)

    def _first_pid(self) -> int:
        pid = self.outer.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _idle(self) -> bool:
        if self.outer.poll() is not None:
            raise RuntimeError(f"the cluster's first process ended with {self.outer.returncode}")
        return self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%T").stdout.split() == ["idle"] * self.nodes

    def _write_files(self, gpus: int) -> None:
        key = self.state / "munge/key"
        key.mkdir(mode=0o700)
        (key / "munge.key").write_bytes(secrets.token_bytes(64))
        (key / "munge.key").chmod(0o400)
        for i in range(gpus):  # Slurm takes only character devices for File=, and links to one
            (self.state / f"dev/nvidia{i}").symlink_to("/dev/null")
        hosts = ["127.0.0.1 localhost", "10.213.0.1 head"]
        hosts += [f"10.213.0.{10 + i} node{i}" for i in range(1, self.nodes + 1)]
        (self.state / "hosts").write_text("\n".join(hosts) + "\n")
        (self.state / "slurm.conf").write_text(CONF.format(state=self.state, nodes=self.nodes, gpus=gpus))
        (self.state / "gres.conf").write_text(
            f"NodeName=node[1-{self.nodes}] Name=gpu File={self.state}/dev/nvidia[0-{gpus - 1}]\n"
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    if problem := missing():
        sys.exit(problem)
    cluster = Cluster().start()
    try:
        print(f"login node of a cluster with {cluster.nodes} nodes, state in {cluster.state}; exit ends it")
        subprocess.run(cluster.inside(sys.argv[1:] or ["bash"], os.getcwd()), env=cluster.environ)
    finally:
        cluster.stop()
