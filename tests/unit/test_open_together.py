"""Ranks open their images together: one of them walks through the folders, the others are told what it found."""

import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe
from trainer.context import Run
from trainer.distributed.ranks import AgreedValueError, Dist

ROOT = Path(__file__).resolve().parents[2]
WORDS: list[bytes] = []


class Told(Dist):
    """A rank of two that runs alone: rank 0 leaves in WORDS what it shares, and the other finds it there."""

    def gather(self, value):
        return [value]

    def share(self, value):
        if self.main:
            WORDS.append(pickle.dumps(value))
        return pickle.loads(WORDS[-1])


def run_of(rank, pictures, tmp_path):
    words = ["data.source=folder", f"data.path={pictures}"]
    recipe = load_recipe(ROOT / "tests/fixtures/slurm_tiny.yaml", words)
    dist = Told(rank, 2, rank, 2, torch.device("cpu"))
    return Run(recipe, read_ds_config(ROOT / "ds_configs/cpu_debug.json"), tmp_path / "out", dist, "a test")


@pytest.fixture
def pictures(tmp_path):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def listed(monkeypatch):
    """Every folder that is listed."""
    names = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": names.append(str(path)) or real(path))
    return names


def follow(run, monkeypatch):
    """Open on rank 1: on_main has nothing to do there."""
    monkeypatch.setattr("trainer.context.on_main", lambda dist, work: None)
    run.open_together()
    return run.sources


def test_the_other_ranks_list_no_folder(pictures, tmp_path, listed, monkeypatch):
    first = run_of(0, pictures, tmp_path)
    first.open_together()
    assert any(name.endswith("train/cat") for name in listed)
    listed.clear()
    second = follow(run_of(1, pictures, tmp_path), monkeypatch)
    assert listed == []
    for here, there in zip(second, first.sources):
        assert [here.name_of(row) for row in here.rows] == [there.name_of(row) for row in there.rows]
        assert here.targets.tolist() == there.targets.tolist() and here.labels == there.labels
        assert (here.name, here.origin, here.counts.tolist()) == (there.name, there.origin, there.counts.tolist())
        assert here.image(0).size == (8, 8)


def test_the_other_ranks_read_no_header_of_a_tar(pictures, tmp_path, listed, monkeypatch):
    monkeypatch.setenv("M2MKD_CACHE", str(tmp_path / "cache"))
    shards = tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "val"):
        with tarfile.open(shards / f"{split}.tar", "w") as tar:
            for file in sorted((pictures / split).rglob("*.png")):
                name = str(file.relative_to(pictures / split))
                tar.add(file, name)
                (tmp_path / "label").write_text(name.split("/")[0])
                tar.add(tmp_path / "label", name.replace(".png", ".txt"))
    first = run_of(0, shards, tmp_path)
    first.open_together()
    listed.clear()
    monkeypatch.setattr(tarfile, "open", None)
    second = follow(run_of(1, shards, tmp_path), monkeypatch)
    assert listed == []
    for here, there in zip(second, first.sources):
        assert here.targets.tolist() == there.targets.tolist() and here.labels == ["cat", "dog"]
        assert [here.content_of(row, 99) for row in here.rows] == [there.content_of(row, 99) for row in there.rows]


def test_a_disk_of_the_node_is_walked_there(pictures, tmp_path, listed, monkeypatch):
    """data.path=$LOCAL/pictures is another folder on every node."""
    monkeypatch.setenv("PLACE", str(pictures))
    run_of(0, "$PLACE", tmp_path).open_together()
    other = tmp_path / "other"
    pictures.rename(other)
    monkeypatch.setenv("PLACE", str(other))
    listed.clear()
    train, _ = follow(run_of(1, "$PLACE", tmp_path), monkeypatch)
    assert any(name.startswith(str(other)) for name in listed) and train.origin == str(other)


def test_other_kinds_of_data_are_opened_by_every_rank(tmp_path, monkeypatch):
    recipe_run = run_of(0, tmp_path, tmp_path)
    digits = load_recipe(ROOT / "tests/fixtures/slurm_tiny.yaml")
    for rank in (0, 1):
        run = Run(digits, recipe_run.ds_values, tmp_path, run_of(rank, tmp_path, tmp_path).dist, "a test")
        if rank:
            assert len(follow(run, monkeypatch)[0]) == 320
        else:
            run.open_together()
    assert pickle.loads(WORDS[-1]) is None


def test_what_rank_0_cannot_open_is_an_error_of_all(tmp_path):
    with pytest.raises((ValueError, AgreedValueError), match=r"data\.path"):
        run_of(0, tmp_path / "nothing", tmp_path).open_together()
