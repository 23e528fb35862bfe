"""Training from tar files: the weights of training from a folder of the same pictures, to the bit."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.launch import TINY


@pytest.fixture
def pictures(tmp_path):
    """32 training and 8 validation pictures of two classes, as a folder."""
    colours = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 8)):
        for number in range(count):
            file = tmp_path / "pictures" / split / f"kind{number % 2}" / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(colours.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pictures"


@pytest.fixture
def shards(pictures, tmp_path):
    """The same, shuffled, five to a shard, with numbers as labels and names beside them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    order = np.random.default_rng(1)
    for split in ("train", "val"):
        files = order.permutation(sorted((pictures / split).rglob("*.png")))
        for number, part in enumerate(np.array_split(files, len(files) // 5)):
            with tarfile.open(folder / f"set-{split}-{number:04}.tar", "w") as tar:
                for file in part:
                    name = file.relative_to(pictures / split)
                    tar.add(file, str(name))
                    label = file.parent.name[-1].encode()
                    header = tarfile.TarInfo(str(name.with_suffix(".cls")))
                    header.size = len(label)
                    tar.addfile(header, io.BytesIO(label))
    (folder / "classes.txt").write_text("kind0\nkind1\n")
    return folder


def main_with_cache(cache: str, line: list[str]) -> int:
    """One command with a cache of its own."""
    os.environ["M2MKD_CACHE"] = cache
    from trainer.run import main

    return main(line)


def test_training_from_shards_gives_the_weights_of_training_from_the_folder(warm, pictures, shards, tmp_path):
    def run(*more, ranks=1):
        call = "tests.integration.test_shard_runs:main_with_cache"
        return warm.call(call, str(tmp_path / "cache"), [*line, *map(str, more)], ranks=ranks)

    line = [*TINY, "--phase", "teacher", "data.val_split=val", "data.limit=0", "data.workers=1"]
    planned = run(f"data.path={shards}", "--out", tmp_path / "planned", "--dry-run")
    assert planned.code == 0 and "32 training and 8 validation images" in planned.output, planned.output
    weights = {}
    for place in (pictures, shards):
        out = tmp_path / f"out {place.name}"
        finished = run(f"data.path={place}", "--out", out, ranks=2)
        assert finished.code == 0, finished.output
        weights[place.name] = (out / "teacher/model.safetensors").read_bytes()
    assert len(list((tmp_path / "cache").iterdir())) == 2  # an index for each split
    assert weights["shards"] == weights["pictures"]
    # what was made of the folder is also made of the shards: nothing is refused, nothing made again
    again = run(f"data.path={shards}", "--out", tmp_path / "out pictures", ranks=2)
    assert again.code == 0 and "complete" in again.output, again.output
