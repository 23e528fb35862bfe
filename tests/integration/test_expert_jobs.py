"""Per-expert distillation for real: independent jobs, killed and resumed, at 1 and 2 ranks, up to the tuned module."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch import TINY, TINY_RECIPE
from trainer.artifacts import write_result
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe
from trainer.context import Run
from trainer.distributed import ranks
from trainer.teaching.experts import Assembly

EXPERTS = ["distill.level=expert", "expert.epochs=4", "expert.lr=0.06", "expert.global_batch=16",
           "expert.cluster_images=60", "expert.drop_path=0.1", "student.moe.num_experts=2", "student.moe.k=1",
           # kinds of layers that the teacher has not: their names go through every phase, both ep sizes and a resume
           "student.swiglu=true", "student.layer_scale=0.1", "student.rope=true", "student.class_token=false",
           "train.baselines=[]"]  # fmt: skip
COMMAND = [*TINY, *EXPERTS]


@pytest.fixture(scope="module")
def run(warm, chain, tmp_path_factory):
    """OUT of --phase all with distill.level=expert at 2 ranks, on the chain's teacher and meta model. Read only."""
    out = begin(chain, tmp_path_factory.mktemp("experts") / "out")
    finished = warm.run([*COMMAND, "--phase", "all", "--out", out], ranks=2)
    assert finished.code == 0, finished.output
    return out, finished.output


def begin(chain, out):
    for phase in ("teacher", "meta"):
        shutil.copytree(chain[0] / phase, out / phase)
    return out


def result(folder):
    return json.loads((folder / "result.json").read_text())


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_the_whole_chain(run):
    out, printed = run
    assert "module 0, share of the images per expert: 0: " in printed
    for i in range(2):
        clusters = load_file(out / f"cluster_{i}/clusters.safetensors")
        assert clusters["centroids"].shape == (2, 32) and clusters["train"].dtype == torch.int16
        counts = torch.bincount(clusters["train"].long(), minlength=2)
        tuned = result(out / f"distill_{i}")["metrics"]
        for j in range(2):
            found = result(out / f"expert_{i}_{j}")
            assert found["metrics"]["images"] == counts[j] and found["metrics"]["share"] == tuned[f"share/{j}"]
            assert found["metrics"]["val_images"] == (clusters["val"] == j).sum()
            assert found["images_seen"] == 4 * max(1, int(counts[j]) // 16) * 16  # its own share, four times
            assert tuned[f"expert_accuracy/{j}"] == found["metrics"]["accuracy"] and found["flops"] > 0
        assert result(out / f"cluster_{i}")["images_seen"] == 160  # 60 to cluster, then all 100
        assert 0 <= tuned["agreement_after"] <= 1 and 0 <= tuned["start_accuracy"] <= 1
        assert tuned["agreement_before"] > 0.5  # two experts: .5 is chance
    assert (out / "train/result.json").is_file()


def test_what_the_experts_share_began_alike(run):
    """The same start and the same meta model; the data of a share alone tells them apart."""
    experts = [load_file(run[0] / f"expert_0_{j}/model.safetensors") for j in range(2)]
    assert not any(".experts." in name or ".router." in name for name in experts[0])
    assert all(value.shape == experts[1][name].shape for name, value in experts[0].items())
    assert not torch.equal(experts[0]["stage.blocks.0.mlp.fc1_g.weight"], experts[1]["stage.blocks.0.mlp.fc1_g.weight"])
    tuned = load_file(run[0] / "distill_0/model.safetensors")
    assert "stage.blocks.0.mlp.experts.1.fc1_g.weight" in tuned and "stage.blocks.0.mlp.router.weight" in tuned


def test_an_expert_is_a_job_of_its_own(warm, chain, run, tmp_path):
    """Alone, in another folder, killed and started again, by its other name: the very same weights and clusters."""
    out = begin(chain, tmp_path / "out")
    command = [*COMMAND, "--phase", "distill", "--module", "0", "--expert", "1", "--out", out]
    latest = out / "expert_0_1/checkpoints/latest.json"
    killed = warm.run(command, ranks=2, kill_when=lambda: latest.exists() and "step_00000003" in latest.read_text())
    assert killed.code == -9 and not (out / "expert_0_1/result.json").exists()
    finished = warm.run(command, ranks=2)
    assert finished.code == 0 and "resumed after step" in finished.output, finished.output
    assert weights(out / "expert_0_1") == weights(run[0] / "expert_0_1")
    clusters = [(folder / "cluster_0/clusters.safetensors").read_bytes() for folder in (out, run[0])]
    assert clusters[0] == clusters[1]
    assert not list(out.glob(".cluster*")) and not (out / "expert_0_0").exists()

    # its modules need all experts: the one that is missing is named, with the command that makes it
    refused = warm.run([*COMMAND, "--phase", "distill", "--module", "0", "--out", out], ranks=2)
    assert refused.code == 2
    assert "expert_0_0, which does not exist: run --phase expert --module 0 --expert 0" in refused.output


def test_tuning_goes_on_after_a_kill(warm, run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    shutil.rmtree(out / "distill_0")
    command = [*COMMAND, "--phase", "distill", "--module", "0", "--out", out]
    killed = warm.run(command, ranks=2, kill_when=(out / "distill_0/checkpoints/latest.json").exists)
    assert killed.code == -9
    finished = warm.run(command, ranks=2)
    assert finished.code == 0 and "resumed after step" in finished.output, finished.output
    assert weights(out / "distill_0") == weights(run[0] / "distill_0")
    assert result(out / "distill_0")["metrics"] == result(run[0] / "distill_0")["metrics"]


def test_a_cluster_without_images_is_named_and_stood_in_for(warm, run, tmp_path):
    """Two experts, all images in the first one's cluster: the second is a copy of the first, nothing is averaged."""
    out = tmp_path / "out"
    shutil.copytree(run[0], out, ignore=shutil.ignore_patterns("expert_*", "distill_*", "train*", "evaluate*"))
    folder = out / "cluster_0"
    tensors = load_file(folder / "clusters.safetensors")
    save_file(tensors | {split: tensors[split] * 0 for split in ("train", "val")}, folder / "clusters.safetensors")
    write_result(folder, result(folder) | {"metrics": {"share/0": 1.0, "share/1": 0.0}})
    words = [*COMMAND, "--module", "0", "--out", out]
    taught = warm.run([*words, "--phase", "expert"])
    assert taught.code == 0 and "no image belongs to expert 1 of module 0" in taught.output, taught.output
    empty = result(out / "expert_0_1")
    assert (empty["metrics"], empty["steps"], empty["flops"]) == ({"images": 0, "share": 0}, 0, 0)
    assert not (out / "expert_0_1/model.safetensors").exists()
    finished = warm.call("tests.integration.test_expert_jobs:assemble", str(out), EXPERTS)
    assert finished.code == 0, finished.output
    finished = warm.run([*words, "--phase", "distill"])
    assert finished.code == 0, finished.output
    tuned = result(out / "distill_0")["metrics"]
    assert tuned["share/1"] == 0 and "expert_accuracy/1" not in tuned and tuned["agreement_before"] > 0.9


def assemble(out, words):
    """On a rank: module 0 is the dense module of expert 0, the second expert a copy that routers rank second."""
    recipe = load_recipe(TINY_RECIPE, [word for word in words if "=" in word])
    run = Run(recipe, read_ds_config(TINY[1]), Path(out), ranks.start(), "a test")
    student = Assembly(run, 0).student.state_dict()
    dense = load_file(Path(out) / "expert_0_0/model.safetensors")
    for block in range(2):
        for part in ("fc1_g.weight", "fc2.bias"):
            for expert in range(2):
                copied = student[f"stage.blocks.{block}.mlp.experts.{expert}.{part}"]
                assert torch.equal(copied, dense[f"stage.blocks.{block}.mlp.{part}"])
    assert torch.equal(student["stage.blocks.1.attn.qkv.weight"], dense["stage.blocks.1.attn.qkv.weight"])


def test_tokens_shared_out(warm, chain, tmp_path):
    """expert.assign=token on one rank: all images for every expert, the last module still by image."""
    out = begin(chain, tmp_path / "out")
    words = [*COMMAND, "expert.assign=token", "distill.border=mse", "expert.epochs=1"]
    for more in (["--phase", "expert"], ["--phase", "distill", "--module", "0"]):
        finished = warm.run([*words, *more, "--out", out])
        assert finished.code == 0, finished.output
    assert set(load_file(out / "cluster_0/clusters.safetensors")) == {"mean", "centroids"}
    assert set(load_file(out / "cluster_1/clusters.safetensors")) == {"mean", "centroids", "train", "val"}
    assert [result(out / f"expert_0_{j}")["metrics"]["images"] for j in range(2)] == [100, 100]
    first, second = (load_file(out / f"expert_0_{j}/model.safetensors") for j in range(2))
    assert any(not torch.equal(value, second[name]) for name, value in first.items())  # only their tokens differ
    assert result(out / "distill_0")["metrics"]["agreement_before"] > 0.5
