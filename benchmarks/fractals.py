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
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image

from trainer.config.data import DataConfig, FractalConfig
from trainer.data.base import ImageSource
from trainer.data.drawing.fractals import POINTS
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
    rows = [table_row(options, difficulty) for difficulty in options.difficulty]
    print(f"{options.size} px, {options.classes} classes (chance {1 / options.classes:.1%}), of each {options.train}")
    print(f"training images; {len(os.sched_getaffinity(0))} processes, load {os.getloadavg()[0]:.1f}\n")
    print(
        "| difficulty | thumbnails | grey thumbnails | mean, deviation, border, file size | images/s "
        "| per processor second | of the floor |\n|---:|---:|---:|---:|---:|---:|---:|"
    )
    for row in rows:
        print(row)


def table_row(options: argparse.Namespace, difficulty: float) -> str:
    """Make the images of one difficulty; accuracies of the linear models and speeds as a line of the table."""
    with tempfile.TemporaryDirectory() as cache:
        config = FractalConfig(
            classes=options.classes,
            size=options.size,
            train_images=options.classes * options.train,
            val_images=options.classes * max(1, options.train // 5),
            difficulty=difficulty,
            cache=cache,
        )
        data = DataConfig(source="fractals", fractals=config)
        started = time.perf_counter()
        processor_before = processor_seconds()
        train = open_source(data, "train")
        val = open_source(data, "val")
        wall = time.perf_counter() - started
        processor = processor_seconds() - processor_before
        count = len(train) + len(val)
        of_floor = count / processor / floor(config.size, Path(cache))
        accuracies = " | ".join(f"{accuracy:.1%}" for accuracy in probe(train, val))
    return f"| {difficulty:g} | {accuracies} | {count / wall:.0f} | {count / processor:.0f} | {of_floor:.3f} |"


def processor_seconds() -> float:
    """Of this process and of those it has waited for."""
    return sum(os.times()[:4])


def floor(size: int, folder: Path) -> float:
    """Images per processor second when only their random bytes (one a point, one a pixel) are drawn, and written."""
    before = processor_seconds()
    pixels = size**2
    count = 80_000_000 // pixels
    bits = np.random.Philox(0)
    with (folder / "floor").open("wb") as file:
        for _ in range(count):
            # random_raw gives 8 bytes each
            bits.random_raw(int(pixels * POINTS) // 8)
            file.write(bits.random_raw(pixels // 8).tobytes())
        file.flush()
        os.fsync(file.fileno())
    return count / (processor_seconds() - before)


def probe(train: ImageSource, val: ImageSource) -> list[float]:
    """Validation accuracy of the linear models on thumbnails, grey thumbnails, and shortcut features."""
    pairs = zip(features_of(train), features_of(val))
    return [linear_accuracy(train_NF, val_NF, train.targets, val.targets) for train_NF, val_NF in pairs]


def features_of(source: ImageSource) -> list[np.ndarray]:
    """Thumbnails, grey thumbnails and shortcut features, (N, F) each, of all images of a source."""
    rows = []
    for index in range(len(source)):
        image = source.image(index)
        rows.append((thumbnail(image), grey(image), shortcuts(image)))
    return [np.stack(column) for column in zip(*rows)]


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
    parts = [pixels_HWC.mean(axis=(0, 1)), pixels_HWC.std(axis=(0, 1))]
    for line in (pixels_HWC[0], pixels_HWC[-1], pixels_HWC[:, 0], pixels_HWC[:, -1]):
        parts.append(line.mean(axis=0))
    file = io.BytesIO()
    image.save(file, "png")
    parts.append([file.tell()])
    return np.concatenate(parts)


def linear_accuracy(
    train_NF: np.ndarray, val_NF: np.ndarray, train_targets: np.ndarray, val_targets: np.ndarray
) -> float:
    """Share of validation images whose class a ridge regression on one-hot targets finds; the best penalty counts."""
    # features of mean 0 and deviation 1 on the training images, and a column of ones for the bias
    mean_F = train_NF.mean(axis=0)
    deviation_F = train_NF.std(axis=0) + 1e-6
    x_NF = np.column_stack([(train_NF - mean_F) / deviation_F, np.ones(len(train_NF))])
    z_NF = np.column_stack([(val_NF - mean_F) / deviation_F, np.ones(len(val_NF))])
    one_hot_NC = np.eye(train_targets.max() + 1)[train_targets]
    accuracies = []
    for penalty in PENALTIES:
        # W = (X^T X + penalty N I)^-1 X^T Y
        gram_FF = x_NF.T @ x_NF + penalty * len(x_NF) * np.eye(x_NF.shape[1])
        weights_FC = np.linalg.solve(gram_FF, x_NF.T @ one_hot_NC)
        # an image's class is the largest output
        predicted_N = (z_NF @ weights_FC).argmax(axis=1)
        accuracies.append(float((predicted_N == val_targets).mean()))
    return max(accuracies)


if __name__ == "__main__":
    main()
