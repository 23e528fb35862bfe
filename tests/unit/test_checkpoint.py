"""The Saver: what is saved comes back at any number of ranks; whatever happens to a save, the one before it does."""

import json
import os
import resource
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.checkpoint_ranks import assert_holds, run_ranks, save, saver, without_deepspeed
from trainer import checkpoint_files, checkpoint_writer
from trainer.checkpoint_files import complete, step_of


@pytest.fixture(autouse=True)
def _without_deepspeed(monkeypatch):
    without_deepspeed(monkeypatch)


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return [step_of(path) for path in complete(folder / "checkpoints")]


def resumed_step(folder: Path, world: int = 1) -> int | None:
    """Where a new start goes on; checks that it is in the state of that step."""

    def work(dist):
        made = saver(dist, folder)
        if (found := made.resume()) is None:
            return None
        assert_holds(made, found.step)
        return found.step

    (step,) = set(run_ranks(world, work))
    return step


def save_steps(folder: Path, *numbers: int, world: int = 1, **run) -> None:
    def work(dist):
        made = saver(dist, folder, **run)
        made.resume()
        for number in numbers:
            save(made, number)
        made.close()

    assert run_ranks(world, work) == [None] * world


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
    gate, write = threading.Event(), checkpoint_writer.write_tensors
    monkeypatch.setattr(checkpoint_writer, "write_tensors", lambda *a: gate.wait(20) and write(*a))

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


def fails_on(rank: int, monkeypatch) -> None:
    """From step 2 on the disk of one rank is full."""
    write = checkpoint_writer.write_tensors

    def full(path, *rest):
        if path.name == f"rank_{rank:05d}.safetensors" and path.parent.name > "step_00000001":
            raise OSError(28, "No space left on device")
        return write(path, *rest)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", full)


@pytest.mark.parametrize("how", ["close", "next save", "wait"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_in_the_background_reaches_all_ranks(tmp_path, monkeypatch, rank, how):
    fails_on(rank, monkeypatch)

    def work(dist):
        made = saver(dist, tmp_path)
        save(made, 1)
        save(made, 2) if how != "wait" else None
        if how != "wait":
            made._writing.on_disk.wait(20)
            assert made.failed == (dist.rank == rank)
        with pytest.raises(OSError, match=r"No space left on device; .* bytes needed, .* free") as caught:
            made.close() if how == "close" else save(made, 3, wait=True)
        assert "previous checkpoint is untouched" in str(caught.value)
        assert not made.failed
        made.close()  # nothing is left to say
        return str(caught.value).split(";")[0]

    first, second = run_ranks(2, work)
    assert isinstance(first, str) and first == second
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["latest.json", "step_00000001"]
    assert resumed_step(tmp_path) == 1


def test_ranks_that_do_not_see_one_folder(tmp_path, monkeypatch):
    """As on two nodes without a shared disk: an error that says so, not an endless wait."""
    monkeypatch.setattr(checkpoint_writer, "VISIBLE", 0.05)

    def work(dist):
        made = saver(dist, tmp_path / f"node{dist.rank}")
        made.root.mkdir(parents=True)
        (made.root / "step_00000001").mkdir() if dist.rank else None
        save(made, 1)
        made.close()

    for error in run_ranks(2, work):
        assert isinstance(error, OSError) and "rank_00001.json was written but is not here" in str(error)


def test_room_is_asked_for_to_the_byte(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, world=2)
    needed = sum(path.stat().st_size for path in (tmp_path / "checkpoints/step_00000001").iterdir())
    free = {"bytes": needed - 1}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free["bytes"]))

    def work(dist):
        made = saver(dist, tmp_path)
        made.resume()
        with pytest.raises(OSError, match=f"{needed:,} bytes needed, {needed - 1:,} free"):
            save(made, 2)  # as many digits as step 1, so as many bytes
        dist.gather(None)
        free["bytes"] = needed
        dist.gather(None)
        save(made, 2, wait=True)

    assert run_ranks(2, work) == [None, None]
    assert resumed_step(tmp_path) == 2


def in_a_fork(work) -> int:
    """Exit code of `work` in a process of its own; negative when a signal ended it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        (code,) = run_ranks(1, work)
        code = 1 if isinstance(code, Exception) else code or 0
    finally:
        os._exit(code)


def test_killed_before_every_change_on_disk(tmp_path, monkeypatch):
    """kill -9 before the n-th flush, rename and deletion of a save, n = 1, 2, ... until it comes through."""
    save_steps(tmp_path / "start", 1, 2)
    outcomes = []
    for number in range(1, 30):
        folder = tmp_path / f"killed_{number}"
        shutil.copytree(tmp_path / "start", folder)

        def work(dist, number=number, folder=folder):
            made, calls = saver(dist, folder, keep=1), []
            made.resume()

            def watched(real):
                def call(*args, **options):
                    calls.append(real)
                    if len(calls) == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **options)

                return call

            for owner, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir")):
                setattr(owner, name, watched(getattr(owner, name)))
            save(made, 3)
            made.close()

        code = in_a_fork(work)
        outcomes.append(resumed_step(folder))
        save_steps(folder, 4, keep=1)
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest.json", "step_00000004"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and outcomes == sorted(outcomes) and outcomes.count(2) >= 6 and outcomes.count(3) >= 3


@pytest.mark.parametrize(("name", "short"), [("rank_00000.safetensors", n) for n in (9999, 1000, 500, 1)]
                         + [("manifest.json", n) for n in (100, 1)])  # fmt: skip
def test_disk_full_at_any_byte(tmp_path, name, short):
    """No file may grow beyond so many bytes less than one has: the save says what it needs, the one before it stays."""
    long = {"text": "x" * 2000}  # so that the manifest alone can be too large

    def start(dist):
        made = saver(dist, tmp_path)
        save(made, 1, state=long, wait=True)

    assert run_ranks(1, start) == [None]
    limit = max(0, (tmp_path / "checkpoints/step_00000001" / name).stat().st_size - short)

    def work(dist):
        made = saver(dist, tmp_path)
        made.resume()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError, match=r"bytes needed, .* free"):
            save(made, 2, state=long, wait=True)
        return 5

    assert in_a_fork(work) == 5
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest.json", "step_00000001"]
    assert resumed_step(tmp_path) == 1


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
    read = checkpoint_files.Reader.read
    monkeypatch.setattr(checkpoint_files.Reader, "read", lambda self, *where: read(self, *where).roll(1))
    (error,) = run_ranks(1, lambda dist: resumed_step(tmp_path))
    assert isinstance(error, AssertionError | ValueError)
