"""The bytes a plan says of a step are those that a real step asks torch.distributed to move, at 2 and 4 ranks."""

import json
import shutil
from collections import defaultdict
from dataclasses import replace

import pytest

from tests.launch import ROOT, TINY, TINY_RECIPE
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe
from trainer.plan.planner import settings_of
from trainer.plan.stand_ins import planned_run
from trainer.plan.traffic import Layout, collectives, exchanged_bytes
from trainer.plan.work import works

DS_CONFIG = ROOT / "ds_configs/cpu_debug.json"
SHORT = ["train.epochs=1", "train.warmup_epochs=0.5", "train.start=scratch"]
CASES = {
    "2 ranks share the experts, ZeRO-2, bf16, two micro-batches, recomputed": (
        2,
        ["ds.bf16.enabled=true", "ds.zero_optimization.stage=2", "ds.gradient_accumulation_steps=2",
         "ds.trainer.activation_checkpointing=true", "student.moe.dropout=0.1", "train.layer_decay=0.7"],
    ),
    "4 ranks, two of them hold the same experts": (
        4,
        ["ds.trainer.ep_size=2", "ds.zero_optimization.overlap_comm=false"],
    ),
}  # fmt: skip


def planned(name, ranks, overrides):
    """The training of a result as a plan sees it, its settings and the layout of its ranks."""
    recipe = load_recipe(TINY_RECIPE, [word for word in overrides if not word.startswith("ds.")])
    ds_values = read_ds_config(DS_CONFIG, [word for word in overrides if word.startswith("ds.")])
    run = planned_run(recipe, ds_values, ROOT / "unused", 1, ranks, images=64, classes=10)
    work = next(work for work in works(run) if work.name == name)
    settings = settings_of(recipe, work, ds_values, Layout(1, ranks))
    return work, settings, Layout(1, ranks, settings.ep_size)


def observed(warm, chain, tmp_path, name, ranks, overrides, *flags):
    """(kind, ranks of the group) -> [calls, bytes] of a real step of each rank."""
    out = tmp_path / "out"
    shutil.copytree(chain[0], out, ignore=shutil.ignore_patterns("checkpoints", "evaluate*", "report*"))
    shutil.rmtree(out / name)
    arguments = [*TINY, *flags, "--out", str(out), *overrides]
    finished = warm.call("tests.integration.observed:train", str(tmp_path), *arguments, ranks=ranks, timeout=180)
    assert finished.code == 0, finished.output
    seen = []
    for rank in range(ranks):
        rows = json.loads((tmp_path / f"{name}_{rank}.json").read_text())
        seen.append({(kind, size): [calls, total] for kind, size, calls, total in rows})
    return seen


def added_up(moved):
    total = defaultdict(lambda: [0, 0])
    for each in moved:
        total[each.kind, each.size][0] += each.calls
        total[each.kind, each.size][1] += each.bytes
    return dict(total)


def check(seen_by_rank, expected):
    """Calls and bytes of every kind; of rows, which depend on the data, the bytes of all ranks together."""
    exchanged = 0
    for seen in seen_by_rank:
        assert seen.keys() == expected.keys()
        for key, (calls, moved) in seen.items():
            assert calls == expected[key][0], key
            if key[0] == "all_to_all":
                exchanged += moved
            else:
                assert moved == expected[key][1], key
    return exchanged, len(seen_by_rank) * sum(moved for key, (_, moved) in expected.items() if key[0] == "all_to_all")


@pytest.mark.parametrize("case", CASES)
def test_bytes_and_calls_of_a_step_are_exact(warm, chain, tmp_path, case):
    ranks, overrides = CASES[case]
    words = [*SHORT, *overrides, "student.moe.capacity_factor=null"]
    expected = added_up(collectives(*planned("train", ranks, words)))
    seen = observed(warm, chain, tmp_path, "train_scratch", ranks, words, "--phase", "train")
    exchanged, planned_bytes = check(seen, expected)
    assert exchanged == planned_bytes
    assert ("all_to_all", 2) in expected


def test_a_pair_of_modules_that_drops_tokens(warm, chain, tmp_path):
    """With a capacity only choices that are kept travel, so that a plan says the most."""
    words = ["distill.epochs=1", "distill.warmup_epochs=0.5", "student.moe.capacity_factor=0.75"]
    expected = added_up(collectives(*planned("distill_1", 2, words)))
    seen = observed(warm, chain, tmp_path, "distill_1", 2, words, "--phase", "distill", "--module", "1")
    exchanged, planned_bytes = check(seen, expected)
    assert planned_bytes / 2 < exchanged < planned_bytes


def test_exchanges_by_hand():
    """8 images of 5 tokens to k=2 of 4 experts of width 16."""
    work, _, _ = planned("train", 2, SHORT)
    layer = work.moe_layers[0]
    layer.config = replace(layer.config, capacity_factor=None)
    # 80 rows there, 80 back, and both for the gradient
    assert exchanged_bytes(layer, images=8, tokens=5, number=4) == 4 * 80 * 16 * 4
    # the busiest rank computes 1.5 times as many: 120 in and 80 back, twice, and once more where that is recomputed
    assert exchanged_bytes(layer, images=8, tokens=5, number=2, busiest=1.5) == 2 * 200 * 16 * 2
    assert exchanged_bytes(layer, 8, 5, 2, busiest=1.5, recomputed=True) == 3 * 200 * 16 * 2
    # in groups of 4 images 20 tokens x 2 choices x 0.5 / 4 experts = 5 places, rounded up to 8: 2 groups x 4 x 8
    layer.config = replace(layer.config, capacity_factor=0.5, images_per_group=4)
    assert exchanged_bytes(layer, images=8, tokens=5, number=4) == 4 * 64 * 16 * 4
