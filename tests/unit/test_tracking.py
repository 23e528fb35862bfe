"""metrics.jsonl survives kills and resumes; the progress line says what the row says."""

import io
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.tracking.metrics import MetricsLog, Progress, read_metrics, relative_load

ROOT = Path(__file__).resolve().parents[2]


def train_row(step, **extra):
    return {"kind": "train", "phase": "train", "epoch": 0, "step": step, "loss": 1.0 / step, "lr": 1e-3,
            "images_per_s": 10.0, "time": 0.0, **extra}  # fmt: skip


def eval_row(step):
    return {"kind": "eval", "phase": "train", "epoch": 1, "step": step, "accuracy": 0.5, "loss": 1.0, "images": 8}


def test_resumed_file_equals_uninterrupted_one(tmp_path):
    rows = [train_row(1), train_row(2), eval_row(2), train_row(3), train_row(4), eval_row(4)]
    with MetricsLog(tmp_path / "whole.jsonl") as log:
        for row in rows:
            log.write(row)
    resumed = tmp_path / "phase" / "resumed.jsonl"  # killed in the middle of the row of step 4, checkpoint at step 2
    with MetricsLog(resumed) as log:
        for row in rows[:4]:
            log.write(row)
    with resumed.open("ab") as file:
        file.write(b'{"kind": "train", "phase": "tr\x00\xff')
    with MetricsLog(resumed, resume_step=2) as log:
        assert read_metrics(resumed) == rows[:3]
        for row in rows[3:]:
            log.write(row)
    assert resumed.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(file.name for file in resumed.parent.iterdir()) == ["events.jsonl", "resumed.jsonl"]
    (event,) = map(json.loads, (resumed.parent / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["step"]) == ("resumed", 2)


def test_start_without_resume_empties_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(eval_row(0))
    MetricsLog(path, resume_step=0).close()
    assert read_metrics(path) == []


def test_cut_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(train_row(1))
        log.write(train_row(2))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.disk.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(path, resume_step=1)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_rows_are_flushed_and_a_half_written_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(train_row(1))
    assert read_metrics(path) == [train_row(1)]  # before close
    log.close()
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    assert read_metrics(path) == [train_row(1)]
    path.write_text(whole.rstrip("\n"))  # only the line end is missing: the row is whole
    assert read_metrics(path) == [train_row(1)]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected one JSON object"):
        read_metrics(path)


def test_non_finite_numbers_become_null_and_are_named(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(train_row(1, loss=math.nan, **{"load/0": [0.5, math.inf], "load/1": [0.5, 0.5]}))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    row = json.loads(text)
    assert row["loss"] is None and row["load/0"] == [0.5, None] and row["load/1"] == [0.5, 0.5]
    assert row["nonfinite"] == ["loss", "load/0"]


def test_peak_memory_is_in_bytes_and_stays_after_a_release():
    code = (
        "from trainer.tracking.metrics import peak_memory; before = peak_memory(); held = b'x' * (64 << 20); del held;"
        "print(peak_memory() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 60 << 20 < int(done.stdout) < 80 << 20


def test_relative_load_is_one_for_uniform():
    assert relative_load([0.25, 0.25, 0.25, 0.25]) == [1.0, 1.0, 1.0, 1.0]
    assert relative_load([6, 2]) == [1.5, 0.5]  # counts do as well as shares; the average expert has 4
    assert relative_load([0.0, 0.0]) == [0.0, 0.0]


SPEED = {"flops_per_s": 3.12e14, "mfu": 0.3155}
LOADED = {"load/0": [0.3, 0.2, 0.25, 0.25], "load/1": [0.33, 0.1775, 0.25, 0.2425], "kept/0": 1.0, "kept/1": 1.0,
          "gate_sum/0": 0.5, "gate_sum/1": 0.62}  # fmt: skip


def clock(monkeypatch, seconds):
    ticks = iter(seconds)
    monkeypatch.setattr("trainer.tracking.metrics.time.monotonic", lambda: next(ticks))


def test_progress_line(monkeypatch):
    # 12 epochs of 136 steps = 1632; step 313 is the 41st of epoch 3. 13 steps took 6.5 s after the first update
    # (step 300): (1632 - 313) * 0.5 s = 659.5 s, rounded 0:11:00. The first 20 s do not count.
    clock(monkeypatch, [0.0, 20.0, 26.5])
    stream = io.StringIO()
    with Progress(1632, 136, "distill 2/4", stream, interval=0.0, start_step=299) as progress:
        progress.update(300, train_row(1))
        progress.update(313, train_row(1, loss=1.2341, lr=1.2e-3, images_per_s=2310.4, **SPEED, **LOADED))
    # load: 4 * 0.1775 = 0.71 and 4 * 0.33 = 1.32; gates: (0.5 + 0.62) / 2
    assert stream.getvalue().splitlines()[1] == (
        "[distill 2/4] epoch 3/12 step 41/136 loss 1.234 lr 1.2e-3 2310 img/s 312 TFLOP/s "
        "(32% of peak) load 0.71-1.32 "
        "kept 100% gates 0.56 eta 0:11:00"
    )


def test_progress_position_at_epoch_borders_and_kept_rounds_down():
    stream = io.StringIO()
    progress = Progress(8, 4, "train", stream, interval=0.0)
    for step in (4, 5, 8):
        progress.update(step, train_row(step, **{"kept/0": 1.0, "kept/1": 0.9998}))
    lines = stream.getvalue().splitlines()
    assert [line.split(" loss")[0] for line in lines] == [
        "[train] epoch 1/2 step 4/4", "[train] epoch 2/2 step 1/4", "[train] epoch 2/2 step 4/4"]  # fmt: skip
    assert all("kept 99.9%" in line and "gates" not in line and "load" not in line for line in lines)
    assert lines[-1].endswith("eta 0:00:00")


def test_log_lines_keep_the_interval_but_never_lose_the_last_step(monkeypatch):
    clock(monkeypatch, itertools.count(0.0, 1.0))  # one second per step
    stream = io.StringIO()
    progress = Progress(12, 12, "train", stream, interval=5.0)
    for step in range(1, 13):
        progress.update(step, train_row(step))
    progress.note("accuracy 50.0%")
    steps = [line.split("step ")[1].split("/")[0] for line in stream.getvalue().splitlines()[:-1]]
    assert steps == ["1", "6", "11", "12"]
    assert stream.getvalue().endswith("[train] accuracy 50.0%\n")


def test_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(10, 5, "train", stream) as progress:
        progress.update(1, train_row(1))
        progress.update(6, train_row(6))
        progress.note("accuracy 50.0%")
    last = stream.getvalue().split("\r")[-1]
    assert "[train]  60%|" in last and "epoch 2/2 step 1/5" in last and "loss 0.167" in last
    assert "[train] accuracy 50.0%\n" in stream.getvalue()
