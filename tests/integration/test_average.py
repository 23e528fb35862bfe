"""The average of the weights (train.ema) on real ranks: what it is, and that it survives what weights survive.

The functions without test_ in their name run on the ranks, in forks of one warm python.
"""

import json
import math
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.integration.lives import Life
from tests.integration.test_elastic import Topology, assert_equal, engine_at, train, whole_state
from tests.launch import TINY
from trainer.checkpoint.saver import Saver
from trainer.config.runtime import RunConfig
from trainer.distributed.ranks import start

DECAY = 0.3  # the rule min(decay, (1 + n) / (10 + n)) gives 1/10, 2/11, 3/12, 4/13, and then 0.3
DECAYS = (1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)


def averages_the_masters() -> None:
    """By hand from the masters after every step, dense and experts: fp32 with ZeRO 1, bf16 with ZeRO 2, offloaded."""
    dist = start()
    for at in (Topology(2, 2, 1), Topology(2, 2, 2, bf16=True, offload=True)):
        with engine_at(dist, at, ema=DECAY) as engine:
            state = whole_state(engine, dist)
            names = [key.removeprefix("fp32/") for key in state if key.startswith("fp32/")]
            expected = {name: state[f"fp32/{name}"] for name in names}
            for step, decay in enumerate(DECAYS):
                train(engine, dist, step, step + 1)
                state = whole_state(engine, dist)
                for name in names:
                    expected[name] = decay * expected[name] + (1 - decay) * state[f"fp32/{name}"]
                    assert_close(state[f"ema/{name}"], expected[name], rtol=1e-5, atol=1e-7)
            with engine.published():
                for name, value in engine.fp32_state().items():
                    assert torch.equal(value.flatten(), state[f"ema/{name}"]), name
                working = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
            assert_equal(whole_state(engine, dist), state, f"{at} after the block")
            moved = [not torch.equal(p, working[name]) for name, p in engine.module.named_parameters()]
            assert any(moved), "the forward never saw the average"
            for _ in range(engine.settings.accumulation):
                engine.backward(engine(torch.zeros(2, 3, 16, 16, dtype=engine.dtype)).sum() * math.nan)
                engine.step(len(DECAYS))
            assert_equal(whole_state(engine, dist), state, f"{at} after a step that was refused")


def save_average(folder: str) -> None:
    """Two ranks that share the experts out save, train on, and go back."""
    dist = start()
    with engine_at(dist, Topology(2, 2, 1), ema=DECAY) as engine:
        train(engine, dist, 0, 2)
        saver = Saver(engine, Path(folder) / "train", RunConfig(), dist)
        saver.save(2, state={}, own={}, wait=True)
        saved = whole_state(engine, dist)
        train(engine, dist, 2, 4)
        expected = whole_state(engine, dist)
        saver.resume()
        assert_equal(whole_state(engine, dist), saved, "rolled back")
        train(engine, dist, 2, 4)
        assert_equal(whole_state(engine, dist), expected, "two steps after the way back")
    if dist.main:
        torch.save({"saved": saved, "expected": expected}, f"{folder}/states.pt")


def load_average(folder: str, at: dict) -> None:
    """The same average at another topology, and after two more steps."""
    dist, states = start(), torch.load(f"{folder}/states.pt", weights_only=True)
    with engine_at(dist, Topology(**at), ema=DECAY) as engine:
        Saver(engine, Path(folder) / "train", RunConfig(), dist).resume()
        assert_equal(whole_state(engine, dist), states["saved"], f"resumed at {at}")
        train(engine, dist, 2, 4)
        for key, value in whole_state(engine, dist).items():
            assert_close(value, states["expected"][key], rtol=0, atol=1e-6)


def test_averages_the_masters(warm):
    finished = warm.call("tests.integration.test_average:averages_the_masters", ranks=2)
    assert finished.code == 0, finished.output


def test_goes_through_checkpoints_to_other_ranks(warm, tmp_path):
    (tmp_path / "train").mkdir()
    function = "tests.integration.test_average:{}"
    finished = warm.call(function.format("save_average"), str(tmp_path), ranks=2)
    assert finished.code == 0, finished.output
    for at in (Topology(2, 1, 2), Topology(1, 1, 1, offload=True)):
        finished = warm.call(function.format("load_average"), str(tmp_path), asdict(at), ranks=at.world)
        assert finished.code == 0, finished.output


def test_skipped_steps_and_kills_leave_the_average_of_the_steps_made(warm, tmp_path):
    ema, skip = {"ema": 0.9}, {"on_nonfinite": "skip"}
    whole = Life(warm, tmp_path / "whole", engine=ema, run=skip, faults={"nan": [7, 8]})
    assert whole.published != whole.weights
    rows = whole.rows("eval")
    end, last = whole.ends[0]["evaluation"], rows[-1]
    assert end["loss"] == last["loss_ema"] != last["loss"] == end["loss_raw"]
    Life(warm, tmp_path / "killed", engine=ema, run=skip, faults={"nan": [7, 8], "kill": 17}, code=-signal.SIGKILL)
    again = Life(warm, tmp_path / "killed", engine=ema, run=skip, faults={"nan": [7, 8]})
    assert (again.weights, again.published) == (whole.weights, whole.published)
    assert again.rows("eval") == rows


def test_phase_train_publishes_the_average(warm, tmp_path):
    command = [
        *TINY,
        "--out",
        tmp_path,
        "teacher.epochs=1",
        "teacher.warmup_epochs=0",
        "train.start=scratch",
        "train.ema=0.9",
    ]
    for phase in ("teacher", "train", "evaluate"):
        finished = warm.run([*command, "train.layer_decay=0.8", "--phase", phase], ranks=2)
        assert finished.code == 0, finished.output
    trained, evaluated = (
        json.loads((tmp_path / f"{phase}_scratch/result.json").read_text())["metrics"]
        for phase in ("train", "evaluate")
    )
    assert evaluated["loss"] == pytest.approx(trained["loss"], rel=1e-6) and trained["loss"] != trained["loss_raw"]
    assert evaluated["accuracy"] == trained["accuracy"]
