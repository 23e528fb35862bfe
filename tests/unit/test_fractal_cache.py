"""Source fractals, the cache: stratified splits, and one complete folder after kills, races, damage and full disks."""

import errno
import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from trainer import disk
from trainer.config.data import DataConfig, FractalConfig
from trainer.data import fractal_images, fractals
from trainer.data.fractal_images import TRAIN, VAL, draw_images
from trainer.data.sources import open_source

fork = multiprocessing.get_context("fork")


@pytest.fixture
def config(tmp_path):
    """Four classes with six training and three validation images each, 16 pixels."""

    def build(**more) -> FractalConfig:
        sizes = {"classes": 4, "size": 16, "train_images": 24, "val_images": 12, "cache": str(tmp_path / "cache")}
        return FractalConfig(**(sizes | more))

    return build


def opened(config: FractalConfig, split: str = "train", **more):
    return open_source(DataConfig(source="fractals", fractals=config, **more), split)


def pixels(source) -> np.ndarray:
    return np.stack([np.asarray(source.image(index)) for index in range(len(source))])


def names(config: FractalConfig) -> set[str]:
    """What lies in the cache, without the locks."""
    return {path.name for path in Path(config.cache).iterdir() if path.suffix != ".lock"}


def test_classes_of_another_seed_have_other_names(config):
    """A teacher of one set would else be taken to know the classes of the other."""
    labels = opened(config(seed=3)).labels
    assert labels[0] == "fractal of seed 3, 000" and not set(labels) & set(opened(config()).labels)


def test_splits_are_stratified_and_a_limit_keeps_them_so(config):
    train, val = opened(config()), opened(config(), "val")
    assert (len(train), len(val)) == (24, 12)
    assert train.labels == val.labels == ["fractal 000", "fractal 001", "fractal 002", "fractal 003"]
    assert np.bincount(train.targets).tolist() == [6] * 4
    assert np.bincount(val.targets).tolist() == [3] * 4
    assert np.bincount(opened(config(), limit=8).targets).tolist() == [2] * 4
    image = train.image(0)
    assert (image.mode, image.size) == ("RGB", (16, 16))


def test_the_source_serves_what_is_drawn(config):
    images, palettes = draw_images(0, VAL, 2, range(3), 16, 0.5)
    expected = [fractal_images.colours(palette)[image] for image, palette in zip(images, palettes, strict=True)]
    assert (pixels(opened(config(), "val"))[6:9] == expected).all()


@pytest.mark.parametrize("cores", [1, 3])
def test_any_number_of_processes_makes_the_same_files(config, tmp_path, monkeypatch, cores):
    expected = (fractals.cached(config(), "train") / "record.json").read_text()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert (fractals.cached(config(cache=str(tmp_path / "other")), "train") / "record.json").read_text() == expected


def test_more_images_keep_the_ones_there_were(config):
    few, more = pixels(opened(config())), pixels(opened(config(train_images=32)))
    assert (few.reshape(4, 6, -1) == more.reshape(4, 8, -1)[:, :6]).all()


def test_images_are_made_once_and_the_log_tells_how_far(config, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        opened(config())
    assert f"making 24 fractals (train) in {config().cache}" in caplog.text
    assert "fractals: 100% after" in caplog.text
    monkeypatch.setattr(fractals, "_make", None)
    assert opened(config()).origin == f"procedural fractals, {fractals.cached(config(), 'train').name}"


def test_the_cache_is_where_the_environment_says(config, tmp_path, monkeypatch):
    monkeypatch.setenv("M2MKD_CACHE", str(tmp_path / "shared"))
    assert fractals.cached(config(cache=""), "val").parent == tmp_path / "shared"


def test_a_killed_generator_leaves_nothing_that_stands_in_the_way(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fractals, "_sealed", lambda path: time.sleep(60))  # all drawn, lock held, not yet renamed
        maker = fork.Process(target=fractals.cached, args=(config(), "train"))
        maker.start()
        deadline = time.monotonic() + 30
        while not list(Path(config().cache).glob("*.part/labels.npy")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        maker.kill()
        maker.join()
    assert len(opened(config())) == 24
    assert names(config()) == {fractals.cached(config(), "train").name}


def test_a_drawing_process_ends_soon_after_its_maker_was_killed(config, tmp_path):
    values = fractals._parameters(config(train_images=80_000, size=64), "train")  # 60 s of work

    def make(pipe) -> None:
        fractals._reserve(tmp_path, values)
        pipe.send(fractals._started(tmp_path, TRAIN, (0, 4), values | {"per_class": 300}).pid)
        os.kill(os.getpid(), signal.SIGKILL)

    ours, theirs = fork.Pipe()
    maker = fork.Process(target=make, args=(theirs,))
    maker.start()
    drawing, deadline = ours.recv(), time.monotonic() + 20
    maker.join()
    while _alive(drawing):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not np.load(tmp_path / "images.npy", mmap_mode="r")[900].any(), "the last class was never reached"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("locks", [True, False])
def test_several_processes_at_once_end_with_one_complete_folder(config, tmp_path, monkeypatch, locks):
    make = fractals._make

    def counted(*arguments) -> None:
        with (tmp_path / "made").open("a") as file:
            file.write("x")
        make(*arguments)

    monkeypatch.setattr(fractals, "_make", counted)
    if not locks:
        monkeypatch.setattr(disk.fcntl, "flock", refusing(errno.ENOLCK))
    makers = [fork.Process(target=fractals.cached, args=(config(), "train")) for _ in range(3)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert [maker.exitcode for maker in makers] == [0, 0, 0]
    assert names(config()) == {fractals.cached(config(), "train").name}
    if locks:
        assert (tmp_path / "made").read_text() == "x"


def test_a_file_that_was_cut_is_made_anew(config, caplog):
    before = pixels(opened(config()))
    folder = fractals.cached(config(), "train")
    os.truncate(folder / "images.npy", 1000)
    assert (pixels(opened(config())) == before).all()
    assert f"{folder} is damaged" in caplog.text


@pytest.mark.parametrize("text", ["", "[]"])
def test_a_record_that_is_not_ours_is_made_anew(config, text):
    record = fractals.cached(config(), "train") / "record.json"
    record.write_text(text)
    assert json.loads((fractals.cached(config(), "train") / "record.json").read_text())["parameters"]["classes"] == 4


# errors


def refusing(number: int):
    def refuse(*_arguments) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_too_little_room_is_told_before_anything_is_drawn(config, monkeypatch):
    monkeypatch.setattr(fractals.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"need 6,480 bytes in .*cache, where 1,000 are free. .*data.fractals.cache"):
        opened(config())  # 24 images of 16 x 16 + 6 + 8 bytes
    assert not names(config())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_or_quota_that_fills_up_is_told_with_the_bytes(config, monkeypatch, number):
    monkeypatch.setattr(os, "posix_fallocate", refusing(number))
    with pytest.raises(OSError, match="the fractals need 6,480 bytes"):
        opened(config())
    assert not names(config())


def test_a_cache_that_is_a_file_is_told(config, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(OSError, match=r"cannot be kept in .*cache: .*data.fractals.cache or the variable M2MKD_CACHE"):
        opened(config())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no numpy here')", "ended with exit code 1: no numpy here"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9 .*start the same command again"),
    ],
)
def test_a_drawing_process_that_fails_is_told_and_leaves_nothing(config, tmp_path, monkeypatch, code, message):
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.setattr(fractal_images, "__file__", str(tmp_path / "broken.py"))
    with pytest.raises(OSError, match=message):
        opened(config())
    assert not names(config())
