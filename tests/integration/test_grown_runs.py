"""A teacher grown inside the meta model, and the other ways to a meta model, on two ranks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from models.teacher.load import load_teacher
from tests.integration.test_resume import saved
from tests.launch import ROOT, TINY
from trainer.tracking.metrics import read_metrics

CPU = str(ROOT / "ds_configs/cpu_debug.json")
GROWN = ["--ds_config", CPU, "--recipe", str(ROOT / "tests/fixtures/tiny_grown.yaml"), "train.baselines=[]"]
DEEPER = "meta.blocks_per_module=2"  # as deep as the teacher's modules


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def grown(warm, tmp_path_factory):
    """OUT of a grown chain on two ranks, in one go."""
    out = tmp_path_factory.mktemp("grown") / "out"
    finished = warm.run([*GROWN, "--phase", "all", "--out", out, DEEPER], ranks=2)
    assert finished.code == 0, finished.output
    return out


def test_a_grown_teacher_is_an_ordinary_one(grown):
    model = load_teacher(str(grown / "assemble")).model
    weights = load_file(grown / "incubate_1/model.safetensors")
    assert {"blocks.2.attn.qkv.weight", "blocks.3.mlp.fc2.bias", "norm.weight", "head.weight"} <= set(weights)
    # fine-tuning moves the incubated weights; a fresh start would be elsewhere
    difference = (model.blocks[3].mlp.fc1.weight - weights["blocks.3.mlp.fc1.weight"]).norm()
    assert 0 < difference < 0.5 * weights["blocks.3.mlp.fc1.weight"].norm()
    metrics = result(grown / "assemble")["metrics"]
    assert metrics["teacher_accuracy"] == metrics["accuracy"] and 0 <= metrics["start_accuracy"] <= 1
    taught = result(grown / "distill_1")
    assert taught["metrics"]["teacher_hybrid_accuracy"] == metrics["hybrid_accuracy/1"]
    assert taught["teacher"]["sha256"] == result(grown / "assemble")["teacher"]["sha256"]
    assert result(grown / "incubate_0")["metrics"]["hybrid_accuracy"] >= 0
    assert not (grown / "teacher").exists() and (grown / "report.html").is_file()


def test_incubation_resumes_and_modules_are_independent(warm, grown, tmp_path):
    """Killed in the middle of module 1, which alone is there: the same weights as in one go."""
    out = tmp_path / "out"
    shutil.copytree(grown / "meta", out / "meta")
    command = [*GROWN, "--phase", "incubate", "--module", 1, "--out", out, DEEPER]
    warm.run(command, ranks=2, kill_when=lambda: saved(out / "incubate_1"))
    assert not (out / "incubate_1/result.json").exists()
    finished = warm.run(command, ranks=2)
    assert finished.code == 0 and "resumed after step" in finished.output, finished.output
    weights, expected = (load_file(folder / "incubate_1/model.safetensors") for folder in (out, grown))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_grown_pair_serves_another_run(warm, grown, tmp_path):
    words = [f"teacher.source={grown / 'assemble'}", f"meta.source={grown}", DEEPER]
    finished = warm.run([*TINY, "--phase", "meta", "--out", tmp_path / "out", *words])
    assert finished.code == 0, finished.output
    taken = result(tmp_path / "out/meta")
    measured = result(grown / "assemble")["metrics"]
    assert taken["metrics"]["hybrid_accuracy/0"] == measured["hybrid_accuracy/0"]


def test_theseus_under_zero_2(warm, chain, tmp_path):
    """Stages that do not run in a step have no gradient there, on all ranks alike; a kill changes no draw."""
    out = tmp_path / "out"
    shutil.copytree(chain[0] / "teacher", out / "teacher")
    words = ["meta.objective=theseus", "ds.zero_optimization.stage=2", "meta.replace_rate=0.2"]
    command = [*TINY, "--phase", "meta", "--out", out, *words]
    finished = warm.run(command, ranks=2)
    assert finished.code == 0, finished.output
    weights, rows = load_file(out / "meta/model.safetensors"), read_metrics(out / "meta/metrics.jsonl")
    assert all(value.isfinite().all() for value in weights.values())
    assert [row["step"] for row in rows if row["kind"] == "train"] == [4, 6, 8, 12]

    shutil.rmtree(out / "meta")
    warm.run(command, ranks=2, kill_when=lambda: saved(out / "meta"))
    assert not (out / "meta/result.json").exists()
    finished = warm.run(command, ranks=2)
    assert finished.code == 0 and "[meta] resumed after step" in finished.output, finished.output
    again = load_file(out / "meta/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_the_teacher_as_its_own_meta_model(warm, chain, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(chain[0] / "teacher", out / "teacher")
    command = [*TINY, "--out", out, "meta.blocks_per_module=0", "--phase"]
    for phase in (["meta"], ["distill", "--module", 1]):
        finished = warm.run([*command, *phase], ranks=2)
        assert finished.code == 0, finished.output
    made = result(out / "meta")
    accuracy = result(out / "teacher")["metrics"]["accuracy"]
    assert {made["metrics"][name] for name in ("accuracy", "hybrid_accuracy/0", "hybrid_accuracy/1")} == {accuracy}
    assert (made["flops"], made["epochs"], made["steps"]) == (0, 0, 0)
    weights, teacher = load_file(out / "meta/model.safetensors"), load_teacher(str(out / "teacher")).model
    assert torch.equal(weights["stages.1.blocks.3.attn.qkv.weight"], teacher.blocks[3].attn.qkv.weight)
