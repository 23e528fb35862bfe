"""What is checked before training, in which order, and that it opens the data once."""

from pathlib import Path

import pytest
import torch
from vit_families import save_transformers

from trainer import context
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe
from trainer.distributed.ranks import Dist
from trainer.hub import push
from trainer.plan import preflight
from trainer.teaching import teachers
from trainer.teaching.students import new_student
from trainer.teaching.upcycling import dense_start

ROOT = Path(__file__).resolve().parents[2]
PHASES = ["teacher", "meta", "distill", "train", "evaluate"]


def run_with(out, *overrides, rank=0):
    recipe = load_recipe(ROOT / "tests/fixtures/tiny.yaml", overrides)
    ds_values = read_ds_config(ROOT / "ds_configs/cpu_debug.json")
    return context.Run(recipe, ds_values, out, Dist(rank, 2, rank, 2, torch.device("cpu")), "a command")


@pytest.fixture
def opened(monkeypatch):
    """The splits opened so far."""
    splits, real = [], context.open_source
    monkeypatch.setattr(
        context, "open_source", lambda data, split, **options: splits.append(split) or real(data, split, **options)
    )
    return splits


def test_the_data_is_opened_once_also_with_a_teacher_that_is_not_trained_yet(tmp_path, opened):
    run = run_with(tmp_path)
    preflight.check(run, PHASES)
    assert opened == ["train", "val"]
    assert run.sources and opened == ["train", "val"]  # nor again by the phases
    assert run.planned_teacher is None  # the stand-in is preflight's own


@pytest.mark.parametrize("rank, asked", [(0, 1), (1, 0)])
def test_the_hub_is_asked_first_and_by_one_rank(tmp_path, monkeypatch, opened, rank, asked):
    calls = []

    def check_hub(target, *, make):
        assert target.repo == "a/b" and not opened
        calls.append(make)

    monkeypatch.setattr(push, "check_hub", check_hub)
    run = run_with(tmp_path, "hub.repo=a/b", rank=rank)
    preflight.check(run, [*PHASES, "push"])
    assert calls == [True] * asked and opened == ["train", "val"]
    opened.clear()
    preflight.check(run, [*PHASES, "push"], make_repo=False)
    assert calls == [True, False][: 2 * asked]
    preflight.check(run, PHASES)
    assert len(calls) == 2 * asked


def test_a_push_alone_needs_no_data(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(push, "check_hub", lambda *_, **__: None)
    preflight.check(run_with(tmp_path, "hub.repo=a/b"), ["push"])
    assert not opened


UPCYCLED = ("student.init=teacher", "student.mlp_dim=64", "train.baselines=[upcycled]")


def test_a_start_from_a_teacher_that_is_not_trained_yet(tmp_path):
    preflight.check(run_with(tmp_path, *UPCYCLED, "student.width=32"), PHASES)
    with pytest.raises(ValueError, match=r"student's width is 16 and that of to be trained, which .*, is 32"):
        preflight.check(run_with(tmp_path, *UPCYCLED, "student.start=copy"), PHASES)
    preflight.check(run_with(tmp_path, *UPCYCLED), PHASES)  # projected
    with pytest.raises(ValueError, match=r"20 calibration images are 100 tokens, .*start_images \(to at least 26\)"):
        preflight.check(run_with(tmp_path, *UPCYCLED, "student.start_images=20"), PHASES)
    with pytest.raises(ValueError, match="module 1 of the student has 3 blocks and the dense model's has 2"):
        preflight.check(run_with(tmp_path, *UPCYCLED, "student.width=32", "student.depth=5",
                                 "student.depths=[2, 3]"), PHASES)  # fmt: skip


def test_a_start_from_another_dense_model(tmp_path):
    save_transformers(tmp_path / "dense", "ViTForImageClassification")
    fits = ("student.width=24", "student.heads=3", "student.mlp_dim=37", "student.depth=3", "teacher.image_size=32")
    run = run_with(tmp_path, f"student.init={tmp_path / 'dense'}", "student.experts=clusters", *fits)
    preflight.check(run, PHASES)
    student = new_student(run.with_teacher(teachers.planned_teacher(run.recipe.teacher, run.labels)))
    assert torch.equal(student.blocks[2].attn.proj.weight, dense_start(run).model.blocks[2].attn.proj.weight)
    assert (
        student.num_classes == 10
        and dense_start(run).num_classes == 4
        and not dense_start(run).model.head.weight.is_meta
    )
    with pytest.raises(ValueError, match=r"image_size is 16 and that of .*dense.* is 32: they must be equal; name in"):
        preflight.check(run_with(tmp_path, f"student.init={tmp_path / 'dense'}", *fits[:-1]), PHASES)


@pytest.mark.parametrize(
    "zero, message",
    [
        ({"overlap_com": True}, 'unknown key "zero_optimization.overlap_com" .* Did you mean overlap_comm'),
        ({"zzz": 1}, 'unknown key "zero_optimization.zzz" .* See DeepSpeed\'s documentation'),
        ({"reduce_bucket_size": -1}, r'"zero_optimization\.reduce_bucket_size" is -1 .*greater than 0'),
        ({"offload_optimizer": {"devise": "cpu"}}, 'unknown key "zero_optimization.offload_optimizer.devise"'),
    ],
)
def test_deepspeed_reads_its_zero_section_before_training(zero, message):
    preflight.check_zero({"stage": 1, "overlap_comm": True})
    with pytest.raises(ValueError, match=message) as error:
        preflight.check_zero({"stage": 1, **zero})
    assert "\n" not in str(error.value)
