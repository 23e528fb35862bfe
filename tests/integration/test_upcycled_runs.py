"""A student started from dense weights, through the phases: the same start on every rank and in every phase."""

import json

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
