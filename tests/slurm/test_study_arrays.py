"""A study as jobs on the real cluster, with cells that only pretend to train (light_study)."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.slurm.chain import RECIPE, ROOT, Chain

STUDY = """
base: {base}
ds_config: {ds_config}
seeds: [0]
share_teacher: true
overrides: {{modules: 2}}
variants:
  scratch:
    overrides: {{train.start: scratch}}
    tune: {{train.lr: [0.1, 0.2]}}
  m2mkd: {{reference: scratch}}
  keep: {{reference: m2mkd, overrides: {{train.stitches: keep}}}}
"""
STEPS = 12


class Jobs(Chain):
    """A study in place of a chain: `out` is the run folder of its jobs, OUT/jobs."""

    def __init__(self, cluster, folder: Path, text: str = STUDY):
        self.study = folder / "study_x.yaml"
        self.study.write_text(text.format(base=ROOT / RECIPE, ds_config=ROOT / "ds_configs/cpu_debug.json"))
        light = {"PYTHON": str(ROOT / "tests/slurm/light_study"), "LIGHT_STEPS": str(STEPS), "LIGHT_SECONDS": "0.05"}
        super().__init__(cluster, folder / "out/jobs", NODES="1", GPUS_PER_NODE="0", TASKS_PER_NODE="1", OVERRIDES="",
                         ARRAY_THROTTLE="0", LIGHT_MADE=str(folder / "made"), **light)  # fmt: skip
        self.settings |= {"OUT": str(folder / "out")}
        del self.settings["DS_CONFIG"]
        self.made = folder / "made"

    def command(self, *arguments: str, **settings: str):
        """bash slurm/study.sh STUDY ARGUMENTS on the login node."""
        words = ("bash", "slurm/study.sh", str(self.study), *arguments)
        return self.cluster.run(*words, cwd=self.root, **self.settings | settings)

    def job_of(self, cell: str) -> str:
        """Newest job of a cell, as squeue shows it."""
        stages = json.loads((self.out / "slurm/1/stages.json").read_text())
        element = stages[0]["artifacts"].index(cell)
        (*_, row) = [row for row in self.rows() if row[1] == "cells" and str(element) in row[2].split(",")]
        return f"{row[3]}_{element - int(row[6])}"

    def until_step(self, cell: str, artifact: str, step: int) -> None:
        """Wait until a result of a cell has made a step."""
        metrics = self.out.parent / cell / artifact / "metrics.jsonl"
        at_it = lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= step  # noqa: E731
        self.until(at_it, f"step {step} of {cell} {artifact}")

    def settle(self) -> int:
        """Wait until nothing of it is live; returns the exit code of `status` then."""
        live = lambda: {line.split("|")[1] for line in self.alive() if "|" in line}  # noqa: E731
        self.until(lambda: not live(), "the end of the study")
        return self.command("status").returncode

    def table(self) -> dict:
        """What study.json holds."""
        return json.loads((self.out.parent / "study.json").read_text())


@pytest.fixture
def study(cluster, tmp_path):
    made = Jobs(cluster, tmp_path)
    yield made
    made.command("cancel")


def test_every_result_is_made_once_over_a_requeue_and_a_cancelled_cell(cluster, study):
    """A cell that another needs is warned, goes on and is cancelled; the others end, a choice too. Then the rest."""
    study.settings["LIGHT_HOLD"] = "m2mkd/seed0/distill_1"
    study.submit()
    study.until_step("m2mkd/seed0", "distill_1", 5)
    cluster.out("scancel", "--batch", "--signal=USR1", study.job_of("m2mkd/seed0"))
    study.until(lambda: "[distill_1] resumed after step 5" in study.logs(), "the restart")
    assert study.state(study.job_of("keep/seed0")) == "PENDING", "it waits for what it shares"
    cluster.out("scancel", study.job_of("m2mkd/seed0"))
    assert study.settle() == 1
    events = study.events("m2mkd/seed0")
    assert [line.split()[0] for line in events][:4] == ["started", "warned", "requeued", "started"]
    assert events[2].endswith("saved step: results:3,distill_1:5")
    assert events[-1].startswith("cancelled ended by a person")
    line = "m2mkd/seed0, which is not complete: see how its job ended (`status`), then submit the study again"
    assert f"keep/seed0 needs distill_1 of {line}" in study.events("keep/seed0")[-1]
    table = study.table()
    assert table["tuning"]["scratch"]["chosen"] == ["train.lr=0.1"], "and the choice was submitted by a job"
    assert table["missing"] == ["m2mkd/seed0", "keep/seed0"]
    assert (study.out.parent / "scratch/seed0/train_scratch/result.json").exists()

    del study.settings["LIGHT_HOLD"]
    before = len(study.rows())
    study.submit()
    assert [row[1] for row in study.rows()[before:]] == ["cells", "cells", "gather"]
    assert study.settle() == 0, study.logs()
    assert study.table()["missing"] == []
    assert study.command("wait").returncode == 0
    # each of them once, by one job, and every step of it once
    made = [line.split() for line in study.made.read_text().splitlines()]
    assert max(Counter(map(tuple, made)).values()) == 1
    by_cell = Counter(Path(out).relative_to(study.out.parent).parts[0] for out, _ in made)
    assert by_cell == {"teachers": 1, "tuning": 3, "m2mkd": 5, "keep": 1, "scratch": 1}
    for out, name in made:
        digest = hashlib.sha256(name.encode()).hexdigest()
        for step in range(1, STEPS + 1):
            digest = hashlib.sha256(f"{digest} {step}".encode()).hexdigest()
        assert (Path(out) / name / "model.safetensors").read_text() == digest, (out, name)
    assert "every cell is complete, nothing to submit" in study.command("submit").stdout


TRAINS = """
base: {base}
ds_config: {ds_config}
overrides: {{modules: 2, epochs: 2}}
variants:
  m2mkd: {{}}
  keep: {{reference: m2mkd, overrides: {{train.stitches: keep}}}}
"""


@pytest.mark.slow
def test_cells_that_train_have_the_weights_of_processes_without_slurm(cluster, tmp_path):
    """m2mkd is warned in its training, where jobs are not requeued: another takes its place. Then two ranks a cell."""
    study = Jobs(cluster, tmp_path, TRAINS)
    study.settings |= {"PYTHON": "python", "SBATCH_ARGS": "--no-requeue"}
    command = [sys.executable, "-m", "trainer.study", str(study.study), "--out", str(tmp_path / "plain"), "--jobs", "1"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=600)
    try:
        study.submit()
        study.until_step("m2mkd/seed0", "train", 2)
        cluster.out("scancel", "--batch", "--signal=USR1", study.job_of("m2mkd/seed0"))
        study.until(lambda: not study.alive(), "the end of the study", timeout=400)
        assert study.command("status").returncode == 0, study.logs()
        events = [event.split()[0] for event in study.events("m2mkd/seed0")]
        assert events == ["started", "warned", "requeued", "refused", "successor", "started", "done"]
        assert study.events("keep/seed0")[-1].startswith("done"), "it has waited for the successor"
        weights = sorted(
            path.relative_to(tmp_path / "plain") for path in tmp_path.glob("plain/*/*/*/model.safetensors")
        )
        assert len(weights) == 10
        for name in weights:
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name

        two = {"OUT": str(tmp_path / "two"), "TASKS_PER_NODE": "2"}
        assert study.command("submit", "--only", "keep", **two).returncode == 0
        result = tmp_path / "two/jobs/gather/result.json"
        study.until(result.exists, "the end of the study on two ranks", timeout=400)
        assert json.loads(result.read_text()) == {"missing": []}
        result = json.loads((tmp_path / "two/keep/seed0/train/result.json").read_text())
        assert result["world_size"] == 2
    finally:
        study.command("cancel")
        study.command("cancel", OUT=str(tmp_path / "two"))
