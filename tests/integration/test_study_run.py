"""The command of a study as users type it, tiny: two variants that share their teacher."""

import json
import subprocess
import sys

import pytest

from tests.launch import ROOT, TINY_RECIPE, environment

STUDY = f"""
base: {TINY_RECIPE}
ds_config: {ROOT}/ds_configs/cpu_debug.json
seeds: [3]
overrides: {{run.trackers: [], teacher.warmup_epochs: 0}}
variants:
  scratch: {{overrides: {{train.start: scratch}}}}
  m2mkd: {{reference: scratch, overrides: {{refine: {{epochs: 1, order: together, global_batch: 16}}}}}}
"""


def test_a_real_study_on_digits(tmp_path):
    path = tmp_path / "study_x.yaml"
    path.write_text(STUDY)
    words = [f"{section}.epochs=1" for section in ("teacher", "meta", "distill", "train")]
    command = [sys.executable, "-m", "trainer.study", path, "--out", tmp_path / "out", "--jobs", "2", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out/scratch/seed3/teacher/config.yaml").samefile(
        tmp_path / "out/m2mkd/seed3/teacher/config.yaml"
    )
    numbers = json.loads((tmp_path / "out/study.json").read_text())
    assert numbers["missing"] == []
    cost = {name: variant["figures"]["total_flops"]["mean"] for name, variant in numbers["variants"].items()}
    spent = [json.loads(path.read_text())["flops"] for path in (tmp_path / "out/m2mkd").glob("*/*/result.json")
             if path.parent.name != "teacher"]  # fmt: skip
    assert len(spent) == 6 and cost["m2mkd"] == pytest.approx(sum(spent))
    assert cost["scratch"] < cost["m2mkd"]
    assert numbers["comparisons"][0]["final"]["n"] == 1
