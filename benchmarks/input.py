"""How many training images a second one core prepares, against torchvision's ImageFolder with timm's create_transform.

    nice -n -5 python benchmarks/input.py
    python benchmarks/input.py --width 4000 --height 3000 --kilobytes 3500 --images 12 --batch 4 --pairs 7

Both read the same JPEGs, made here (clouds of noise, 4:2:0, of the size in bytes that is asked for), at the
augmentation of a recipe: as it stands there, without RandAugment, and with its repeated augmentation, which ImageFolder
has not. A batch of each in turn, one process, one thread; a ratio is the median over the pairs of their ratios in
processor seconds. Then the same JPEGs from tar files against the folder, both by the trainer, and the milliseconds of
an image in every stage. The floor beside them is libjpeg-turbo alone. All files lie in the page cache.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import models  # noqa: F401  isort: skip  first: it mends torchvision beside a CPU torch
import numpy as np
import PIL
import simplejpeg
import timm
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks import timing
from models.preprocessing import Preprocessing
from trainer.config.data import AugmentConfig, DataConfig
from trainer.config.load import load_recipe
from trainer.data.augment import finish, gathered, posterize
from trainer.data.base import ImageSource
from trainer.data.loader import train_batches
from trainer.data.sources import open_source
from trainer.data.transforms import train_transform

PRE = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MANY_EPOCHS = 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/vmoe_base_imagenet.yaml")
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--kilobytes", type=float, default=58.0, help="of one JPEG")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="images of a batch, at most 3/4 of all")
    parser.add_argument("--pairs", type=int, default=15, help="batches of each kind")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe_augment = replace(load_recipe(options.recipe, []).augment, repeats=1)
    plain = replace(recipe_augment, rand_augment="", color_jitter=0.0)
    repeats = load_recipe(options.recipe, []).augment.repeats
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["M2MKD_CACHE"] = scratch  # the index of the tar files goes with them
        folder = Path(scratch) / "pictures"
        size = _write_pictures(folder, options)
        _pack(folder / "train", Path(scratch) / "shards")
        source, shards = (
            open_source(DataConfig(path=f"{scratch}/{name}", val_share=0.25), "train")
            for name in ("pictures", "shards")
        )
        cases = {"recipe": recipe_augment, "without RandAugment": plain}
        if repeats > 1:
            cases[f"recipe, repeats {repeats}"] = replace(recipe_augment, repeats=repeats)
        figures = {}
        for name, augment in cases.items():
            theirs = _image_folder(folder, augment, options.batch)
            ours = _batches(source, augment, options.batch)
            figures[name] = _compare({"ImageFolder + timm": theirs, "trainer": ours}, options.pairs, options.batch)
        sources = {"folder": source, "tar files": shards}
        both = {name: _batches(images, recipe_augment, options.batch) for name, images in sources.items()}
        in_tars = _compare(both, options.pairs, options.batch)
        stages = _stages(source, recipe_augment)
    figures["in tar files"] = in_tars
    figures["stages"] = stages
    figures["about"] = {
        "picture": f"{options.width} x {options.height}, {size / 1e3:.0f} kB",
        "batch": options.batch,
        "pairs": options.pairs,
        "processor": platform.processor() or platform.machine(),
        "versions": {
            "torch": torch.__version__,
            "timm": timm.__version__,
            "pillow": PIL.__version__,
            "simplejpeg": ".".join(simplejpeg.__version_info__),
            "python": platform.python_version(),
        },
    }
    _print(figures)
    ratios = {f"{name}: images/s to ImageFolder + timm": figures[name]["ratio"] for name in cases}
    ratios["in tar files: images/s to a folder"] = in_tars["ratio"]
    timing.write(options.json, ratios, machine=timing.machine(), **figures)


def _write_pictures(folder: Path, options: argparse.Namespace) -> float:
    """PATH/train/<class>/*.jpg of two classes; returns the mean size in bytes."""
    sizes = []
    for number in range(options.images):
        content = _jpeg(number, options.width, options.height, options.kilobytes * 1e3)
        path = folder / "train" / f"class {number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        sizes.append(len(content))
    return statistics.mean(sizes)


def _pack(folder: Path, target: Path) -> None:
    """The same as TARGET/train-<i>.tar, 16 images each, class by class as they lie in the folder."""
    target.mkdir()
    files = sorted(folder.rglob("*.jpg"))
    for number in range(0, len(files), 16):
        with tarfile.open(target / f"train-{number // 16:04}.tar", "w") as tar:
            for file in files[number : number + 16]:
                name = str(file.relative_to(folder))
                tar.add(file, name)
                label = tarfile.TarInfo(name.replace(".jpg", ".txt"))
                label.size = len(file.parent.name)
                tar.addfile(label, io.BytesIO(file.parent.name.encode()))


def _batches(source: ImageSource, augment: AugmentConfig, batch: int) -> Iterator[object]:
    return train_batches(source, PRE, augment, seed=0, epoch=0, epochs=MANY_EPOCHS, micro_batch=batch)


def _jpeg(seed: int, width: int, height: int, most_bytes: float) -> bytes:
    """Noise whose amplitude falls with its frequency as in photographs, at the quality that comes nearest below."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf  # no constant part
    fields = []
    for _ in range(3):
        spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        field = np.fft.irfft2(spectrum / frequency**1.15, (height, width))
        fields.append(field / field.std())
    grey, *tints = fields
    values_HWC = 128 + 55 * np.stack([grey + 0.3 * tints[0], grey, grey + 0.3 * tints[1]], axis=-1)
    image = Image.fromarray(values_HWC.clip(0, 255).astype(np.uint8))
    low, high = 5, 98
    while low < high:
        quality = (low + high + 1) // 2
        if len(_encoded(image, quality)) <= most_bytes:
            low = quality
        else:
            high = quality - 1
    return _encoded(image, low)


def _encoded(image: Image.Image, quality: int) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return content.getvalue()


def _compare(sides: dict[str, Iterator[object]], pairs: int, batch: int) -> dict[str, float]:
    """Images a second of either side, and the median over the pairs of how many times faster the second one is."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(-2, pairs):  # two to warm up
        for name, batches in sides.items():
            taken = _seconds(lambda batches=batches: next(batches))
            if pair >= 0:
                seconds[name].append(taken)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    rates = {f"{name}, images/s": batch / statistics.median(taken) for name, taken in seconds.items()}
    return rates | {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def _image_folder(folder: Path, augment: AugmentConfig, batch: int) -> Iterator[list[torch.Tensor]]:
    transform = create_transform(
        input_size=(3, PRE.image_size, PRE.image_size),
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.rand_augment or None,
        interpolation=PRE.interpolation,
        mean=PRE.mean,
        std=PRE.std,
        re_prob=augment.random_erasing,
        re_mode="pixel",
    )
    for step in transform.transforms:
        for op in getattr(step, "ops", ()):
            if op.aug_fn is auto_augment.posterize:  # else it stops at 0 bits
                op.aug_fn = posterize
    dataset = ImageFolder(str(folder / "train"), transform)
    while True:
        yield from DataLoader(dataset, batch_size=batch, shuffle=True, drop_last=True)


def _stages(source: ImageSource, augment: AugmentConfig) -> dict[str, float]:
    """Milliseconds of an image in each stage: the median over 20 rounds through all images."""
    transform = train_transform(PRE, augment)
    without_colours = train_transform(PRE, replace(augment, rand_augment="", color_jitter=0.0))
    rounds: dict[str, list[float]] = {}
    for _ in range(20):
        taken = dict.fromkeys(("read and decode", "crop and resize", "RandAugment", "erasing drawn"), 0.0)
        views, rectangles = [], []
        for index in range(len(source)):
            crop = None

            def draw(width: int, height: int) -> int:
                nonlocal crop
                crop = transform.crop(width, height)
                return transform.shrink(crop)

            started = time.process_time()
            pixels, _ = source.pixels_or_next(index, draw)
            decoded = time.process_time()
            view_CHW = without_colours.view(pixels, crop)
            resized = time.process_time()
            coloured_CHW = transform.coloured(view_CHW)
            coloured = time.process_time()
            rectangles.append(transform.rectangle())
            views.append(coloured_CHW)
            ended = time.process_time()
            taken["read and decode"] += decoded - started
            taken["crop and resize"] += resized - decoded
            taken["RandAugment"] += coloured - resized
            taken["erasing drawn"] += ended - coloured
        batch_BCHW = torch.stack(views)
        taken["normalised and erased, as a batch"] = _seconds(
            lambda batch_BCHW=batch_BCHW, rectangles=rectangles: finish(batch_BCHW, gathered(rectangles), PRE)
        )
        contents = [source.content_of(row, 2**26) for row in source.rows.tolist()]
        taken["floor: libjpeg-turbo alone"] = _seconds(lambda contents=contents: _decode_all(contents))
        for name, seconds in taken.items():
            rounds.setdefault(name, []).append(1e3 * seconds / len(source))
    return {f"{name}, ms": statistics.median(values) for name, values in rounds.items()}


def _decode_all(contents: list[bytes]) -> None:
    for content in contents:
        simplejpeg.decode_jpeg(content)


def _seconds(work: Callable[[], object]) -> float:
    """Processor seconds of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def _print(figures: dict[str, dict]) -> None:
    about = figures["about"]
    print(f"{about['picture']}, batches of {about['batch']}, {about['pairs']} pairs")
    print("| | ImageFolder + timm, images/s | trainer, images/s | ratio | least to most |\n|---|---:|---:|---:|---:|")
    for name, values in figures.items():
        if "trainer, images/s" in values:
            theirs, ours, ratio, least, most = values.values()
            print(f"| {name} | {theirs:.0f} | {ours:.0f} | {ratio:.2f} | {least:.2f} to {most:.2f} |")
    of_folder, of_tars, ratio, least, most = figures["in tar files"].values()
    print("\n| from a folder, images/s | from tar files, images/s | ratio | least to most |\n|---:|---:|---:|---:|")
    print(f"| {of_folder:.0f} | {of_tars:.0f} | {ratio:.3f} | {least:.3f} to {most:.3f} |")
    print("\n| stage | ms an image |\n|---|---:|")
    for name, value in figures["stages"].items():
        print(f"| {name.removesuffix(', ms')} | {value:.3f} |")


if __name__ == "__main__":
    main()
