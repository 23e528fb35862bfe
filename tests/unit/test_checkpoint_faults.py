"""Whatever happens to a save, a full disk or a kill at any point: it is said plainly, the one before it comes back."""

import os
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest

from tests.unit.checkpoint_ranks import resumed_step, run_ranks, save, save_steps, saver, without_deepspeed
from trainer.checkpoint import writer
from trainer.checkpoint.files import read_manifest


@pytest.fixture(autouse=True)
def _without_deepspeed(monkeypatch):
    without_deepspeed(monkeypatch)


def fails_on(rank: int, monkeypatch) -> None:
    """From step 2 on the disk of one rank is full."""
    write = writer.write_tensors

    def full(path, *rest):
        if path.name == f"rank_{rank:05d}.safetensors" and path.parent.name > "step_00000001":
            raise OSError(28, "No space left on device")
        return write(path, *rest)

    monkeypatch.setattr(writer, "write_tensors", full)


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
    monkeypatch.setattr(writer, "VISIBLE", 0.05)

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


def test_every_file_is_flushed_whole_before_the_manifest_names_it(tmp_path, monkeypatch):
    """A manifest that survives a power cut while a shard does not is a checkpoint that cannot be read."""
    events = []  # (what, file, its bytes then), in order
    fsync = os.fsync
    replace = os.replace

    def watched_fsync(handle):
        fsync(handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        events.append(("flushed", os.path.basename(path), os.fstat(handle).st_size))

    def watched_replace(source, target):
        replace(source, target)
        events.append(("renamed", os.path.basename(target), os.path.getsize(target)))

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)

    def work(dist):
        made = saver(dist, tmp_path)
        save(made, 1)
        made.close()

    assert run_ranks(2, work) == [None, None]
    folder = tmp_path / "checkpoints/step_00000001"
    named = sorted(read_manifest(folder)["files"])
    assert named == [f"rank_0000{rank}.{kind}" for rank in range(2) for kind in ("json", "safetensors")]
    manifest = events.index(("renamed", "manifest.json", (folder / "manifest.json").stat().st_size))
    for name in named:
        size = (folder / name).stat().st_size
        # small files are written, flushed and renamed; shards are written and flushed under their own name
        flushed_as = f"{name}.tmp" if name.endswith(".json") else name
        assert ("flushed", flushed_as, size) in events[:manifest], f"{name} may be lost"
