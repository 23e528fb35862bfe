"""inspect, export and import by the trainer's entry: no recipe, one line when it cannot be done."""

import shutil

import pytest

from models.vmoe.model import VMoE
from tests.launch import ROOT


def test_inspect_and_export(warm, chain, tmp_path):
    out = shutil.copytree(chain[0], tmp_path / "a=b")  # no override, whatever is in it
    finished = warm.run(["inspect", out])
    assert finished.code == 0 and "checkpoint, whole" in finished.output, finished.output
    finished = warm.run(["export", out / "train", "--out", tmp_path / "student"], ranks=2)
    assert finished.code == 0 and "model.safetensors" in finished.output, finished.output
    assert VMoE.from_pretrained(tmp_path / "student").config.num_classes == 10

    weights = out / "train/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    finished = warm.run(["inspect", out])
    errors = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert finished.code == 2 and len(errors) == 1 and str(weights) in errors[0], finished.output
    assert "checkpoint, whole" in finished.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "nowhere"], "nothing to inspect at"),
        (["export", "nowhere", "--out", "x"], "no checkpoint at"),
        (["import", "nowhere", "--layout", "google", "--out", "x"], "layout 'google' is not known"),
        (["import", ROOT / "README.md", "--layout", "google_vmoe", "--out", "x", "heads=3"], "README.md"),
    ],
)
def test_what_cannot_be_done_is_one_line(warm, tmp_path, arguments, said):
    arguments = [tmp_path / a if a in ("nowhere", "x") else a for a in arguments]
    finished = warm.run(arguments)
    errors = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert finished.code == 2 and "Traceback" not in finished.output, finished.output
    assert len(errors) == 1 and said in errors[0], finished.output
    assert not list(tmp_path.iterdir())
