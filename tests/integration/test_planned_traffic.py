"""The bytes a plan says of a step are those that a real step asks torch.distributed to move, at 1, 2 and 4 ranks."""

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
    "1 rank": (1, []),
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


@pytest.mark.parametrize("case", CASES)
def test_bytes_and_calls_of_a_step_are_exact(warm, chain, tmp_path, case):
    ranks, overrides = CASES[case]
    words = [*SHORT, *overrides]
    expected = added_up(collectives(*planned("train", ranks, words)))
    for seen in observed(warm, chain, tmp_path, "train_scratch", ranks, words, "--phase", "train"):
        assert seen == expected
    assert ("all_to_all", 2) in expected or ranks == 1


def test_a_pair_of_modules_and_no_capacity(warm, chain, tmp_path):
    """Without a capacity the rows depend on the data: their number is between the mean and all; the rest is exact."""
    words = ["distill.epochs=1", "distill.warmup_epochs=0.5", "student.moe.capacity_factor=null"]
    work, settings, layout = planned("distill_1", 2, words)
    expected = added_up(collectives(work, settings, layout))
    for seen in observed(warm, chain, tmp_path, "distill_1", 2, words, "--phase", "distill", "--module", "1"):
        calls, moved = seen.pop(("all_to_all", 2))
        assert calls == expected.get(("all_to_all", 2))[0]
        even = expected[("all_to_all", 2)][1]
        assert even <= moved <= even * work.moe_layers[0].config.num_experts
        assert seen == {key: total for key, total in expected.items() if key[0] != "all_to_all"}


def test_one_exchange_by_hand():
    """8 images of 5 tokens to k=2 of 4 experts of width 16, room for a perfectly even load in groups of 4 images."""
    work, _, _ = planned("train", 2, SHORT)
    layer = work.moe_layers[0]
    # 20 tokens of a group x 2 choices / 4 experts = 10 places, rounded up to a multiple of 4: 12, for 2 groups 24 rows
    assert exchanged_bytes(layer, images=8, tokens=5, number=4) == 4 * 24 * 16 * 4
    dropless = replace(layer.config, capacity_factor=None)
    layer.config = dropless
    # 40 tokens x 2 / 4 = 20 rows where the load is even; 1.5 times as many for the busiest
    assert exchanged_bytes(layer, images=8, tokens=5, number=2, busiest=1.5) == 4 * 30 * 16 * 2
