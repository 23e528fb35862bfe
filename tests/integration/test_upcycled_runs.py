"""A student started from dense weights, through the phases: the same start on every rank and in every phase."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from models.vmoe.model import VMoE
from tests.launch import TINY

START = ["student.init=teacher", "student.width=32", "student.mlp_dim=64", "student.moe.capacity_factor=null"]
CLUSTERS = ["student.experts=clusters", "student.expert_noise=0.05", "expert.cluster_images=60"]
TRAIN = ["--phase", "train", "train.start=upcycled", "train.baselines=[]", "train.epochs=1"]


@pytest.fixture(scope="module")
def taught(warm, tmp_path_factory):
    """OUT with a teacher."""
    out = tmp_path_factory.mktemp("upcycled") / "out"
    finished = warm.run([*TINY, "--phase", "teacher", "--out", out, "teacher.epochs=1"])
    assert finished.code == 0, finished.output
    return out


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_sparse_upcycling_on_two_ranks(warm, taught):
    base = [*TINY, "--out", taught, "teacher.epochs=1", *START]
    finished = warm.run([*base, *TRAIN], ranks=2)
    assert finished.code == 0, finished.output
    made = result(taught / "train_upcycled")
    assert made["ep_size"] == 2 and made["student_start"]["sha256"] == made["teacher"]["sha256"]
    assert abs(made["metrics"]["start_accuracy"] - result(taught / "teacher")["metrics"]["accuracy"]) < 0.02
    assert VMoE.from_pretrained(taught / "train_upcycled").config.norm_eps == 1e-12  # of transformers' ViT
    refused = warm.run([*base, *TRAIN, "student.depth=6"])
    assert refused.code == 2 and "module 0 of the student has 3 blocks" in refused.output


def test_clusters_are_computed_once_and_every_rank_and_phase_starts_from_them(warm, taught):
    out = taught.parent / "clusters"
    (out / "teacher").mkdir(parents=True)
    for path in (taught / "teacher").iterdir():
        if path.is_file():
            (out / "teacher" / path.name).hardlink_to(path)
    base = [*TINY, "--out", out, "teacher.epochs=1", *START, *CLUSTERS]
    finished = warm.run([*base, *TRAIN], ranks=2)
    assert finished.code == 0, finished.output
    made = result(out / "upcycle")
    assert made["images_seen"] == 60 and made["flops"] > 0
    assert [sum(block["tokens"]) for block in made["clusters"].values()] == [60 * 5] * 4  # 2 x 2 patches + class token
    assert "ranks" in finished.output and finished.output.count("clustering what 60 images") == 1
    train = result(out / "train_upcycled")
    per_image = (train["flops"] - made["flops"]) / train["images_seen"]
    assert per_image == int(per_image)  # the clustering is in the phase's cost, once
    before = (out / "upcycle" / "model.safetensors").stat().st_mtime_ns
    state = load_file(out / "upcycle" / "model.safetensors")
    weights = [state[f"blocks.0.mlp.experts.{e}.fc1.weight"] for e in range(4)]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
    # a phase that needs the same start again takes it from there
    again = warm.run([*base, "--phase", "meta", "meta.epochs=1"])
    assert again.code == 0, again.output
    again = warm.run([*base, "--phase", "distill", "--module", "0", "distill.epochs=1", "meta.epochs=1"], ranks=2)
    assert again.code == 0 and "clustering" not in again.output, again.output
    assert (out / "upcycle" / "model.safetensors").stat().st_mtime_ns == before
    other = warm.run([*base, "expert.cluster_images=50", "--phase", "distill", "--module", "1", "meta.epochs=1"])
    assert other.code == 2 and "made for another start (recipe.images: 60 there, 50 here)" in other.output
    with (out / "upcycle" / "model.safetensors").open("r+b") as f:
        f.truncate(1000)
    broken = warm.run([*base, "--phase", "distill", "--module", "1", "meta.epochs=1"])
    assert broken.code == 2 and f"delete {out / 'upcycle'} and run the phase again" in broken.output


NARROWER = ["student.init=teacher", "student.width=24", "student.depth=2", "meta.blocks_per_module=0"]
TOGETHER = ["refine.epochs=1", "refine.order=together", "refine.global_batch=16", "distill.stitches=tied"]


@pytest.fixture(scope="module")
def projected(warm, taught):
    """OUT of a whole run on two ranks, of a narrower student of half the depth, and what it said."""
    out = taught.parent / "projected"
    shutil.copytree(taught / "teacher", out / "teacher")
    once = ["teacher.epochs=1", "distill.epochs=1", "train.epochs=1", "train.baselines=[]"]
    arguments = [*TINY, *once, *NARROWER, *TOGETHER, "distill.border=mse"]
    finished = warm.run([*arguments, "--phase", "all", "--out", out], ranks=2)
    assert finished.code == 0, finished.output
    return out, arguments, finished.output


def test_a_narrower_student_is_projected_once_for_all_phases(projected):
    out, _arguments, output = projected
    assert output.count("fitting a student of 2 blocks of width 24 to the 4 of width 32") == 1
    assert not (out / "upcycle.tmp").exists()
    made = result(out / "upcycle")
    assert made["flops"] > 0 and "basis.safetensors" in made["files"]
    assert made["covered"] == [[0, 2], [2, 4]]
    assert 0.9 < made["metrics"]["variance_carried"] < 1
    assert all(0 < made["metrics"][f"relative_error/{number}"] < 0.5 for number in range(2))
    for phase in ("distill_0", "distill_1"):
        assert result(out / phase)["student_start"]["sha256"] == made["dense"]["sha256"], phase


def test_a_run_that_takes_the_modules_takes_their_start(warm, projected):
    out, arguments, _ = projected
    other = out.parent / "taken"
    half_done = other / "upcycle.tmp/elsewhere.1/model.safetensors"  # of a job that was killed on another machine
    half_done.parent.mkdir(parents=True)
    half_done.write_bytes(b"half")
    source = [f"meta.source={out}", f"distill.source={out}", f"teacher.source={out / 'teacher'}", "data.limit=80"]
    finished = warm.run([*arguments, *source, "--phase", "meta", "--out", other])
    assert finished.code == 0, finished.output
    assert "the start of the student was taken from" in finished.output
    assert "fitting a student" not in finished.output
    for file in ("model.safetensors", "basis.safetensors"):
        assert (other / "upcycle" / file).read_bytes() == (out / "upcycle" / file).read_bytes()
    finished = warm.run([*arguments, *source, "--phase", "distill", "--module", "1", "--out", other], ranks=2)
    assert finished.code == 0, finished.output
    assert (other / "distill_1/model.safetensors").read_bytes() == (out / "distill_1/model.safetensors").read_bytes()
