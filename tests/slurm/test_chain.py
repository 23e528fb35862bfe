"""Chains on a real cluster against --phase all left in peace: disturbed as a queue disturbs, and edited under way."""

import pytest

from tests.slurm.chain import RECIPE, ROOT, Chain, same_weights
from trainer.chain import frozen


@pytest.fixture(scope="module")
def chain(cluster, warm_ranks, tmp_path_factory):
    # on a busy machine Slurm may kill a step once more, and that is a crash to the body
    return Chain(cluster, tmp_path_factory.mktemp("chain") / "run", MAX_IDLE_REQUEUES="5", **warm_ranks)


def test_disturbed_chain_ends_like_an_undisturbed_one(cluster, reference, chain):
    jobs = chain.submit_by_driver()
    assert list(jobs) == ["teacher", "meta", "distill", "train", "evaluate"]
    again = chain.command("submit")
    assert again.returncode == 2 and "still live" in again.stderr

    _warn_meta(cluster, chain, jobs["meta"])
    _preempt_distill_1(cluster, chain)
    _kill_and_scancel_distill_2(cluster, chain, jobs["distill"])

    # what depends on the cancelled element never starts, and status says why
    assert chain.until_ended(jobs["train"]) == chain.until_ended(jobs["evaluate"]) == "CANCELLED"
    status = chain.command("status")
    assert status.returncode == 1
    line = next(line for line in status.stdout.splitlines() if line.startswith("distill_2"))
    assert "CANCELLED" in line and "ended by a person" in line
    assert "a stage it needs did not end well" in next(x for x in status.stdout.splitlines() if x.startswith("train"))

    # submitting again runs the missing element and what depends on it
    kept = {name: (chain.out / name / "result.json").stat().st_mtime_ns for name in ("meta", "distill_0", "distill_1")}
    jobs = chain.submit()
    assert [(row[1], row[2]) for row in chain.rows()[5:]] == [("distill", "2"), ("train", "-"), ("evaluate", "-")]
    assert [row[4] for row in chain.rows()[5:]] == ["-", jobs["distill"], jobs["train"]]

    jobs = _cancel_in_train_and_submit_again(chain, jobs)
    _lose_a_node_in_train(cluster, chain, jobs["train"])
    assert chain.until_ended(jobs["evaluate"]) == "COMPLETED"
    assert kept == {name: (chain.out / name / "result.json").stat().st_mtime_ns for name in kept}
    same_weights(chain.out, reference)

    status = chain.command("status")
    assert status.returncode == 0 and status.stdout.count(" done ") == 7
    nothing = chain.command("submit")
    assert nothing.returncode == 0 and "every stage is complete" in nothing.stdout and len(chain.rows()) == 10


def _warn_meta(cluster, chain, job):
    with chain.slowly():
        chain.until_training("meta", 20)
        assert "epoch" in chain.command("status").stdout
        cluster.out("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@... sends before the time limit
        chain.until_requeued("meta")
    assert chain.events("meta")[-1].startswith("requeued interrupted after a save; saved step: ")
    saved = int(chain.events("meta")[-1].split()[-1])
    chain.until(lambda: chain.resumed("meta") == [saved], "meta to go on where it was")
    assert 20 <= saved < 100
    assert chain.state(job) == "RUNNING"


def _preempt_distill_1(cluster, chain):
    with chain.slowly():
        chain.until_training("distill_1", 20)
        urgent = cluster.out("sbatch", "--parsable", "-p", "urgent", "-N2", "--gres=gpu:2", "-o", "/dev/null", "--wrap",
                             "sleep 1").strip()  # fmt: skip
        chain.until_requeued("distill_1")
    assert chain.until_ended(urgent) == "COMPLETED"


def _kill_and_scancel_distill_2(cluster, chain, array):
    with chain.slowly():
        chain.until_training("distill_2", 20)
        cluster.out("kill", "-KILL", chain.ranks("--module 2")[-1])
        chain.until_requeued("distill_2")
        assert ": killed by signal 9, SIGKILL (also out of memory)" in chain.events("distill_2")[-1]
        (chain.out / "distill_2/metrics.jsonl").unlink()  # so that the second start is seen to train
        chain.until_training("distill_2", 20)
        cluster.out("scancel", f"{array}_2")
    assert chain.until_ended(f"{array}_2") == "CANCELLED"
    assert chain.events("distill_2")[-1].startswith("cancelled ended by a person")
    # the others are untouched: the preempted one went on where it was
    assert [chain.until_ended(f"{array}_{i}") for i in (0, 1)] == ["COMPLETED", "COMPLETED"]
    saved = next(int(e.split()[-1]) for e in chain.events("distill_1") if e.startswith("requeued interrupted"))
    assert 20 <= saved < 100 and chain.resumed("distill_1") == [saved]


def _cancel_in_train_and_submit_again(chain, jobs):
    with chain.slowly():
        chain.until_training("train", 40)
        done = chain.command("cancel")
    assert done.returncode == 0 and chain.alive() == [], done.stdout
    assert chain.state(jobs["train"]) == chain.state(jobs["evaluate"]) == "CANCELLED"
    assert chain.events("train")[-1].startswith("cancelled ended by a person")
    again = chain.submit()
    assert list(again) == ["train", "evaluate"]
    return again


def _lose_a_node_in_train(cluster, chain, job):
    with chain.slowly():
        chain.until_training("train", 120)  # one checkpoint later
        cluster.out("scontrol", "update", "nodename=node2", "state=down", "reason=test")
        chain.until(lambda: chain.state(job) != "RUNNING", "the job to leave the lost node")
    cluster.out("scontrol", "update", "nodename=node2", "state=resume")
    assert chain.until_ended(job) == "COMPLETED"
    saved = [int(e.split()[-1]) for e in chain.events("train") if e.startswith("started") and e[-1].isdigit()]
    assert len(saved) == 2 and saved[1] >= 100
    assert chain.resumed("train") == saved  # nothing trained twice beyond the last save


def test_what_waits_in_the_queue_runs_the_code_it_was_submitted_with(cluster, reference, tmp_path):
    frozen.freeze(ROOT, tmp_path)
    checkout = (tmp_path / "code").rename(tmp_path / "checkout")
    chain = Chain(cluster, tmp_path / "run", root=checkout, RECIPE=str(ROOT / RECIPE), SBATCH_ARGS="--hold")
    jobs = chain.submit()
    for name in ("trainer/__init__.py", "models/__init__.py", "slurm/common.sh"):
        (checkout / name).write_text("raise RuntimeError('edited while the queue waits')\n")
    cluster.out("scontrol", "release", jobs["teacher"])
    assert chain.until_ended(jobs["teacher"]) == "COMPLETED"
    cluster.out("scancel", *jobs.values())
    weights = "teacher/model.safetensors"
    assert (chain.out / weights).read_bytes() == (reference / weights).read_bytes()
