"""Who ends a job, on the real cluster, with stages that only pretend to train (light_python).

test_chain.py and test_long.py cancel chains that train.
"""

import json
import time

import pytest

from tests.slurm.chain import ARTIFACTS, LIGHT, Chain, light_weights


@pytest.fixture
def chain(cluster, tmp_path):
    made = Chain(cluster, tmp_path / "run", **LIGHT)
    yield made
    made.command("cancel")


def assert_every_step_once(chain: Chain) -> None:
    for name in ARTIFACTS:
        assert (chain.out / name / "model.safetensors").read_text() == light_weights(name), name


def test_what_is_cancelled_stays_ended_and_loses_nothing(cluster, chain, tmp_path):
    """By `cancel` in the node check and in training, by scancel of a job and of an element, and by a person's TERM."""
    slow = tmp_path / "bin/nvidia-smi"  # so that the check of the nodes can be met
    slow.parent.mkdir()
    slow.write_text("#!/bin/bash\nsleep 2\nexit 1\n")
    slow.chmod(0o755)
    path = chain.settings["PATH"]
    chain.settings["PATH"] = f"{slow.parent}:{path}"
    chain.submit()
    chain.until(lambda: any(chain.out.glob("slurm/nodes-*")), "the node check")
    _cancelled(chain, lambda jobs: chain.command("cancel"))
    assert not any(event.startswith("failed") for event in chain.events("teacher"))

    chain.settings["PATH"] = path
    moments = {
        "teacher": lambda jobs: chain.command("cancel"),
        "meta": lambda jobs: cluster.out("scancel", jobs["meta"]),
        "distill_1": lambda jobs: cluster.out("scancel", f"{jobs['distill']}_1"),
        "train": lambda jobs: cluster.out("scancel", "--batch", "--signal=TERM", jobs["train"]),
    }
    for artifact, end in moments.items():
        chain.settings["LIGHT_SECONDS"] = "0.5" if artifact == "teacher" else "0.1"  # `cancel` takes a moment to start
        jobs = chain.submit()
        chain.until_training(artifact, 12)
        _cancelled(chain, end, jobs)
        assert "cancelled ended by a person" in " ".join(chain.events(artifact))
    jobs = chain.submit()
    assert chain.until_ended(jobs["evaluate"]) == "COMPLETED"
    assert_every_step_once(chain)
    assert min(chain.resumed("train")) >= 12


def _cancelled(chain: Chain, end, jobs=None) -> None:
    begun = time.monotonic()
    end(jobs)
    chain.until(lambda: not chain.alive(), "everything to end", timeout=60)
    assert time.monotonic() - begun < 60
    time.sleep(2)
    assert chain.alive() == []


def test_where_slurm_does_not_start_a_job_again_another_takes_its_place(cluster, chain):
    """Jobs without --requeue, and PreemptMode=CANCEL: for a plain job and an element, and what waits, waits for it."""
    chain.settings["SBATCH_ARGS"] = "--no-requeue"
    jobs = chain.submit()
    chain.until_training("meta", 12)
    cluster.out("scancel", "--batch", "--signal=USR1", jobs["meta"])
    chain.until(lambda: len(chain.rows()) == 6, "the successor of meta")
    chain.until_training("distill_1", 12)
    cluster.out("scontrol", "update", "partitionname=batch", "preemptmode=cancel", "gracetime=0")
    try:
        urgent = cluster.out("sbatch", "--parsable", "-p", "urgent", "-N2", "--gres=gpu:2", "-o", "/dev/null", "--wrap",
                             "sleep 1").strip()  # fmt: skip
        chain.until_ended(urgent)
    finally:
        cluster.out("scontrol", "update", "partitionname=batch", "preemptmode=requeue", "gracetime=60")
    assert [row[1:3] for row in chain.rows()[5:]] == [["meta", "-"], ["distill", "1"]]
    assert chain.until_ended(jobs["evaluate"]) == "COMPLETED"
    assert_every_step_once(chain)
    assert chain.resumed("meta") and chain.resumed("meta")[0] >= 12


def test_a_job_of_two_elements_goes_on_with_the_one_it_was_warned_in(cluster, chain):
    """Three modules in two jobs; the first job is warned in its second element, and makes it whole when it is back."""
    for name in ("teacher", "meta"):
        (chain.out / name).mkdir(parents=True)
        result = {"phase": name, "module": None, "files": {}, "metrics": {"accuracy": 0.5}}
        (chain.out / name / "result.json").write_text(json.dumps(result))
    chain.settings |= {"ELEMENTS_PER_JOB": "1,distill=2", "ARRAY_THROTTLE": "0", "LIGHT_SECONDS": "0.05"}
    jobs = chain.submit()
    assert chain.rows()[0][1:3] == ["distill", "0,1,2"]
    chain.until_training("distill_1", 12)
    cluster.out("scancel", "--batch", "--signal=USR1", f"{jobs['distill']}_0")
    states = [chain.until_ended(f"{jobs['distill']}_{task}") for task in (0, 1)]
    assert states == ["COMPLETED", "COMPLETED"]
    for name, kinds in (("distill_0", "started done"), ("distill_1", "started warned requeued started done")):
        assert [event.split()[0] for event in chain.events(name)] == kinds.split()
        assert (chain.out / name / "model.safetensors").read_text() == light_weights(name)
    assert (chain.out / "distill_2/model.safetensors").read_text() == light_weights("distill_2")
    assert not any(line.startswith(f"{jobs['distill']}|") for line in chain.alive())
    assert chain.ranks("--phase distill") == []  # what waited for them may train by now


@pytest.mark.slow
def test_a_bad_node_is_left_out(cluster, chain, tmp_path):
    """One job of one node: node1 shows no GPU, so it goes to node2."""
    broken = tmp_path / "bin/nvidia-smi"
    broken.parent.mkdir()
    broken.write_text("#!/bin/bash\n[[ $(hostname) == node1 ]] || echo GPU\n")
    broken.chmod(0o755)
    chain.settings |= {"PATH": f"{broken.parent}:{chain.settings['PATH']}", "NODES": "1", "OVERRIDES": ""}
    jobs = chain.submit()
    assert chain.until_ended(jobs["teacher"]) == "COMPLETED"
    assert "node check: node1: 0 GPUs seen, 1 expected; starting again without node1" in chain.events("teacher")[1]
