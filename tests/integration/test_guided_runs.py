"""Teacher-guided routing in the phases: its loss is logged and falls; ranks and expert parallelism change nothing."""

import json
import shutil

import pytest

from tests.launch import TINY
from trainer.tracking.metrics import read_metrics

GUIDED = ["distill.routing_weight=1", "train.routing_weight=1", "train.border_epochs=4", "train.start=scratch"]
TWO_MICRO_BATCHES = ["ds.train_micro_batch_size_per_gpu=8", "ds.gradient_accumulation_steps=2"]


@pytest.fixture(scope="module")
def guided(warm, chain, tmp_path_factory):
    """Folder of module 1 and of a student from scratch, both guided, by number of ranks."""
    outs = {}
    distill = ["distill", "--module", "1"]
    for ranks, phases in ((2, [distill, ["train"]]), (1, [distill + TWO_MICRO_BATCHES])):
        outs[ranks] = tmp_path_factory.mktemp("guided") / "out"
        for name in ("teacher", "meta"):
            shutil.copytree(chain[0] / name, outs[ranks] / name)
        for phase in phases:
            finished = warm.run([*TINY, "--phase", *phase, "--out", outs[ranks], *GUIDED], ranks=ranks)
            assert finished.code == 0, finished.output
    return outs


def rows(folder, kind):
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == kind]


def test_the_routers_follow_the_teacher(guided):
    for name in ("distill_1", "train_scratch"):
        losses = [row["loss/routing"] for row in rows(guided[2] / name, "train")]
        assert 0 < losses[-1] < losses[0], name


def test_two_ranks_are_guided_like_one(guided):
    one, two = (rows(guided[ranks] / "distill_1", "train") for ranks in (1, 2))
    assert [row["loss/routing"] for row in one] == pytest.approx([row["loss/routing"] for row in two], rel=1e-4)


def test_routing_measures_reach_rows_and_result(guided):
    first, *_, last = rows(guided[2] / "distill_1", "eval")
    assert "routing_change" not in first and 0 <= last["routing_change"] <= 1
    layers = [key for key in last if key.startswith("routing_change/")]
    assert layers and all(key.replace("routing_change", "expert_similarity") in last for key in layers)
    metrics = json.loads((guided[2] / "distill_1/result.json").read_text())["metrics"]
    assert metrics["routing_change"] == last["routing_change"]
    assert metrics["expert_similarity"] == last["expert_similarity"]
