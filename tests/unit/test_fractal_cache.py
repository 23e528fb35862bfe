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
from trainer.config.data import DataConfig, FractalConfig, TextureConfig
from trainer.data import procedural
from trainer.data.drawing import part as drawing_part
from trainer.data.drawing.common import TRAIN, VAL, colours
from trainer.data.drawing.fractals import draw_images
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


def test_a_share_of_the_training_images_takes_the_place_of_the_validation_images(config):
    """As a study wants it that chooses learning rates: the validation images stay unseen."""
    whole = opened(config())
    train, val = opened(config(), val_share=0.34), opened(config(), "val", val_share=0.34)
    assert np.bincount(val.targets).tolist() == [2] * 4 and np.bincount(train.targets).tolist() == [4] * 4
    assert sorted([*train.rows, *val.rows]) == whole.rows.tolist()
    assert (pixels(val)[0] == pixels(whole)[val.rows[0]]).all() and val.held_out == 0.34


def test_families_have_folders_and_class_names_of_their_own(config):
    textures = TextureConfig(4, 16, 24, 12, cache=config().cache)
    data = DataConfig(source="textures", textures=textures, fractals=config())
    train, val = open_source(data, "train"), open_source(data, "val")
    assert train.labels == val.labels == ["texture 000", "texture 001", "texture 002", "texture 003"]
    opened(config())
    folders = [procedural.cached(one, "train").name for one in (config(), textures)]
    assert [name.partition("-")[0] for name in folders] == ["fractals", "textures"] and set(folders) <= names(config())


def test_the_source_serves_what_is_drawn(config):
    images, palettes = draw_images(0, VAL, 2, range(3), 16, 0.5)
    expected = [colours(palette)[image] for image, palette in zip(images, palettes, strict=True)]
    assert (pixels(opened(config(), "val"))[6:9] == expected).all()


@pytest.mark.parametrize("cores", [1, 3])
def test_any_number_of_processes_makes_the_same_files(config, tmp_path, monkeypatch, cores):
    expected = (procedural.cached(config(), "train") / "record.json").read_text()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert (procedural.cached(config(cache=str(tmp_path / "other")), "train") / "record.json").read_text() == expected


def test_more_images_keep_the_ones_there_were(config):
    few, more = pixels(opened(config())), pixels(opened(config(train_images=32)))
    assert (few.reshape(4, 6, -1) == more.reshape(4, 8, -1)[:, :6]).all()


def test_images_are_made_once_and_the_log_tells_how_far(config, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        opened(config())
    assert f"making 24 fractals (train) in {config().cache}" in caplog.text
    assert "fractals: 100% after" in caplog.text
    monkeypatch.setattr(procedural, "_make", None)
    assert opened(config()).origin == f"procedural fractals, {procedural.cached(config(), 'train').name}"


def test_the_cache_is_where_the_environment_says(config, tmp_path, monkeypatch):
    monkeypatch.setenv("M2MKD_CACHE", str(tmp_path / "shared"))
    assert procedural.cached(config(cache=""), "val").parent == tmp_path / "shared"


def test_a_killed_generator_leaves_nothing_that_stands_in_the_way(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(procedural, "_sealed", lambda path: time.sleep(60))  # all drawn, lock held, not yet renamed
        maker = fork.Process(target=procedural.cached, args=(config(), "train"))
        maker.start()
        deadline = time.monotonic() + 30
        while not list(Path(config().cache).glob("*.part/labels.npy")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        maker.kill()
        maker.join()
    assert len(opened(config())) == 24
    assert names(config()) == {procedural.cached(config(), "train").name}


def test_a_drawing_process_ends_soon_after_its_maker_was_killed(config, tmp_path):
    values = procedural._parameters(config(train_images=80_000, size=64), "train")  # 60 s of work

    def make(pipe) -> None:
        procedural._reserve(tmp_path, "fractals", values)
        pipe.send(procedural._started(tmp_path, "fractals", TRAIN, (0, 4), values | {"per_class": 300}).pid)
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
    make = procedural._make

    def counted(*arguments) -> None:
        with (tmp_path / "made").open("a") as file:
            file.write("x")
        make(*arguments)

    monkeypatch.setattr(procedural, "_make", counted)
    if not locks:
        monkeypatch.setattr(disk.fcntl, "flock", refusing(errno.ENOLCK))
    makers = [fork.Process(target=procedural.cached, args=(config(), "train")) for _ in range(3)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert [maker.exitcode for maker in makers] == [0, 0, 0]
    assert names(config()) == {procedural.cached(config(), "train").name}
    if locks:
        assert (tmp_path / "made").read_text() == "x"


def test_a_file_that_was_cut_is_made_anew(config, caplog):
    before = pixels(opened(config()))
    folder = procedural.cached(config(), "train")
    os.truncate(folder / "images.npy", 1000)
    assert (pixels(opened(config())) == before).all()
    assert f"{folder} is damaged" in caplog.text


@pytest.mark.parametrize("text", ["", "[]"])
def test_a_record_that_is_not_ours_is_made_anew(config, text):
    record = procedural.cached(config(), "train") / "record.json"
    record.write_text(text)
    assert json.loads((procedural.cached(config(), "train") / "record.json").read_text())["parameters"]["classes"] == 4


# errors


def refusing(number: int):
    def refuse(*_arguments) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_too_little_room_is_told_before_anything_is_drawn(config, monkeypatch):
    monkeypatch.setattr(procedural.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
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
    monkeypatch.setattr(drawing_part, "__file__", str(tmp_path / "broken.py"))
    with pytest.raises(OSError, match=message):
        opened(config())
    assert not names(config())
