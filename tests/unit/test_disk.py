"""Files that appear whole or not at all, and locks between processes."""

import logging
import subprocess
import sys
import threading
import time

import pytest

from trainer.disk import lock, move_into_place, replacing, write_text


def test_a_replaced_file_is_the_old_one_until_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with replacing(path) as unfinished:
        assert unfinished == tmp_path / "a.txt.tmp"
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_after_an_error_the_old_file_stands(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="disk full"), replacing(path) as unfinished:
        unfinished.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old"


def test_a_whole_folder_takes_its_name_once(tmp_path):
    folders = [tmp_path / "a.part", tmp_path / "b.part"]
    for folder in folders:
        folder.mkdir()
        (folder / "last").write_text(folder.name)
    target = tmp_path / "made"
    assert move_into_place(folders[0], target, "last")
    assert not move_into_place(folders[1], target, "last")
    assert (target / "last").read_text() == "a.part"
    assert folders[1].is_dir()


def test_a_folder_that_is_not_whole_is_in_the_way(tmp_path):
    for name in ("a.part", "made"):
        (tmp_path / name).mkdir()
    (tmp_path / "made/first").touch()
    with pytest.raises(OSError, match="not empty"):
        move_into_place(tmp_path / "a.part", tmp_path / "made", "last")


def test_a_lock_is_held_by_one_until_it_is_closed(tmp_path):
    with lock(tmp_path / "lock", "busy"), pytest.raises(ValueError, match=r"^another is at it$"):
        lock(tmp_path / "lock", "another is at it")
    lock(tmp_path / "lock", "busy").close()


def test_a_child_that_has_inherited_the_lock_holds_it_too(tmp_path):
    held = lock(tmp_path / "lock", "busy")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(held.fileno(),))
    held.close()
    with pytest.raises(ValueError, match="busy"):
        lock(tmp_path / "lock", "busy")
    child.communicate(b"\n")
    lock(tmp_path / "lock", "busy").close()


def test_waiting_for_a_lock_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    held = lock(tmp_path / "lock", "busy")
    ended = threading.Event()

    def wait() -> None:
        with lock(tmp_path / "lock", "waiting for another", wait=True):
            ended.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    while "waiting for another" not in caplog.text:
        time.sleep(0.01)
    assert not ended.is_set()
    held.close()
    waiter.join(30)
    assert ended.is_set()
