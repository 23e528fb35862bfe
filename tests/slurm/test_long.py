"""The long form, by `make slurm-test`: a quarter of an hour and more on two cores."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hub_server import environment
from tests.slurm.chain import ARTIFACTS, ROOT, Chain, same_weights

pytestmark = pytest.mark.slow


@pytest.fixture
def chain(cluster, warm_ranks, tmp_path):
    made = Chain(cluster, tmp_path / "run", MAX_IDLE_REQUEUES="100", MAX_REQUEUES="100", **warm_ranks)
    yield made
    made.command("cancel")


def test_undisturbed_chain_with_a_baseline(chain, reference):
    jobs = chain.submit("train.baselines=[scratch]")
    assert list(jobs) == ["teacher", "meta", "distill", "train", "train_scratch", "evaluate"]
    for name in ("evaluate", "train_scratch"):
        assert chain.until_ended(jobs[name], timeout=900) == "COMPLETED"
    same_weights(chain.out, reference)
    assert (chain.out / "train_scratch/result.json").is_file() and (chain.out / "report.md").is_file()


def test_ten_interruptions_at_random_times(cluster, chain, reference):
    draw = random.Random(7)
    jobs = chain.submit()
    # ten restarts more than finished stages: the others may be disturbed, too, but that one is still going
    while chain.starts() - len([a for a in ARTIFACTS if (chain.out / a / "result.json").exists()]) < 10:
        _interrupt(cluster, chain, draw.choice(["warn", "kill", "preempt", "node"]), draw)
    assert chain.state(jobs["evaluate"]) == "PENDING"
    assert chain.until_ended(jobs["evaluate"], timeout=900) == "COMPLETED"
    same_weights(chain.out, reference)
    for artifact in ARTIFACTS:
        starts = [e for e in chain.events(artifact) if e.startswith("started")]
        saved = [int(e.split()[-1]) for e in starts if not e.endswith(("none", "done"))]
        # every start went on exactly at what the one before had saved, never further back
        assert saved == sorted(saved) and set(chain.resumed(artifact)) <= set(saved)


def test_cancel_at_every_moment_ends_everything_and_loses_nothing(chain, reference, tmp_path):
    """One chain, cancelled at eight moments and submitted again each time, ends with the weights of the reference."""
    out = chain.out
    slow = tmp_path / "bin/nvidia-smi"  # so that the check of the nodes can be met
    slow.parent.mkdir()
    slow.write_text("#!/bin/bash\nsleep 4\nexit 1\n")
    slow.chmod(0o755)
    chain.settings["PATH"] = f"{slow.parent}:{chain.settings['PATH']}"
    moments = {
        "pending": lambda: True,
        "node check": lambda: any(out.glob("slurm/nodes-*")),
        "rendezvous": lambda: bool(chain.ranks("")),
        "training": lambda: chain.step("meta") >= 20,
        "saving": lambda: any(out.glob("meta/checkpoints/step_*")) and not (out / "meta/result.json").exists(),
        "between stages": lambda: (out / "meta/result.json").exists(),
        "training an element": lambda: chain.step("distill_1") >= 20,
        "evaluating": lambda: bool(chain.ranks("--phase evaluate")),
    }
    for moment, reached in moments.items():
        chain.submit()
        chain.until(reached, moment, timeout=400)
        begun = time.monotonic()
        done = chain.command("cancel")
        assert done.returncode == 0 and chain.alive() == [], f"{moment}: {done.stdout}{chain.alive()}"
        assert time.monotonic() - begun < 60, moment
        time.sleep(3)
        assert chain.alive() == [], f"{moment}: something came back"
    jobs = chain.submit()
    if (out / "evaluate/result.json").exists():  # it came to its end when it was asked to stop
        assert jobs == {}
    else:
        assert chain.until_ended(jobs["evaluate"]) == "COMPLETED"
    same_weights(out, reference)


def _interrupt(cluster, chain, kind, draw):
    """One disturbance of whatever runs, after a random time; waits until something runs again."""
    chain.until(lambda: bool(chain.ranks("")) and bool(_running(cluster)), "running ranks", timeout=300)
    time.sleep(draw.uniform(1, 10))
    job = (_running(cluster) or ["0"])[0]  # it may just have ended
    if kind == "warn":
        cluster.run("scancel", "--batch", "--signal=USR1", job)
    elif kind == "kill":
        if ranks := chain.ranks(""):
            cluster.run("kill", "-KILL", draw.choice(ranks))
    elif kind == "preempt":
        urgent = cluster.out("sbatch", "--parsable", "-p", "urgent", "-N2", "--gres=gpu:2", "-o", "/dev/null",
                             "--wrap", "sleep 1").strip()  # fmt: skip
        chain.until_ended(urgent)
    else:
        cluster.out("scontrol", "update", "nodename=node2", "state=down", "reason=test")
        time.sleep(3)
        cluster.out("scontrol", "update", "nodename=node2", "state=resume")


def _running(cluster) -> list[str]:
    return cluster.out("squeue", "-h", "--array", "-t", "R", "-p", "batch", "-o", "%i").split()


def test_hung_rank_is_found_and_the_job_goes_on(cluster, tmp_path):
    chain = Chain(cluster, tmp_path / "run")  # no warm ranks: one that is stopped stands for the rank, which trains on
    jobs = chain.submit("run.hang_seconds=25", "meta.epochs=50")  # so that it is stopped in training, not at its end
    chain.until_training("meta", 20)
    cluster.out("kill", "-STOP", chain.ranks("--phase meta")[-1])  # the other rank now waits in a collective for ever
    chain.until_requeued("meta")
    assert "nothing moved for run.hang_seconds" in " ".join(chain.events("meta"))
    assert chain.until_ended(jobs["meta"]) == "COMPLETED"


def test_time_limit_is_survived(chain):
    """The real thing: Slurm's own warning before a limit of two minutes, and three jobs' worth of training."""
    jobs = chain.submit("--time", "02:00", "--warn-seconds", "50", "meta.epochs=1500")
    chain.until_requeued("meta")
    chain.until_requeued("meta", times=2)
    saved = [int(e.split()[-1]) for e in chain.events("meta") if e.startswith("requeued interrupted by the time limit")]
    assert len(saved) == 2 and 0 < saved[0] < saved[1]
    assert chain.state(jobs["distill"] + "_0") == "PENDING"  # dependents keep waiting


def test_without_gpus_ranks_are_counted_by_node(chain, reference):
    chain.settings |= {"NODES": "1", "GPUS_PER_NODE": "0", "TASKS_PER_NODE": "2"}
    jobs = chain.submit()
    assert chain.until_ended(jobs["meta"]) == "COMPLETED"
    for artifact in ("teacher", "meta"):
        weights = f"{artifact}/model.safetensors"
        assert (chain.out / weights).read_bytes() == (reference / weights).read_bytes()


HUB = """from tests.hub_server import HubServer
hub = HubServer("10.213.0.1")  # the login node's place in the cluster's own network
print(hub.url, flush=True)
hub.server.serve_forever()"""
PULL = "from huggingface_hub import hf_hub_download as get; print(get('alice/model', 'model.safetensors'))"


def test_push_by_a_job_on_a_node_with_internet(cluster, reference, tmp_path):
    """What is trained already is checked against the hub by the download job, and pushed by one task without GPU."""
    chain = Chain(cluster, tmp_path / "run")  # no warm ranks: huggingface_hub reads HF_ENDPOINT when it is imported
    shutil.copytree(reference, chain.out)
    hub = subprocess.Popen(cluster.inside([sys.executable, "-c", HUB], ROOT), stdout=subprocess.PIPE, text=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        chain.settings |= environment(hub.stdout.readline().strip(), tmp_path / "home")
        jobs = chain.submit("hub.repo=alice/model")
        assert list(jobs) == ["download", "push"] and chain.rows()[-1][4] == jobs["download"]
        assert [chain.until_ended(job) for job in jobs.values()] == ["COMPLETED", "COMPLETED"], chain.logs()
        assert "alice/model@main, commit" in chain.command("status").stdout
        pulled = cluster.out(sys.executable, "-c", PULL, **chain.settings).strip()
        assert Path(pulled).read_bytes() == (reference / "train/model.safetensors").read_bytes()
        nothing = chain.command("submit", "hub.repo=alice/model")
        assert "every stage is complete" in nothing.stdout, nothing.stdout + nothing.stderr
    finally:
        hub.kill()
        hub.wait(30)


def test_body_that_meets_on_localhost_trains_nothing(cluster, chain):
    chain.settings["SBATCH_ARGS"] = "--hold"
    held = chain.submit()["teacher"]
    script = chain.out / "slurm/1/teacher.sbatch"
    wrong = script.read_text().replace("export MASTER_ADDR ", "MASTER_ADDR=localhost; export MASTER_ADDR ")
    assert wrong != script.read_text()
    script.write_text(wrong.replace("#SBATCH --hold\n", ""))
    cluster.out("scancel", held)
    job = chain.start(script)
    chain.until(lambda: bool(chain.ranks("--phase teacher")), "the ranks")
    time.sleep(45)  # the right one is done in half of that
    assert chain.state(job) == "RUNNING"
    assert chain.step("teacher") == 0 and not (chain.out / "teacher/result.json").exists()
    cluster.out("scancel", job)


def test_disturbed_chains_on_four_nodes():
    """Two of `python -m tests.slurm.rounds`: with modules and with experts."""
    command = [sys.executable, "-m", "tests.slurm.rounds", "--chains", "2", "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 chains, 6 disturbances" in done.stdout
