"""A job that starts while the disk of its run is full, on a cluster of its own that sees such a disk."""

import subprocess
import time

import pytest

from tests.slurm.chain import LIGHT, Chain, light_weights
from tests.slurm.cluster import Cluster


@pytest.fixture
def small_disk(cluster, tmp_path):  # cluster: skipped where there can be none
    """A mounted folder with room for 24 MB and 4000 files."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,nr_inodes=4000", "tmpfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_job_that_starts_on_a_full_disk_waits_for_room(small_disk):
    """Neither a byte nor a file more: Slurm itself could not make the log of the job."""
    one_node = Cluster(nodes=1).start()  # it sees what was mounted before
    try:
        chain = Chain(one_node, small_disk / "run", NODES="1", OVERRIDES="", SBATCH_ARGS="--hold", **LIGHT)
        jobs = chain.submit()
        log = chain.out / f"logs/teacher-{jobs['teacher']}.out"
        assert log.exists() and log.stat().st_size == 0
        fill(small_disk / "fill")
        one_node.out("scontrol", "release", jobs["teacher"])
        chain.until(lambda: chain.state(jobs["teacher"]) != "PENDING", "the start of the job")
        time.sleep(3)
        assert chain.state(jobs["teacher"]) == "RUNNING" and chain.events("teacher") == []
        for path in (small_disk / "fill").iterdir():
            path.unlink()
        assert chain.until_ended(jobs["teacher"]) == "COMPLETED"
        assert (chain.out / "teacher/model.safetensors").read_text() == light_weights("teacher")
        assert log.read_text().splitlines()[-1].endswith("done exit 0")
    finally:
        one_node.stop()


def fill(folder) -> None:
    """Take all bytes and all files of a disk."""
    folder.mkdir()
    with pytest.raises(OSError), (folder / "bytes").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with pytest.raises(OSError):
        for number in range(10_000):
            (folder / str(number)).touch()
