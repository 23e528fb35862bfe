"""A run killed (kill -9) anywhere and started again ends with the same weights, bit for bit, and the same metrics."""

import hashlib
import json
import shutil
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.launch import TINY, started
from trainer.tracking.metrics import read_metrics

PHASES = ("teacher", "meta", "distill_0", "distill_1", "train")
TIMING = ("time", "images_per_s", "tokens_per_s", "flops_per_s", "mfu", "memory")


def latest(phase: Path) -> str:
    """The committed checkpoint of a phase, "" when there is none."""
    path = phase / "checkpoints/latest.json"
    return json.loads(path.read_text())["tag"] if path.exists() else ""


def saved(phase: Path) -> bool:
    """A checkpoint in the middle of the first epoch is in force."""
    return latest(phase) == "step_00000003"


def saving(phase: Path) -> bool:
    """A checkpoint is in force and the folder of the next one is there."""
    tag = latest(phase)
    return bool(tag) and any(path.name > tag for path in phase.glob("checkpoints/step_*"))


def trained(phase: Path) -> bool:
    """The last checkpoint is in force; the artifact is not written yet."""
    return latest(phase) == "step_00000012"


def done(phase: Path) -> bool:
    """The artifact is complete: what follows is the next phase."""
    return (phase / "result.json").exists()


KILLS = [("teacher", saved), ("meta", saving), ("meta", done), ("distill_0", saved), ("distill_1", trained),
         ("train", saved), ("train", saving)]  # fmt: skip


def assert_same_run(out: Path, undisturbed: Path) -> None:
    for phase in PHASES:
        here, there = ((folder / phase / "model.safetensors").read_bytes() for folder in (out, undisturbed))
        assert hashlib.sha256(here).digest() == hashlib.sha256(there).digest(), f"weights of {phase} differ"
        rows, expected = (
            [{key: value for key, value in row.items() if key not in TIMING} for row in read_metrics(path)]
            for path in (out / phase / "metrics.jsonl", undisturbed / phase / "metrics.jsonl")
        )
        assert rows == expected, f"metrics of {phase}"
        results = [json.loads((folder / phase / "result.json").read_text()) for folder in (out, undisturbed)]
        for key in ("metrics", "steps", "epochs", "images_seen", "flops", "global_batch"):
            assert results[0][key] == results[1][key], f"{key} in result.json of {phase}"


def test_killed_at_any_point(warm, chain, tmp_path):
    out = tmp_path / "out"
    command = [*TINY, "--phase", "all", "--out", out, "train.baselines=[]"]
    for phase, reached in KILLS:
        killed = warm.run(command, ranks=2, kill_when=lambda: reached(out / phase))  # noqa: B023  called at once
        assert killed.code == -9
        # what the kill was meant to hit is what the next start finds; a save takes milliseconds and may come through
        assert reached(out / phase) or reached is saving, f"{phase} moved on before the kill"
        assert done(out / phase) == (reached is done)
    finished = warm.run(command, ranks=2)
    assert finished.code == 0, finished.output
    assert "[train] resumed after step" in finished.output
    assert_same_run(out, chain[0])

    again = warm.run(command, ranks=2)  # a finished run started again does no training
    assert again.code == 0 and "epoch 1/2" not in again.output
    assert_same_run(out, chain[0])
    assert not list(out.rglob("*.tmp"))


def test_killed_under_the_launcher(warm, chain, tmp_path):
    """One rank alone dies in distill: the launcher ends the other, and the same command goes on."""
    out = tmp_path / "out"
    for phase in ("teacher", "meta", "distill_0"):
        shutil.copytree(chain[0] / phase, out / phase)
    command = [*TINY, "--phase", "all", "--out", out, "train.baselines=[]"]
    with started("deepspeed", 2, command) as job:
        while not saved(out / "distill_1"):
            assert job.process.poll() is None, job.log.read_text()
            time.sleep(0.02)
        (launcher,) = psutil.Process(job.process.pid).children()
        (one,) = [rank for rank in launcher.children() if "--local_rank=1" in rank.cmdline()]
        one.kill()
        assert job.wait(60).code != 0
    assert not done(out / "distill_1")

    finished = warm.run(command, ranks=2)
    assert finished.code == 0, finished.output
    assert "[distill 2/2] resumed after step" in finished.output
    assert_same_run(out, chain[0])


def test_another_number_of_ranks_goes_on(warm, chain, tmp_path):
    """Two ranks with two experts each saved it, one rank goes on with the same micro-batches: the same to rounding."""
    out = tmp_path / "out"
    shutil.copytree(chain[0], out)
    root = out / "train/checkpoints"
    shutil.rmtree(root / "step_00000012")
    (root / "latest.json").write_text('{"tag": "step_00000009"}')
    for name in ("result.json", "model.safetensors"):
        (out / "train" / name).unlink()
    batch = ["ds.train_micro_batch_size_per_gpu=8", "ds.gradient_accumulation_steps=2"]
    finished = warm.run([*TINY, "--phase", "train", "--out", out, *batch])
    assert finished.code == 0 and "[train] resumed after step 9" in finished.output, finished.output
    weights, expected = (load_file(folder / "train/model.safetensors") for folder in (out, chain[0]))
    start = load_file(out / "distill_0/model.safetensors")["stage.blocks.0.attn.qkv.weight"]
    assert (expected["blocks.0.attn.qkv.weight"] - start).abs().max() > 1e-3  # training moves the weights by far more
    for name, value in expected.items():
        assert_close(weights[name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    rows, wanted = ([row for row in read_metrics(folder / "train/metrics.jsonl") if row["step"] == 12]
                    for folder in (out, chain[0]))  # fmt: skip
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in wanted], abs=1e-5)


@pytest.mark.parametrize("phase", PHASES)
def test_the_chain_saves_between_metric_rows(chain, phase):
    """Guards the test above: a row must span a checkpoint, or lost running sums would not show."""
    rows = [row["step"] for row in read_metrics(chain[0] / phase / "metrics.jsonl") if row["kind"] == "train"]
    assert rows == [4, 6, 8, 12]
