"""What goes wrong around a chain on a real cluster: each ends in one clear line, and nothing is left half-done."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.chain import ROOT, Chain

RENDEZVOUS = """
import os, socket, sys, time
host, port = sys.argv[1], 23456
if os.environ["SLURM_PROCID"] == "0":
    server = socket.create_server(("", port))
    server.settimeout(8)
    server.accept()
else:
    for _ in range(20):
        try:
            socket.create_connection((host, port), 1).close()
            sys.exit(0)
        except OSError:
            time.sleep(0.2)
    sys.exit(9)
"""


@pytest.fixture
def chain(cluster, tmp_path):
    made = Chain(cluster, tmp_path / "run")
    yield made
    if (tmp_path / "run/jobs.tsv").exists():
        made.command("cancel")


def teacher_done(chain: Chain) -> None:
    """A finished teacher, as far as the chain looks at it."""
    folder = chain.out / "teacher"
    folder.mkdir(parents=True)
    result = {"phase": "teacher", "module": None, "files": {}, "metrics": {"accuracy": 0.5}}
    (folder / "result.json").write_text(json.dumps(result))


def test_the_cluster_tells_localhost_from_the_first_node(cluster, tmp_path):
    """Each node has a network of its own: a rendezvous on localhost fails here as it would on a real cluster."""
    script = tmp_path / "rendezvous.py"
    script.write_text(RENDEZVOUS)
    ends = [
        cluster.run("srun", "-N2", "--ntasks-per-node=1", "python3", str(script), host).returncode
        for host in ("node1", "localhost")
    ]
    assert ends[0] == 0 and ends[1] == 9


def test_failed_stage_cancels_what_depends_on_it_and_a_repair_goes_on(chain, tmp_path):
    env_file = tmp_path / "env.sh"
    env_file.write_text('[[ $STAGE != meta ]] || { echo "module load: no such module" >&2; return 1; }\n')
    chain.settings["ENV_FILE"] = str(env_file)
    teacher_done(chain)
    jobs = chain.submit()
    assert "teacher" not in jobs and chain.rows()[0][4] == "-"  # the finished stage drops out of the dependencies
    assert chain.until_ended(jobs["meta"]) == "FAILED"
    assert {chain.until_ended(jobs[name]) for name in ("distill", "train", "evaluate")} == {"CANCELLED"}
    status = chain.command("status")
    meta = next(line for line in status.stdout.splitlines() if line.startswith("meta"))
    assert status.returncode == 1 and "FAILED" in meta and "no environment: see ENV_FILE" in meta

    env_file.write_text("")
    again = chain.submit()
    assert list(again) == ["meta", "distill", "train", "evaluate"]
    refused = chain.command("submit")
    assert refused.returncode == 2 and "still live" in refused.stderr
    cancelled = chain.command("cancel")
    assert cancelled.returncode == 0 and again["meta"] in cancelled.stdout
    assert {chain.until_ended(job) for job in again.values()} == {"CANCELLED"}


def test_unknown_partition(chain):
    done = chain.command("submit", "--partition", "gold")
    assert done.returncode == 3 and done.stdout == ""
    assert "sbatch failed: " in done.stderr and "invalid partition" in done.stderr and "sinfo -s" in done.stderr
    assert chain.rows() == []


def test_a_limit_of_the_partition_is_met_before_anything_is_submitted(chain):
    teacher_done(chain)
    done = chain.command("submit", "--time", "00:20:00,evaluate=2-00:00:00")  # the partition's limit is one day
    assert done.returncode == 2 and chain.rows() == []
    assert "evaluate: time is 2-00:00:00, and partition batch allows 1-00:00:00" in done.stderr


def test_no_sbatch_on_path(chain, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "readlink", "hostname", "git"):
        (programs / name).symlink_to(shutil.which(name))
    python = Path(shutil.which("python", path=chain.settings["PATH"]))
    (programs / "python").write_text(f'#!/bin/bash\nexec {python} "$@"\n')
    (programs / "python").chmod(0o755)
    done = chain.command("submit", PATH=str(programs))
    assert done.returncode == 3
    assert done.stderr == "error: sbatch is not on PATH: run this on a login node of a Slurm cluster\n"


def test_controller_down(cluster, chain):
    cluster.stop_controller()
    try:
        done = chain.command("submit")
        assert done.returncode == 3 and "Unable to contact slurm controller" in done.stderr
        assert done.stderr.count("\n") == 1 and chain.rows() == []
    finally:
        cluster.start_controller()


def test_started_elsewhere_than_in_the_repository(cluster, tmp_path):
    log = tmp_path / "driver.log"
    done = cluster.run("sbatch", "--wait", "-o", str(log), str(ROOT / "slurm/m2mkd_vmoe.sh"), cwd=tmp_path)
    assert done.returncode == 2
    assert "start this from the top folder of the repository" in log.read_text()


def test_plan_asks_the_scheduler_and_submits_nothing(chain):
    done = chain.command("plan")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        done.stdout.count("to start at") == 5 and "ok       distill_2: 100 steps of 16 images on 2 ranks" in done.stdout
    )
    assert not chain.out.exists()


def test_shell_files_parse():
    for path in (ROOT / "slurm").iterdir():
        subprocess.run(["bash", "-n", path], check=True)
