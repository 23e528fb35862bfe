"""Training health on real ranks: faults done to them for real, and what the run makes of them."""

import json
import math
import os
import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.lives import Life
from trainer.request.job import EXIT_HUNG


def test_bad_steps_are_skipped_and_a_killed_run_skips_the_same(warm, tmp_path):
    skip, faults = {"on_nonfinite": "skip"}, {"nan": [8], "inf": 17}
    whole = Life(warm, tmp_path / "whole", run=skip, faults=faults)
    assert whole.health == {"nonfinite_steps": [8, 17], "rollbacks": [], "dead_experts": {}, "warnings": 2}
    rows = whole.rows("train")
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert [row.get("nonfinite_steps", 0) for row in rows] == [0, 1, 1, 1, 2, 2]
    assert all(math.isfinite(row["loss"]) for row in rows), "the bad step is left out of the mean"
    assert ["load/blocks.1.mlp" in row for row in rows] == [True, False, True, True, True, True]
    assert [(row["step"], row["message"]) for row in whole.rows("warning")] == [
        (step, f"the loss of rank 1 is not finite at step {step}: the step is skipped") for step in (8, 17)
    ]
    assert "warning: the loss of rank 1 is not finite at step 8" in whole.output

    Life(warm, tmp_path / "killed", run=skip, faults=faults | {"kill": 12}, code=-signal.SIGKILL)
    again = Life(warm, tmp_path / "killed", run=skip, faults=faults)
    assert again.weights == whole.weights
    assert again.health == whole.health
    assert again.rows("train") == rows and again.rows("warning") == whole.rows("warning")


def test_rolls_back_to_the_last_checkpoint(warm, tmp_path):
    """As if the steps since then had not been made: the same weights, bit for bit, as when both are skipped."""
    back = {"on_nonfinite": "rollback"}
    skipped = Life(warm, tmp_path / "skipped", run={"on_nonfinite": "skip"}, faults={"nan": [7, 8]})
    whole = Life(warm, tmp_path / "whole", run=back, faults={"nan": [8]})
    assert whole.weights == skipped.weights
    assert whole.health["nonfinite_steps"] == [8] and whole.health["rollbacks"] == [[8, 6]]
    assert [row["message"].split(":")[0] for row in whole.rows("warning")] == [
        "the loss of rank 1 is not finite at step 8", "rolled back to the weights of step 6",
    ]  # fmt: skip
    for number in (9, 11):  # before and after the first checkpoint that knows of it
        out = tmp_path / f"killed_{number}"
        Life(warm, out, run=back, faults={"nan": [8], "kill": number}, code=-signal.SIGKILL)
        again = Life(warm, out, run=back, faults={"nan": [8]})
        assert again.weights == whole.weights
        assert again.health == whole.health and again.rows("train") == whole.rows("train")


def test_a_loss_spike_rolls_back(warm, tmp_path):
    spike = {"on_spike": "rollback", "spike_factor": 8.0, "log_every": 1}
    whole = Life(warm, tmp_path / "whole", run=spike, faults={"huge rate": 13})
    assert whole.health["rollbacks"] == [[14, 12]]
    skipped = Life(warm, tmp_path / "skipped", run={"on_nonfinite": "skip"}, faults={"nan": [13, 14]})
    assert whole.weights == skipped.weights


def test_an_expert_without_tokens_is_named(warm, tmp_path):
    life = Life(warm, tmp_path, run={"dead_after": 3}, faults={"idle expert": 2})
    (row,) = [row for row in life.rows("warning") if "dead_experts" in row or "unused_experts" in row]
    assert row["step"] == 12 and row["layer"] == "blocks.1.mlp" and row["dead_experts"] == [2]
    assert row["message"] == "layer blocks.1.mlp: no tokens for expert 2 in 3 rows, at step 12"
    assert life.health["dead_experts"] == {"blocks.1.mlp": [2]}


def test_stops_at_the_step_on_all_ranks(warm, tmp_path):
    stopped = Life(warm, tmp_path / "stop", faults={"nan": [8]})
    assert stopped.error.startswith("train: the loss of rank 1 is not finite at step 8. Stopped on all")
    saved = json.loads((tmp_path / "stop/checkpoints/latest.json").read_text())
    assert saved["tag"] == "step_00000006"
    assert [row["step"] for row in stopped.rows("warning")] == [8]
    twice = Life(
        warm, tmp_path / "twice", run={"on_nonfinite": "skip", "max_nonfinite": 2}, faults={"nan": [*range(5, 24)]}
    )
    assert "at step 7, 3 times by now (run.max_nonfinite=2)" in twice.error


def test_weights_that_burst_reach_no_checkpoint(warm, tmp_path):
    """A finite gradient times a huge rate: only the weights show it, and they are looked at before they are saved."""
    sgd = {"optimizer": "sgd", "clip": 0.0, "lr": 8.0}
    faults, every = {"huge rate": 8, "factor": 1e39, "steep": 8}, {"save_every": 1}
    stopped = Life(warm, tmp_path / "stop", run=every, faults=faults, schedule=sgd)
    assert stopped.error.startswith("train: a weight is not finite at step 8. Stopped on all ranks")
    for path in tmp_path.glob("stop/checkpoints/step_*/*.safetensors"):
        assert all(bool(torch.isfinite(values).all()) for values in load_file(path).values()), path
    back = Life(warm, tmp_path / "back", run=every | {"on_nonfinite": "rollback"}, faults=faults, schedule=sgd)
    assert back.health["rollbacks"] == [[8, 7]]
    skip = {"on_nonfinite": "skip"}
    assert back.weights == Life(warm, tmp_path / "skip", run=skip, faults={"nan": [8]}, schedule=sgd).weights


@pytest.mark.parametrize(
    "place",
    [
        "trainer.distributed.engine:Engine.step",
        "trainer.checkpoint.saver:Saver.save",
        "trainer.loop.fit:_Loop._evaluate",
    ],
)
def test_a_stopped_rank_is_not_waited_for(warm, tmp_path, place):
    """SIGSTOP of rank 1: rank 0 says where it hangs, and ends itself within the time that is set."""
    begun = time.monotonic()
    life = Life(warm, tmp_path, run={"hang_seconds": 4.0}, faults={"stop in": place}, code=EXIT_HUNG)
    assert time.monotonic() - begun < 60
    assert "error: nothing moved for 4 s (run.hang_seconds=4)" in life.output and "lives.py" in life.output


def test_a_stuck_data_worker_is_not_waited_for(warm, tmp_path):
    run, faults = {"hang_seconds": 4.0}, {"stuck image": 40}
    life = Life(warm, tmp_path, ranks=1, run=run, faults=faults, workers=1, code=EXIT_HUNG)
    assert "a data loading process does not answer" in life.output and "dataloader.py" in life.output


def test_a_dead_data_worker_is_an_error_for_people(warm, tmp_path):
    life = Life(warm, tmp_path, ranks=1, faults={"kill worker": 5}, workers=1)
    # torch says "(pid 7) is killed" by its signal, "(pid(s) 7) exited unexpectedly" where it misses a batch first; and
    # the loader "broke off", where the socket is closed already and the process has not ended yet
    assert re.match(r"a data loading process died: DataLoader worker (\(pid(\(s\))? \d+\)|broke off: )", life.error)
    assert "lower data.workers" in life.error


def test_data_workers_that_are_measured_change_no_weight(warm, tmp_path):
    """The first steps load their images themselves; processes go on with the very next image."""
    given = Life(warm, tmp_path / "given", ranks=1, workers=0)
    measured = Life(warm, tmp_path / "measured", ranks=1, workers=None)
    assert measured.weights == given.weights
    if len(os.sched_getaffinity(0)) > 1:
        assert "data.workers=null: " in measured.output


def test_a_save_that_fails_on_one_rank_ends_all_of_them(warm, tmp_path):
    """Found by the question that all ranks are asked anyway, before the next save has to wait for it."""
    life = Life(warm, tmp_path, run={"save_every": 6, "log_every": 1}, faults={"full disk": 2})
    assert life.error.startswith("cannot write checkpoint") and "No space left on device" in life.error
    assert json.loads((tmp_path / "checkpoints/latest.json").read_text())["tag"] == "step_00000006"
    assert 12 <= life.rows("train")[-1]["step"] < 17  # the next save is after step 18


def test_rows_and_evaluation_at_another_number_of_ranks(warm, tmp_path):
    """Killed between two rows on two ranks with one micro-batch a step, continued on one rank with two."""
    whole = Life(warm, tmp_path / "whole")
    Life(warm, tmp_path / "moved", faults={"kill": 12}, code=-signal.SIGKILL)
    moved = Life(warm, tmp_path / "moved", ranks=1)
    for kind in ("train", "eval"):
        rows, expected = moved.rows(kind), whole.rows(kind)
        assert [row["step"] for row in rows] == [row["step"] for row in expected]
        for row, wanted in zip(rows, expected):
            assert row.keys() == wanted.keys()
            for key, value in wanted.items():
                if not isinstance(value, str):
                    assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{key} at step {row['step']}"


def test_other_micro_batches_after_a_kill_are_said(warm, tmp_path):
    """The same images go on; what is drawn per micro-batch does not, and a line says how to have it back."""
    Life(warm, tmp_path / "run", ranks=1, faults={"kill": 8}, code=-signal.SIGKILL)
    again = Life(warm, tmp_path / "run", ranks=1, accumulation=1)
    (warning,) = again.rows("warning")
    assert warning["step"] == 6
    assert warning["message"].startswith("resumed with micro-batches of 8 images, saved with 4")
    assert warning["message"].endswith('"gradient_accumulation_steps" to 2 in the DeepSpeed JSON')
    assert f"warning: {warning['message']}" in again.output
    assert [row["step"] for row in again.rows("train")] == [4, 8, 12, 16, 20, 24]
