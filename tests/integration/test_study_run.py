"""The command of a study as users type it, tiny: two variants that share their teacher; a tuned one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, TINY_RECIPE, environment
from trainer.config.load import load_recipe

STUDY = f"""
base: {TINY_RECIPE}
ds_config: {ROOT}/ds_configs/cpu_debug.json
seeds: [3]
overrides: {{run.trackers: [], teacher.warmup_epochs: 0}}
variants:
  scratch: {{overrides: {{train.start: scratch}}}}
  m2mkd: {{reference: scratch, overrides: {{refine: {{epochs: 1, order: together, global_batch: 16}}}}}}
"""


def study(folder: Path, text: str) -> dict:
    """Run a study of one epoch a phase; what is in its study.json."""
    path = folder / "study_x.yaml"
    path.write_text(text)
    words = [f"{section}.epochs=1" for section in ("teacher", "meta", "distill", "train")]
    command = [sys.executable, "-m", "trainer.study", path, "--out", folder / "out", "--jobs", "2", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "out/study.json").read_text())


def test_a_real_study_on_digits(tmp_path):
    numbers = study(tmp_path, STUDY)
    assert (tmp_path / "out/scratch/seed3/teacher/config.yaml").samefile(
        tmp_path / "out/m2mkd/seed3/teacher/config.yaml"
    )
    assert numbers["missing"] == []
    cost = {name: variant["figures"]["total_flops"]["mean"] for name, variant in numbers["variants"].items()}
    spent = [json.loads(path.read_text())["flops"] for path in (tmp_path / "out/m2mkd").glob("*/*/result.json")
             if path.parent.name != "teacher"]  # fmt: skip
    assert len(spent) == 6 and cost["m2mkd"] == pytest.approx(sum(spent))
    assert cost["scratch"] < cost["m2mkd"]
    assert numbers["comparisons"][0]["final"]["n"] == 1


TUNED = f"""
base: {TINY_RECIPE}
ds_config: {ROOT}/ds_configs/cpu_debug.json
seeds: [3]
overrides: {{run.trackers: [], teacher.warmup_epochs: 0, train.start: scratch}}
tune: {{train.lr: [1.0e-3, 1.0e-2]}}
variants: {{scratch: {{}}}}
"""


@pytest.mark.slow
def test_a_real_choice_is_made_on_held_out_images(tmp_path):
    numbers = study(tmp_path, TUNED)
    assert numbers["missing"] == []
    tuning = numbers["tuning"]["scratch"]
    assert tuning["chosen"] in (["train.lr=0.001"], ["train.lr=0.01"]) and tuning["flops"] > 0
    trial = tmp_path / "out/tuning/scratch/train.lr=0.01/seed3"
    assert json.loads((trial / "train_scratch/result.json").read_text())["held_out"] == 0.2
    recipe = load_recipe(tmp_path / "out/scratch/seed3/recipe.yaml")
    assert [f"train.lr={recipe.train.lr}"] == tuning["chosen"] and recipe.data.val_share is None
