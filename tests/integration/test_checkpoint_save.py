"""Checkpoints of real engines: saved in the background, read without DeepSpeed, and a rank that dies meanwhile.

The functions without test_ in their name run on the ranks, in forks of one warm python.
"""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.vmoe.model import VMoE
from tests.integration.test_engine import ADAM, MODEL, engine_for, train
from tests.launch import TINY
from trainer.checkpoint import writer
from trainer.checkpoint.files import candidates, complete
from trainer.checkpoint.inspection import export, inspect
from trainer.checkpoint.saver import Saver
from trainer.config.runtime import RunConfig
from trainer.distributed.ranks import start

HERE = "tests.integration.test_checkpoint_save"


def saves_and_goes_on(folder: str) -> None:
    """Save, train on while it is written; then do the same steps from the checkpoint."""
    dist = start()
    for at in ({"ep": 2, "zero": 1}, {"ep": 1, "zero": 2, "bf16": {"enabled": True}}):
        place = Path(folder) / f"ep{at['ep']}"
        place.mkdir(exist_ok=True)
        with engine_for(dist, MODEL, ADAM, **at) as engine:
            saver = Saver(engine, place, RunConfig(), dist)
            assert saver.resume() is None
            train(engine, dist)
            saved = {name: value.clone() for name, value in engine.fp32_state().items()}  # which are views
            saver.save(5, state={"a": 0.1}, own={"rank": dist.rank})
            train(engine, dist)
            saver.close()
            end = {name: value.clone() for name, value in engine.fp32_state().items()}
        with engine_for(dist, MODEL, ADAM, **at) as engine:
            found = Saver(engine, place, RunConfig(), dist).resume()
            assert (found.step, found.state, found.own) == (5, {"a": 0.1}, [{"rank": 0}, {"rank": 1}])
            assert_equal(engine.fp32_state(), saved)
            train(engine, dist)
            assert_equal(engine.fp32_state(), end)
        if dist.main:
            save_file(saved, place / "saved.safetensors")


def assert_equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def test_saved_in_the_background_and_read_without_deepspeed(warm, tmp_path):
    finished = warm.call(f"{HERE}:saves_and_goes_on", str(tmp_path), ranks=2)
    assert finished.code == 0, finished.output
    for name in ("ep1", "ep2"):
        assert "step_00000005: checkpoint, whole" in inspect(tmp_path / name / "checkpoints")
        export(tmp_path / name, tmp_path / name / "model")  # of bf16 too the fp32 masters
        assert_equal(load_file(tmp_path / name / "model/model.safetensors"),
                     load_file(tmp_path / name / "saved.safetensors"))  # fmt: skip


@pytest.mark.parametrize("phase", ["meta", "distill_1", "train"])
def test_export_gives_the_weights_of_the_artifact(chain, tmp_path, phase):
    export(chain[0] / phase, tmp_path)
    assert_equal(load_file(tmp_path / "model.safetensors"), load_file(chain[0] / phase / "model.safetensors"))
    assert (tmp_path / "config.json").exists() == (phase == "train")


def test_export_while_the_phase_is_unfinished(warm, chain, tmp_path):
    """A killed run's newest checkpoint is a model that loads, before the phase has written one itself."""
    out = tmp_path / "out"
    shutil.copytree(chain[0], out, ignore=shutil.ignore_patterns("train", "evaluate"))
    latest = out / "train/checkpoints/latest.json"
    killed = warm.run([*TINY, "--phase", "train", "--out", out], ranks=2, kill_when=latest.exists)
    assert killed.code == -signal.SIGKILL and not (out / "train/model.safetensors").exists()
    export(out / "train", tmp_path / "model")
    model = VMoE.from_pretrained(tmp_path / "model")
    assert model.labels == VMoE.from_pretrained(chain[0] / "train").labels
    assert model(torch.zeros(1, model.config.in_chans, 16, 16)).isfinite().all()


def one_rank_dies(folder: str) -> None:
    """kill -9 of rank 1 before its files of the second save are written; rank 0's are, and it waits for the others."""
    dist = start()
    with engine_for(dist, MODEL, ADAM, ep=2) as engine:
        saver = Saver(engine, Path(folder), RunConfig(), dist)
        train(engine, dist)
        saver.save(5, state={}, own={}, wait=True)
        if dist.rank == 1:
            written_by_0 = Path(folder) / "checkpoints/step_00000006/rank_00000.json"
            writer.write_tensors = lambda *_: _die_after(written_by_0)
        saver.save(6, state={}, own={})
        train(engine, dist)
        saver.close()


def _die_after(path: Path) -> None:
    """kill -9 of this process once a file is there: else the other rank may end before it got as far as meant."""
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def goes_on(folder: str) -> None:
    dist = start()
    with engine_for(dist, MODEL, ADAM, ep=2) as engine:
        saver = Saver(engine, Path(folder), RunConfig(), dist)
        assert saver.resume().step == 5
        saver.save(6, state={}, own={}, wait=True)


def test_a_rank_that_dies_in_a_save_takes_the_other_with_it_and_loses_nothing(warm, tmp_path):
    """Nobody waits for it for ever: not the thread that would commit, and not the end of the process."""
    begun = time.monotonic()
    finished = warm.call(f"{HERE}:one_rank_dies", str(tmp_path), ranks=2, grace=60)
    assert finished.code != 0 and time.monotonic() - begun < 50, finished.output
    root = tmp_path / "checkpoints"
    assert candidates(root) == (["step_00000005"], None)
    assert (root / "step_00000006/rank_00000.json").exists()  # it got as far as meant
    finished = warm.call(f"{HERE}:goes_on", str(tmp_path), ranks=2)
    assert finished.code == 0, finished.output
    assert [path.name for path in complete(root)] == ["step_00000005", "step_00000006"]
