"""status, logs, wait and the hook on a real cluster; the ranks are stand-ins, so that a chain takes seconds."""

import json
import sys
import threading

import pytest

from tests.slurm.chain import ARTIFACTS, Chain

# Stands for python on the nodes: three lines of progress and a result. Its first start of meta is interrupted.
RANK = """#!{python}
import json, os, pathlib, sys, time
words = dict(zip(sys.argv, sys.argv[1:]))
if "--phase" in words:
    module = words.get("--module")
    name = words["--phase"] + (f"_{{module}}" if module else "")
    folder = pathlib.Path(words["--out"], name)
    folder.mkdir(exist_ok=True)
    rank = os.environ["SLURM_PROCID"]
    for step in (1, 2, 3):
        print(f"[{{name}}] epoch 1/1 step {{step}}/3 loss 1.0 lr 1e-3 90 img/s eta 0:00:0{{3 - step}}", flush=True)
        time.sleep(0.3)
    first = folder / f"interrupted-{{rank}}"
    if name == "meta" and not first.exists():
        first.touch()
        sys.exit(75)
    if rank == "0":
        number = int(module) if module else None
        result = {{"phase": words["--phase"], "module": number, "files": {{}}, "metrics": {{}}}}
        (folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def chain(cluster, tmp_path):
    """A chain whose ranks are RANK on the nodes and whose driver is this python."""
    stub = tmp_path / "rank"
    stub.write_text(RANK.format(python=sys.executable))
    stub.chmod(0o755)
    env_file = tmp_path / "env.sh"
    env_file.write_text(f"[[ -z ${{STAGE:-}} ]] || PYTHON={stub}\n")
    made = Chain(cluster, tmp_path / "run", ENV_FILE=str(env_file), ARRAY_THROTTLE="0")
    yield made
    if (tmp_path / "run/jobs.tsv").exists():
        made.command("cancel")


def test_a_chain_is_followed_to_its_end(chain, tmp_path):
    hook = f'echo "$1 $2" >>{tmp_path}/told'
    jobs = chain.submit("--hook", hook)
    ended = {}

    def follow(*words):
        ended[words[0]] = chain.command(*words, "--every", "1")

    threads = [threading.Thread(target=follow, args=words) for words in (("wait",), ("logs", "meta", "-f"))]
    for thread in threads:
        thread.start()
    assert chain.until_ended(jobs["evaluate"]) == "COMPLETED"
    for thread in threads:
        thread.join(60)

    assert ended["wait"].returncode == 0, ended["wait"].stdout + ended["wait"].stderr
    assert {f"{name}: done" for name in (*ARTIFACTS, "evaluate")} <= {
        line.split(" ", 1)[1] for line in ended["wait"].stdout.splitlines()
    }
    shown = ended["logs"].stdout
    assert ended["logs"].returncode == 0 and shown.count("[meta] epoch 1/1 step 3/3") == 2, shown  # both starts
    told = (tmp_path / "told").read_text().splitlines()
    assert told[:3] == ["teacher done", "meta requeued", "meta done"] and sorted(told[3:]) == sorted(
        f"{name} done" for name in ("distill_0", "distill_1", "distill_2", "train", "evaluate")
    )
    state = json.loads(chain.command("status", "--json").stdout)
    assert (state["state"], state["settled"], state["slurm_answers"]) == ("done", True, True)
    meta = next(each for each in state["results"] if each["result"] == "meta")
    # two ranks for at least a second at each start, and not for the two minutes in between
    assert meta["starts"] == 2 and 2 * 2 / 3600 <= meta["gpu_hours"]["spent"] < 2 * 60 / 3600


def test_what_will_never_start_and_who_does_not_answer(cluster, chain):
    jobs = chain.submit("--sbatch-args=--hold")

    def line(result):
        return next(line for line in chain.command("status").stdout.splitlines() if line.startswith(result))

    assert "will never start: JobHeldUser; somebody holds it" in line("teacher")
    cluster.out("scontrol", "update", "partitionname=batch", "state=down")
    try:
        cluster.out("scontrol", "release", *jobs.values())
        chain.until(lambda: "PartitionDown" in line("teacher"), "the scheduler to look at it")
        assert chain.command("status").returncode == 4
        assert "NEVER" in line("teacher") and "will never start: PartitionDown; sinfo -s" in line("teacher")
        assert "waits: Dependency" in line("train")
    finally:
        cluster.out("scontrol", "update", "partitionname=batch", "state=up")
    cluster.stop_controller()
    try:
        silent = chain.command("status", "--json")
        state = json.loads(silent.stdout)
        assert silent.returncode == 3 and "Unable to contact slurm controller" in state["no_answer"]
        assert "Slurm gives no answer" in state["results"][-1]["detail"]
    finally:
        cluster.start_controller()
    chain.command("cancel")
    cancelled = chain.command("status")
    assert cancelled.returncode == 1 and "gives no answer" not in cancelled.stdout
