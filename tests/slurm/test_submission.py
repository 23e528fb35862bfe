"""What a submission promises, on a real cluster; the stand-in's tests are tests/unit/test_slurm_together.py."""

import shutil
import subprocess
import time

import pytest

from tests.slurm.chain import DRIVER, ROOT, Chain
from trainer.chain import together


@pytest.fixture
def chain(cluster, tmp_path):
    made = Chain(cluster, tmp_path / "a run")
    yield made
    if (made.out / "jobs.tsv").exists():
        made.command("cancel")


def queued(cluster):
    """Reason by job, of those that wait or run."""
    lines = cluster.out("squeue", "--noheader", "--format=%F %r").splitlines()
    return dict(line.split(maxsplit=1) for line in lines)


def test_a_driver_killed_at_any_moment_leaves_nothing_that_runs(cluster, chain, tmp_path):
    """Its jobs are held, and found by their script where they were not recorded; the next submission replaces them."""
    slow = tmp_path / "bin/sbatch"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/bash\n{shutil.which("sbatch")} "$@"; code=$?; sleep 1; exit $code\n')
    slow.chmod(0o755)
    before = queued(cluster)
    environ = cluster.environ | chain.settings | {"PATH": f"{slow.parent}:{chain.settings['PATH']}"}
    driver = subprocess.Popen(cluster.inside(["bash", DRIVER], chain.root), env=environ, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)  # fmt: skip
    chain.until(lambda: len(chain.rows()) >= 2 or driver.poll() is not None, "two recorded jobs", timeout=60)
    assert driver.poll() is None, driver.communicate()[0].decode()
    (python,) = cluster.out("pgrep", "-f", "^python -m trainer.chain").split()
    cluster.out("kill", "-KILL", python)
    driver.communicate(timeout=20)
    (chain.out / "jobs.tsv").unlink()  # as if it had been killed before the first record
    time.sleep(1)
    left = {job: reason for job, reason in queued(cluster).items() if job not in before}
    assert len(left) >= 2 and set(left.values()) <= set(together.WAITING)
    again = chain.command("submit")
    assert again.returncode == 0 and "killed half-way: taking back its jobs" in again.stdout, again.stderr
    now = {job for job in queued(cluster) if job not in before}
    assert now == {row[3] for row in chain.rows()}


def test_a_partition_that_is_down_is_not_waited_for(cluster, chain):
    cluster.out("scontrol", "update", "partitionname=urgent", "state=down")
    try:
        done = chain.command("submit", "--partition", "batch,train=urgent")
        assert done.returncode == 2 and chain.rows() == []
        assert "error: nothing was submitted. train: partition urgent is DOWN" in done.stderr
    finally:
        cluster.out("scontrol", "update", "partitionname=urgent", "state=up")


def test_ranks_in_a_container_and_gpus_asked_for_by_task(cluster, tmp_path):
    """A stand-in for apptainer notes what it is asked and runs it; every rank sees the GPUs of its node."""
    apptainer = tmp_path / "apptainer"
    apptainer.write_text(f'#!/bin/bash\necho "$CUDA_VISIBLE_DEVICES $*" >>{tmp_path}/asked\nexec "${{@:8}}"\n')
    apptainer.chmod(0o755)
    chain = Chain(cluster, tmp_path / "run", NODES="1", GPUS_PER_NODE="2", GPU_REQUEST="gpus-per-task",
                  CONTAINER="image.sif", CONTAINER_RUNTIME=str(apptainer))  # fmt: skip
    jobs = chain.submit("teacher.epochs=1")
    assert chain.until_ended(jobs["teacher"]) == "COMPLETED", chain.logs()
    cluster.out("scancel", *jobs.values())
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) >= 2 and all(line.startswith("0,1 exec --nv --bind ") for line in asked)
    assert all(f" --pwd {ROOT} image.sif python {chain.out}/slurm/1/code/trainer/run.py " in line for line in asked)
