"""What is checked before training, in which order, and that it opens the data once."""

from pathlib import Path

import pytest
import torch

from trainer import context, hub, preflight
from trainer.config import load_recipe
from trainer.dist import Dist
from trainer.ds_config import read_ds_config

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
    monkeypatch.setattr(context, "open_source", lambda data, split: splits.append(split) or real(data, split))
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

    monkeypatch.setattr(hub, "check_hub", check_hub)
    run = run_with(tmp_path, "hub.repo=a/b", rank=rank)
    preflight.check(run, [*PHASES, "push"])
    assert calls == [True] * asked and opened == ["train", "val"]
    opened.clear()
    preflight.check(run, [*PHASES, "push"], make_repo=False)
    assert calls == [True, False][: 2 * asked]
    preflight.check(run, PHASES)
    assert len(calls) == 2 * asked


def test_a_push_alone_needs_no_data(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(hub, "check_hub", lambda *_, **__: None)
    preflight.check(run_with(tmp_path, "hub.repo=a/b"), ["push"])
    assert not opened


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
