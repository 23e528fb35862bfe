"""One writer per folder: who is told from whom, what is taken over, and that nothing of it is part of a result."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.launch import ROOT
from trainer import writer_lock
from trainer.writer_lock import NAME, STALE, WriterLock, _succession

HOLDS = "import sys, time; from pathlib import Path; from trainer import writer_lock\n"
HOLDS += "writer_lock.hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def other(tmp_path):
    """Another process of this host that writes the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def leave(folder, age=0.0, **changes):
    """A lock file as another process would have left it."""
    path = folder / NAME
    path.write_text(json.dumps(writer_lock._this_process() | changes))
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def test_a_second_writer_is_refused_and_both_are_named(tmp_path, other):
    with pytest.raises(ValueError) as error:
        WriterLock(tmp_path)
    said = str(error.value)
    assert f"pid {other.pid}" in said and f"pid {os.getpid()}" in said
    assert "last sign of life" in said and "another --out" in said and "\n" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME]


def test_a_stopped_writer_of_this_host_is_alive_whatever_its_age(tmp_path, other):
    other.send_signal(signal.SIGSTOP)
    os.utime(tmp_path / NAME, (0, 0))
    with pytest.raises(ValueError, match=f"pid {other.pid}"):
        WriterLock(tmp_path)


def test_a_killed_writer_of_this_host_is_taken_over_at_once(tmp_path, other):
    other.kill()
    other.wait()
    lock = WriterLock(tmp_path)
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_zombie_is_dead(tmp_path, other):
    other.kill()
    deadline = time.monotonic() + 10
    while writer_lock._start_time(other.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    WriterLock(tmp_path).release()


def test_a_pid_that_was_given_to_another_process_is_dead(tmp_path):
    leave(tmp_path, started="1")
    WriterLock(tmp_path).release()


@pytest.fixture
def quick(monkeypatch):
    """Stale after half a second without a sign of life."""
    monkeypatch.setattr(writer_lock, "STALE", 0.5)
    monkeypatch.setattr(writer_lock, "LISTEN", 0.01)


@pytest.mark.parametrize("other_host", [{"host": "elsewhere"}, {"system": "a container of the same name"}])
def test_of_another_host_the_next_sign_of_life_decides(tmp_path, quick, other_host):
    path = leave(tmp_path, pid=1, **other_host)
    threading.Timer(0.1, os.utime, [path]).start()
    with pytest.raises(ValueError, match="pid 1"):
        WriterLock(tmp_path)
    WriterLock(tmp_path).release()  # no other sign came
    leave(tmp_path, age=STALE * 2, pid=1, **other_host)
    WriterLock(tmp_path).release()


def test_a_requeued_job_goes_on_at_once_on_another_host(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", lambda seconds: waited.append(seconds) or os.utime(tmp_path / NAME))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    leave(tmp_path, host="elsewhere", job="77", restarts="1")
    with pytest.raises(ValueError, match="job 77"):  # the same start of the same job: an array or a step of it
        WriterLock(tmp_path)
    leave(tmp_path, host="elsewhere", job="77", restarts="0")
    assert len(waited) == 1
    WriterLock(tmp_path).release()
    assert len(waited) == 1
    leave(tmp_path, host="elsewhere", job="76", restarts="0")
    with pytest.raises(ValueError, match="job 76"):
        WriterLock(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": "x", "token": 5}', "\x00\xff", "[" * 100_000])
def test_a_damaged_lock_counts_by_its_next_sign_of_life(tmp_path, quick, text):
    path = tmp_path / NAME
    path.write_text(text, encoding="latin-1")
    threading.Timer(0.1, os.utime, [path]).start()
    with pytest.raises(ValueError, match="delete"):
        WriterLock(tmp_path)
    assert path.read_text(encoding="latin-1") == text
    WriterLock(tmp_path).release()


def start_many(folder):
    """The locks of those that won of 16 that start at once, and how many were refused."""
    won, lost = [], []

    def start():
        try:
            won.append(WriterLock(folder))
        except ValueError:
            lost.append(1)

    threads = [threading.Thread(target=start) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won, len(lost)


@pytest.mark.parametrize("dead_successor", [False, True])
def test_one_of_many_wins(tmp_path, dead_successor):
    """Also where all of them find a dead one, whose successor died too before it was done."""
    for _ in range(20):
        if dead_successor:
            leave(tmp_path, started="1", token="second").rename(_succession(tmp_path / NAME, "first"))
        leave(tmp_path, started="1", token="first")
        won, lost = start_many(tmp_path)
        assert (len(won), lost) == (1, 15)
        won[0].release()
        assert not list(tmp_path.iterdir())


def test_two_that_saw_the_same_dead_one(tmp_path, monkeypatch):
    """One is stopped just before it takes over, while another does so: it must not take that one's lock."""
    leave(tmp_path, started="1")
    real, won = writer_lock._succession, []

    def meanwhile(path, token):
        monkeypatch.setattr(writer_lock, "_succession", real)
        won.append(WriterLock(tmp_path))
        return real(path, token)

    monkeypatch.setattr(writer_lock, "_succession", meanwhile)
    with pytest.raises(ValueError, match="is being written by"):
        WriterLock(tmp_path)
    assert json.loads((tmp_path / NAME).read_text())["token"] == won[0].owner["token"]
    won[0].release()
    assert not list(tmp_path.iterdir())


def test_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    lock = WriterLock(tmp_path)
    leave_to_another = json.loads((tmp_path / NAME).read_text())
    assert leave_to_another["token"] == lock.owner["token"]
    with pytest.raises(ValueError, match="being written"):
        WriterLock(tmp_path)
    lock.release()


def test_the_same_process_may_take_it_again(tmp_path):
    writer_lock.hold(tmp_path)
    writer_lock.hold(tmp_path / "." / "")
    writer_lock.release(tmp_path)
    writer_lock.release(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_sign_of_life_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_lock, "BEAT", 0.01)
    lock = WriterLock(tmp_path)
    os.utime(tmp_path / NAME, (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / NAME).stat().st_mtime < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / NAME).stat().st_mtime > 1
    lock.release()


def test_a_writer_whose_lock_was_taken_over_ends(tmp_path):
    """It was stopped for long, and counts as dead on the other host: two writers would ruin both."""
    code = f"from trainer import writer_lock; writer_lock.BEAT = 0.05\n{HOLDS}"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "held\n"
    leave(tmp_path, host="elsewhere")
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1 and "taken over by" in said and "elsewhere" in said
    assert json.loads((tmp_path / NAME).read_text())["host"] == "elsewhere"


def test_it_is_given_back_at_the_end_of_the_process(tmp_path):
    code = HOLDS.replace("time.sleep(60)", "sys.exit(3)")
    assert subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True).returncode == 3
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError):
        WriterLock(tmp_path / "none")
