"""Tied stitches, border targets, the second round and the teacher beside the student, through the phases."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from models.vmoe.model import VMoE
from tests.launch import TINY
from trainer.report.data import hybrids, read_phases
from trainer.tracking.metrics import read_metrics

SMALLER = ["student.width=24", "student.mlp_dim=32"]  # than the teacher, or the basis would be the identity
METHOD = [*SMALLER, "distill.stitches=tied", "distill.border=mse", "refine.epochs=1", "refine.global_batch=16"]
BESIDE = ["train.kd_weight=0.5", "train.border_weight=1", "train.border_epochs=1"]


@pytest.fixture(scope="module")
def taught(warm, chain, tmp_path_factory):
    """OUT of a whole run with a sequential second round on 2 ranks, from the teacher of `chain`."""
    out = tmp_path_factory.mktemp("second_round") / "out"
    shutil.copytree(chain[0] / "teacher", out / "teacher")
    order = ["refine.order=sequential", "train.baselines=[]"]
    finished = warm.run([*TINY, "--phase", "all", "--out", out, *METHOD, *BESIDE, *order], ranks=2)
    assert finished.code == 0, finished.output
    return out


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_the_bases_are_orthonormal_and_explain_the_states(taught):
    tensors = load_file(taught / "meta/basis.safetensors")
    borders = {name.partition(".")[0] for name in tensors}
    assert len(borders) == len(list(taught.glob("distill_?"))) - 1
    for border in borders:
        directions, variance = tensors[f"{border}.directions"], tensors[f"{border}.variance"]
        assert torch.allclose(directions.T @ directions, torch.eye(len(directions)), atol=1e-4)
        assert variance[:24].sum() > 0.9 * variance.sum()
    assert "basis.safetensors" in result(taught / "meta")["files"]


def test_the_second_round_trains_all_but_the_first_module(taught):
    first = result(taught / "refine_0")
    assert first["flops"] == 0 and first["steps"] == 0
    weights = [load_file(taught / name / "model.safetensors") for name in ("distill_0", "refine_0")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    second = result(taught / "refine_1")
    assert second["steps"] > 0 and 0 < second["metrics"]["hybrid_accuracy"] <= 1
    first_round, last_module = (read_metrics(taught / name / "metrics.jsonl")[0] for name in ("distill_0", "refine_1"))
    assert "loss/border" in first_round and "loss/border" not in last_module  # whose border is its logits
    assert "loss/distill" in first_round and "loss/distill" in last_module
    assert not [name for name in load_file(taught / "refine_1/model.safetensors") if "stitch" in name or "pre." in name]


def test_assembly_and_the_teacher_end_to_end(taught):
    train = result(taught / "train")["metrics"]
    ways = {train[f"start_accuracy/{way}"] for way in ("drop", "keep", "fold")}
    assert ways == {train["start_accuracy"]}  # tied stitches cancel out
    evaluations = [row for row in read_metrics(taught / "train/metrics.jsonl") if row["kind"] == "eval"]
    assert evaluations[0]["step"] == 0 and evaluations[0]["accuracy"] == train["start_accuracy"]
    rows = [row for row in read_metrics(taught / "train/metrics.jsonl") if row["kind"] == "train"]
    assert "loss/kd" in rows[-1] and "loss/border" in rows[0] and "loss/border" not in rows[-1]
    assert VMoE.from_pretrained(taught / "train").config.stitch_blocks is None


def test_a_second_round_can_be_run_module_by_module(warm, taught, tmp_path):
    out = tmp_path / "out"
    for name in ("teacher", "meta", *(f"distill_{i}" for i in range(2))):
        shutil.copytree(taught / name, out / name)
    refine = [*TINY, "--phase", "refine", "--module", "1", "--out", out, *METHOD]
    assert warm.run(refine).code == 0
    assert (out / "refine_1/result.json").is_file() and not (out / "refine_0").exists()
    missing = warm.run([*refine, "refine.order=sequential", "--module", "1"])
    assert missing.code == 2 and "refine.order" in missing.output  # made with another recipe
    off = warm.run([*TINY, "--phase", "refine", "--out", tmp_path / "off", *SMALLER])
    assert off.code == 2 and "refine.epochs is 0" in off.output


def test_modules_may_be_taught_in_the_second_round_alone(warm, taught, tmp_path):
    out = tmp_path / "out"
    for name in ("teacher", "meta"):
        shutil.copytree(taught / name, out / name)
    alone = ["distill.epochs=0", "refine.order=sequential", "train.baselines=[]"]
    finished = warm.run([*TINY, "--phase", "all", "--out", out, *METHOD, *alone, "distill.routing_weight=0.1"])
    assert finished.code == 0, finished.output
    for module in range(2):
        untaught, second = (result(out / f"{phase}_{module}") for phase in ("distill", "refine"))
        assert (untaught["steps"], untaught["epochs"], untaught["flops"]) == (0, 0, 0)
        assert 0 <= untaught["metrics"]["hybrid_accuracy"] <= 1
        assert second["steps"] > 0 and second["flops"] > 0
        assert "loss/routing" in read_metrics(out / f"refine_{module}/metrics.jsonl")[0]
        before, after = (load_file(out / f"{phase}_{module}/model.safetensors") for phase in ("distill", "refine"))
        assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    shown = [student for *_, student in hybrids(read_phases(out))]  # what was taught, not what was left as it was
    assert shown == [result(out / f"refine_{module}")["metrics"]["hybrid_accuracy"] for module in range(2)]
    neither = warm.run([*TINY, "--phase", "all", "--out", tmp_path / "off", "distill.epochs=0"])
    assert neither.code == 2 and "nothing would be taught" in neither.output


def test_modules_may_be_taught_together(warm, taught, tmp_path):
    out = tmp_path / "out"
    for name in ("teacher", "meta"):
        shutil.copytree(taught / name, out / name)
    alone = ["distill.epochs=0", "refine.order=together", "train.baselines=[]"]
    words = [*TINY, "--out", out, *METHOD, *alone, "distill.routing_weight=0.1"]
    one = warm.run([*words, "--phase", "refine", "--module", "1"])
    assert one.code == 2 and "--module 1 has no meaning with refine.order=together" in one.output
    finished = warm.run([*words, "--phase", "all", "ds.trainer.ep_size=2"], ranks=2)
    assert finished.code == 0, finished.output
    for module in range(2):
        made = result(out / f"refine_{module}")
        assert made["steps"] > 0 and made["flops"] > 0 and made["module"] == module
        before, after = (load_file(out / f"{phase}_{module}/model.safetensors") for phase in ("distill", "refine"))
        assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    row = read_metrics(out / "refine_1/metrics.jsonl")[0]  # of all modules
    assert {"loss/border/0", "loss/routing/0", "loss/routing/1", "loss/distill/1"} <= row.keys()
    assert not (out / "refine_0/metrics.jsonl").exists()
    last, train = result(out / "refine_1")["metrics"], result(out / "train")["metrics"]
    assert last["hybrid_accuracy"] == train["start_accuracy"]  # it is the whole student
    shown = [student for *_, student in hybrids(read_phases(out))]
    assert shown == [result(out / f"refine_{module}")["metrics"]["hybrid_accuracy"] for module in range(2)]
    # ended between two results: the same command finishes, from the last checkpoint, with the same weights
    weights = load_file(out / "refine_1/model.safetensors")
    for name in ("result.json", "model.safetensors"):
        (out / "refine_1" / name).unlink()
    again = warm.run(["--config", out / "refine_0/config.yaml", "--out", out], ranks=2)
    assert again.code == 0, again.output
    found = load_file(out / "refine_1/model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert result(out / "refine_1")["metrics"] == last


def test_what_the_teacher_told_may_be_kept(warm, taught, tmp_path):
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    order = ["distill.epochs=0", "refine.order=together", "refine.epochs=3", "refine.stored_epochs=1"]
    words = [*TINY, *METHOD, *order, "--out", out]
    for name in ("teacher", "meta"):
        shutil.copytree(taught / name, out / name)
    assert warm.run([*words, "--phase", "distill"]).code == 0
    shutil.copytree(out, undisturbed)
    latest = out / "refine_1/checkpoints/latest.json"

    def in_the_second_epoch() -> bool:
        return latest.is_file() and json.loads(latest.read_text())["tag"] == "step_00000009"

    planned = warm.run([*words, "--phase", "refine", "--dry-run"])
    assert planned.code == 0 and "what the teacher tells in the first epoch takes" in planned.output
    assert warm.run([*words, "--phase", "refine"], ranks=2, kill_when=in_the_second_epoch).code == -9
    kept = sorted((out / "refine_1/told").glob("*/*.safetensors"))
    assert len(kept) == 6 * 2  # of an epoch, on two ranks
    kept[-1].unlink()  # as if the disk had lost it
    assert warm.run([*words, "--phase", "refine"], ranks=2).code == 0
    assert warm.run([*words, "--phase", "refine", "--out", undisturbed], ranks=2).code == 0
    for module in range(2):
        here, there = (load_file(folder / f"refine_{module}/model.safetensors") for folder in (out, undisturbed))
        assert all(torch.equal(here[name], there[name]) for name in here)
        assert result(out / f"refine_{module}")["flops"] == result(undisturbed / f"refine_{module}")["flops"]
    assert not (out / "refine_1/told").exists()


def test_modules_may_be_fitted_to_each_other(warm, taught, tmp_path):
    out = tmp_path / "out"
    for name in ("teacher", "meta", "distill_0", "distill_1"):
        shutil.copytree(taught / name, out / name)
    fit = [*SMALLER, "distill.stitches=tied", "distill.border=mse", "refine.order=fit", "train.baselines=[]"]
    words = [*TINY, "--out", out, *fit]
    finished = warm.run([*words, "--phase", "refine"], ranks=2)
    assert finished.code == 0, finished.output
    assert "fitting 2 modules to each other on" in finished.output
    written = (".attn.proj.weight", ".attn.proj.bias", ".fc2.weight", ".fc2.bias")
    for module in range(2):
        made = result(out / f"refine_{module}")
        assert (made["steps"], made["epochs"]) == (0, 0) and made["flops"] > 0 and made["images_seen"] > 0
        assert [name for name in made["metrics"] if name.startswith("fit_error/")]
        before, after = (load_file(out / f"{phase}_{module}/model.safetensors") for phase in ("distill", "refine"))
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert changed and all(name.endswith(written) for name in changed)
    one = warm.run([*words, "--phase", "refine", "--module", "1"])
    assert one.code == 2 and "--module 1 has no meaning with refine.order=fit" in one.output
    # ended between two results, on another number of ranks: the same command finishes, with the same weights
    weights = load_file(out / "refine_1/model.safetensors")
    for name in ("result.json", "model.safetensors"):
        (out / "refine_1" / name).unlink()
    complete = [out / "refine_0" / name for name in ("result.json", "model.safetensors")]
    dates = [path.stat().st_mtime_ns for path in complete]
    assert warm.run([*words, "--phase", "refine"]).code == 0
    found = load_file(out / "refine_1/model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert [path.stat().st_mtime_ns for path in complete] == dates
    assert warm.run([*words, "--phase", "train"], ranks=2).code == 0
    last, train = result(out / "refine_1")["metrics"], result(out / "train")["metrics"]
    assert last["hybrid_accuracy"] == train["start_accuracy"]  # it is the whole student


def test_folded_stitches_are_published(warm, taught, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(taught / "teacher", out / "teacher")
    shutil.copytree(taught / "meta", out / "meta")
    linear = [*TINY, "--out", out, *SMALLER, "distill.border=mse", "distill.epochs=1", "train.baselines=[]"]
    assert warm.run([*linear, "--phase", "distill"]).code == 0
    refused = warm.run([*linear, "--phase", "train", "train.border_weight=1"])
    assert refused.code == 2 and "set distill.stitches=tied" in refused.output
    finished = warm.run([*linear, "--phase", "train", "train.stitches=fold"], ranks=2)
    assert finished.code == 0, finished.output
    student = VMoE.from_pretrained(out / "train")
    assert set(student.config.stitch_blocks.values()) == {0}
    made = json.loads((out / "train/assembled.json").read_text())
    assert set(made) == {f"start_accuracy/{way}" for way in ("drop", "keep", "fold")}
    assert made["start_accuracy/fold"] == result(out / "train")["metrics"]["start_accuracy"]


def test_wider_than_the_teacher_is_refused_before_training(warm, taught):
    refused = warm.run([*TINY, "--phase", "distill", "--out", taught, *METHOD, "student.width=48", "student.heads=4"])
    assert refused.code == 2 and "student.width is 48, the teacher's 32" in refused.output
