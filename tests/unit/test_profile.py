"""run.profile: which steps are looked into, what the files say, and that nothing is done when it is off."""

import json

import torch

from trainer.loop.profile import SKIPPED, WARM_UP, StepProfiler, part, waiting


def train(profiler, steps):
    a = torch.randn(64, 64)
    for _ in waiting(range(steps)):
        with part("forward"):
            for _ in range(8):
                a = (a @ a).clamp(-1, 1)
        with part("optimizer"):
            a.add_(1)
        profiler.step_done()
    profiler.close()


def test_table_and_trace_of_the_steps_asked_for(tmp_path):
    train(StepProfiler(2, tmp_path / "profile"), SKIPPED + WARM_UP + 5)
    text = (tmp_path / "profile/steps.txt").read_text()
    head, *rows = text.split("\n\n")[0].splitlines()
    assert head.split() == ["part", "of", "a", "step", "ms", "share"]
    assert [row.split()[0] for row in rows] == ["data", "forward", "optimizer"]
    shares = [int(row.split()[2].removesuffix("%")) for row in rows]
    assert 98 <= sum(shares) <= 102 and shares[1] == max(shares)
    assert "aten::mm" in text
    trace = json.loads((tmp_path / "profile/trace.json").read_text())
    assert sum(event.get("name") == "step/forward" for event in trace["traceEvents"]) == 2


def test_fewer_steps_than_asked_for_and_none(tmp_path):
    train(StepProfiler(100, tmp_path / "few"), SKIPPED + WARM_UP + 3)
    assert (tmp_path / "few/steps.txt").exists()
    train(StepProfiler(0, tmp_path / "none"), 4)
    assert not (tmp_path / "none").exists()
