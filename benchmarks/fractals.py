"""The data source `fractals`: how fast images are made beside their floor, and how weak linear models on it stay.

    python benchmarks/fractals.py
    python benchmarks/fractals.py --size 224 --train 20 --difficulty 0.5

The floor: only the random bytes of the images, and a file of their size. On a busy machine look at what is made in a
second of the processor. The linear models (ridge regression on all training images; the best of four penalties on the
validation images, so rather too good) see 8 x 8 thumbnails, as served and with the palette taken out (grey, mean 0,
deviation 1), or only what should tell nothing: mean, deviation and border of each channel and the size of the PNG file.
Four minutes on one core.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image

from trainer.config.data import DataConfig, FractalConfig
from trainer.data.base import ImageSource
from trainer.data.fractal_images import POINTS
from trainer.data.sources import open_source

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of ridge regression, relative to the number of images


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--train", type=int, default=100, help="training images of a class; validation: a fifth")
    parser.add_argument("--difficulty", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    options = parser.parse_args()
    logging.getLogger("trainer").setLevel(logging.WARNING)
    rows = []
    for difficulty in options.difficulty:
        with tempfile.TemporaryDirectory() as cache:
            config = FractalConfig(
                options.classes, options.size, options.classes * options.train,
                options.classes * max(1, options.train // 5), difficulty, cache=cache,
            )  # fmt: skip
            started, before = time.perf_counter(), processor_seconds()
            splits = [open_source(DataConfig(source="fractals", fractals=config), split) for split in ("train", "val")]
            wall, processor = time.perf_counter() - started, processor_seconds() - before
            count = sum(map(len, splits))
            speeds = count / wall, count / processor, count / processor / floor(config.size, Path(cache))
            rows.append((difficulty, probe(*splits), speeds))
    print(f"{options.size} px, {options.classes} classes (chance {1 / options.classes:.1%}), of each {options.train}")
    print(f"training images; {len(os.sched_getaffinity(0))} processes, load {os.getloadavg()[0]:.1f}\n")
    print("| difficulty | thumbnails | grey thumbnails | mean, deviation, border, file size | images/s "
          "| per processor second | of the floor |\n|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    for difficulty, found, (wall, processor, ratio) in rows:
        linear = " | ".join(f"{accuracy:.1%}" for accuracy in found)
        print(f"| {difficulty:g} | {linear} | {wall:.0f} | {processor:.0f} | {ratio:.3f} |")


def processor_seconds() -> float:
    """Of this process and of those it has waited for."""
    return sum(os.times()[:4])


def floor(size: int, folder: Path) -> float:
    """Images per processor second when only their random bytes (one a point, one a pixel) are drawn, and written."""
    before, pixels = processor_seconds(), size**2
    count, bits = 80_000_000 // pixels, np.random.Philox(0)
    with (folder / "floor").open("wb") as file:
        for _ in range(count):
            bits.random_raw(int(pixels * POINTS) // 8)
            file.write(bits.random_raw(pixels // 8).tobytes())
        file.flush()
        os.fsync(file.fileno())
    return count / (processor_seconds() - before)


def probe(train: ImageSource, val: ImageSource) -> list[float]:
    """Validation accuracy of the linear models on thumbnails, grey thumbnails, and shortcut features."""
    features = [[(thumbnail(image), grey(image), shortcuts(image)) for image in images(s)] for s in (train, val)]
    return [
        linear_accuracy(*(np.stack([row[kind] for row in rows]) for rows in features), train.targets, val.targets)
        for kind in range(3)
    ]


def images(source: ImageSource) -> Iterable[Image.Image]:
    return (source.image(index) for index in range(len(source)))


def thumbnail(image: Image.Image) -> np.ndarray:
    """(192,) mean colours of 8 x 8 cells."""
    return np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float64).ravel()


def grey(image: Image.Image) -> np.ndarray:
    """(64,) the same without colour, of mean 0 and deviation 1: what is left when the palette is known."""
    cells = thumbnail(image).reshape(64, 3).mean(axis=1)
    return (cells - cells.mean()) / (cells.std() + 1e-6)


def shortcuts(image: Image.Image) -> np.ndarray:
    """(19,) mean and deviation of each channel, means of the four border lines of each, bytes of the PNG file."""
    pixels_HWC = np.asarray(image, dtype=np.float64)
    lines = [pixels_HWC[0], pixels_HWC[-1], pixels_HWC[:, 0], pixels_HWC[:, -1]]
    image.save(file := io.BytesIO(), "png")
    whole = [pixels_HWC.mean(axis=(0, 1)), pixels_HWC.std(axis=(0, 1))]
    return np.concatenate([*whole, *(line.mean(axis=0) for line in lines), [file.tell()]])


def linear_accuracy(
    train_NF: np.ndarray, val_NF: np.ndarray, train_targets: np.ndarray, val_targets: np.ndarray
) -> float:
    """Share of validation images whose class a ridge regression on one-hot targets finds; the best penalty counts."""
    mean, deviation = train_NF.mean(axis=0), train_NF.std(axis=0) + 1e-6
    x, z = (np.column_stack([(rows - mean) / deviation, np.ones(len(rows))]) for rows in (train_NF, val_NF))
    one_hot_NC = np.eye(train_targets.max() + 1)[train_targets]
    found = []
    for penalty in PENALTIES:
        weights = np.linalg.solve(x.T @ x + penalty * len(x) * np.eye(x.shape[1]), x.T @ one_hot_NC)
        found.append(float(((z @ weights).argmax(axis=1) == val_targets).mean()))
    return max(found)


if __name__ == "__main__":
    main()
