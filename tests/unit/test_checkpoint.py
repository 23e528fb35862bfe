"""The Saver: what is saved comes back at any number of ranks, whole or not at all, and the right ones are kept."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from tests.unit.checkpoint_ranks import (
    assert_holds,
    resumed_step,
    run_ranks,
    save,
    save_steps,
    saver,
    steps,
    without_deepspeed,
)
from trainer.checkpoint import files, writer


@pytest.fixture(autouse=True)
def _without_deepspeed(monkeypatch):
    without_deepspeed(monkeypatch)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("then", [1, 2, 4])
def test_comes_back_at_any_number_of_ranks(tmp_path, world, then):
    save_steps(tmp_path, 5, 7, world=world)

    def work(dist):
        made = saver(dist, tmp_path)
        found = made.resume()
        assert_holds(made, 7)
        return found

    for found in run_ranks(then, work):
        assert found.step == 7 and found.state == {"seconds": 7 / 3}  # not a digit is lost
        assert found.own == [{"count": 70 + rank} for rank in range(world)]
        assert found.topology["world"] == world and found.topology["global_batch"] == 8


def test_nothing_to_resume(tmp_path):
    assert resumed_step(tmp_path) is None
    (tmp_path / "checkpoints/step_00000003").mkdir(parents=True)  # the very first save was killed
    assert resumed_step(tmp_path) is None


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    """The write is held up: save() returns all the same, and what training changes then is not in the checkpoint."""
    gate, write = threading.Event(), writer.write_tensors
    monkeypatch.setattr(writer, "write_tensors", lambda *a: gate.wait(20) and write(*a))

    def work(dist):
        made = saver(dist, tmp_path)
        save(made, 1)
        for _, values in made.engine.deepspeed.values.values():
            values.zero_()
        assert steps(tmp_path) == [] and not made.failed
        dist.gather(None)
        gate.set()
        save(made, 2)  # waits for the first
        assert steps(tmp_path)[0] == 1
        shared = made._staging.buffer.data_ptr()
        save(made, 3, wait=True)
        assert steps(tmp_path)[-1] == 3 and json.loads((tmp_path / "checkpoints/latest.json").read_text())
        assert made._staging.buffer.data_ptr() == shared
        made.close()
        assert made._staging.buffer.numel() == 0

    assert run_ranks(2, work) == [None, None]
    assert steps(tmp_path) == [2, 3]
    shutil.rmtree(tmp_path / "checkpoints/step_00000003")
    (tmp_path / "checkpoints/latest.json").write_text('{"tag": "step_00000002"}')
    assert resumed_step(tmp_path) == 2


def test_the_state_of_the_moment_is_saved(tmp_path):
    def work(dist):
        made = saver(dist, tmp_path)
        save(made, 1)
        for _, values in made.engine.deepspeed.values.values():
            values.zero_()
        made.close()

    assert run_ranks(2, work) == [None, None]
    assert resumed_step(tmp_path) == 1


def test_a_step_is_saved_once(tmp_path):
    """Saving again what is in force would take it away while it is written anew."""

    def work(dist):
        made = saver(dist, tmp_path)
        save(made, 1, wait=True)
        before = made.root.joinpath("step_00000001/rank_00000.safetensors").stat()
        save(made, 1, wait=True)
        assert made.root.joinpath("step_00000001/rank_00000.safetensors").stat() == before

    assert run_ranks(2, work) == [None, None]


def test_what_is_kept(tmp_path):
    def work(dist):
        made = saver(dist, tmp_path, keep=1, keep_best=True, keep_every=4)
        for step, score in ((1, None), (2, 0.5), (3, 0.7), (4, 0.6), (5, 0.7), (6, 0.1)):
            save(made, step, score=score)
        made.close()

    assert run_ranks(2, work) == [None, None]
    assert steps(tmp_path) == [3, 4, 6]
    latest = json.loads((tmp_path / "checkpoints/latest.json").read_text())
    assert latest == {"tag": "step_00000006", "best": "step_00000003"}


def test_what_somebody_went_back_from_is_replaced(tmp_path):
    """3, 6, 9 saved, 6 put in force by hand: 9 is of another past, and 7 must not be deleted as the oldest of two."""
    save_steps(tmp_path, 3, 6, 9, keep=3)
    root = tmp_path / "checkpoints"
    (root / "latest.json").write_text('{"tag": "step_00000006"}')
    (root / "step_00000001").mkdir()  # left by a killed save
    save_steps(tmp_path, 7, keep=2)
    assert steps(tmp_path) == [6, 7] and len(list(root.iterdir())) == 3
    assert resumed_step(tmp_path) == 7


def harm(path: Path, how: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    if how == "missing":
        path.unlink()
    else:
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes(flipped if how == "a bit flipped" else data[:middle] if how == "truncated" else b"")


@pytest.mark.parametrize("how", ["missing", "a bit flipped", "truncated", "empty"])
@pytest.mark.parametrize(
    "name", ["rank_00000.safetensors", "rank_00001.safetensors", "rank_00001.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog, name, how):
    save_steps(tmp_path, 3, 6, 9, world=2, keep=3)
    root = tmp_path / "checkpoints"
    harm(root / "step_00000009" / name, how)
    assert resumed_step(tmp_path, world=2) == 6
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"DAMAGED: {root / 'step_00000009' / name}" in line and f"GOING ON FROM {root / 'step_00000006'}" in line

    harm(root / "step_00000006/rank_00000.safetensors", "truncated")
    assert resumed_step(tmp_path, world=3) == 3
    save_steps(tmp_path, 4, world=2, keep=2)  # the damaged ones count no longer
    assert steps(tmp_path) == [3, 4] and len(list(root.iterdir())) == 3


@pytest.mark.parametrize(("text", "step"), [("", 9), ('{"tag": "step_00000008"}', 6), ('{"tag": "../x"}', 9)])
def test_a_damaged_latest(tmp_path, caplog, text, step):
    save_steps(tmp_path, 3, 6, 9, keep=3)
    (tmp_path / "checkpoints/latest.json").write_text(text)
    assert resumed_step(tmp_path) == step
    assert len(caplog.records) == 1


def test_all_damaged(tmp_path):
    save_steps(tmp_path, 3, 6)
    for step in (3, 6):
        harm(tmp_path / f"checkpoints/step_{step:08d}/rank_00000.safetensors", "a bit flipped")
    root = tmp_path / "checkpoints"
    for error in run_ranks(2, lambda dist: saver(dist, tmp_path).resume()):
        assert isinstance(error, ValueError)
        for text in (f"{root / 'step_00000003'}", f"{root / 'step_00000006'}", f"delete {root}"):
            assert text in str(error)
    assert steps(tmp_path) == [3, 6]


def test_a_checkpoint_of_another_model(tmp_path):
    save_steps(tmp_path, 3)

    def work(dist):
        made = saver(dist, tmp_path)
        shapes = {"head.weight": (12,), "scale": (), "steps": (2,), "tail": (1,)}
        made.engine.deepspeed.shapes = shapes
        made.resume()

    for error in run_ranks(2, work):
        assert isinstance(error, ValueError)
        for text in ("head.weight: (4, 3) there, (12,) in the model", "tail: missing there, (1,) in the model",
                     "experts.1.fc1.bias: (5,) there, missing in the model"):  # fmt: skip
            assert text in str(error)


def test_another_global_batch(tmp_path):
    save_steps(tmp_path, 3, world=2)
    (error,) = run_ranks(1, lambda dist: saver(dist, tmp_path, batch=12).resume())
    assert isinstance(error, ValueError)
    for text in ("global batch of 8 images", "12 x accumulation 1 x 1 ranks", '"train_batch_size" to 8',
                 '"train_micro_batch_size_per_gpu" and "gradient_accumulation_steps"'):  # fmt: skip
        assert text in str(error)


def test_the_tests_see_a_wrong_state(tmp_path, monkeypatch):
    """Guards the tests above: a reader that is off by one element is noticed."""
    save_steps(tmp_path, 3)
    read = files.Reader.read
    monkeypatch.setattr(files.Reader, "read", lambda self, *where: read(self, *where).roll(1))
    (error,) = run_ranks(1, lambda dist: resumed_step(tmp_path))
    assert isinstance(error, AssertionError | ValueError)
