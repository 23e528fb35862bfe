"""Where images come from: the embedded digits, procedural fractals, an ImageFolder, or what `datasets` loads map-style.

A source is random access (`image(i)`, `label(i)`), because a map-style source with a seeded sampler resumes exactly and
a streamed one with a shuffle buffer does not. Images are decoded by decode.py for every source alike.
"""

import itertools
import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.config.data import DataConfig
from trainer.data.base import ImageSource
from trainer.data.decode import EXTENSIONS, SKIP_HINT, UnreadableImageError, decode
from trainer.data.hub_splits import check_columns, labels_and_targets, listed, load_splits, refuse_outside
from trainer.data.walk import Tally, class_folders, is_picture_folder, pictures, split_folder

logger = logging.getLogger(__name__)
DIGITS_FILE = Path(__file__).with_name("digits.npz")  # see DIGITS.md
SPLITS = ("train", "val")


def open_source(data: DataConfig, split: str) -> ImageSource:
    """Open the images of `split` ("train" or "val") of the configured data.

    Raises:
        ValueError: a split, column, folder or label is missing or unusable; the message lists what is there.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}.")
    return _SOURCES[data.source](data, split)


class DigitsSource(ImageSource):
    """The 1,797 embedded 8 x 8 digits: 1,437 for training and 360 for validation, always the same ones.

    Sorted by class, every fifth image is validation: stratified, and the same on every machine.
    """

    origin = "embedded digits"

    def __init__(self, data: DataConfig, split: str):
        with np.load(DIGITS_FILE) as arrays:
            values_NHW = arrays["images"]
            targets = arrays["labels"].astype(np.int64)
        is_val = np.zeros(len(targets), dtype=bool)
        is_val[np.argsort(targets, kind="stable")[::5]] = True
        chosen = is_val if split == "val" else ~is_val
        grey_NHW = ((values_NHW[chosen].astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)  # 0..16 -> 0..255
        self._images_NHWC = np.repeat(grey_NHW[..., None], 3, axis=-1)
        super().__init__(f"digits {split}", [str(digit) for digit in range(10)], targets[chosen], data)

    def _read(self, row: int) -> Image.Image:
        return Image.fromarray(self._images_NHWC[row])


class FolderSource(ImageSource):
    """PATH/<split>/<class>/*.jpg, as torchvision's ImageFolder reads it; what is left out is counted (walk.py)."""

    def __init__(self, data: DataConfig, split: str):
        root = Path(data.path).expanduser()
        train_name = split_folder(root, data.train_split, "data.train_split")
        name = split_folder(root, _name_of(split, data), f"data.{split}_split")
        train_classes = class_folders(root / train_name, Tally())
        tally = Tally()
        classes = class_folders(root / name, tally)
        if classes != train_classes:
            raise ValueError(
                f"the class folders of {root / train_name} and {root / name} differ: "
                f"only in {train_name}: {listed(set(train_classes) - set(classes))}; "
                f"only in {name}: {listed(set(classes) - set(train_classes))}. Give both the same folders."
            )
        paths_of = pictures(root / name, classes, tally)
        if not any(paths_of.values()):
            expected = f"expected {', '.join(EXTENSIONS)} in class folders"
            raise ValueError(f"no images under {root / name}; {expected} ({tally}).")
        # one array, not a million str objects: reference counts would copy those into every worker process
        self._paths = np.array(list(itertools.chain.from_iterable(paths_of.values())))
        targets = np.repeat(np.arange(len(classes)), list(map(len, paths_of.values())))
        self.origin = str(root)
        super().__init__(f"folder {root / name}", classes, targets, data)
        self.remarks = str(tally)
        asked_name = _name_of(split, data)
        if name != asked_name:
            self.remarks = "; ".join(filter(None, [f"it stands for data.{split}_split {asked_name!r}", self.remarks]))
        if self.remarks:
            logger.warning("%s: %s", self.name, self.remarks)

    def _read(self, row: int) -> Image.Image:
        path = os.fsdecode(self._paths[row])
        return decode(path, path, self.max_pixels)


class HubSource(ImageSource):
    """A split of a hub data set (id or id@revision), a `save_to_disk` folder, or a folder of images or parquet."""

    def __init__(self, data: DataConfig, split: str):
        import datasets

        splits, self.origin = load_splits(data.path)
        name = _name_of(split, data)
        for key, split_name in (("data.train_split", data.train_split), (f"data.{split}_split", name)):
            if split_name not in splits:
                raise ValueError(f"{key} {split_name!r} is not in {data.path}; splits there: {listed(splits)}.")
            check_columns(splits[split_name], data)
        labels, targets = labels_and_targets(splits[data.train_split], splits[name], data)
        # undecoded, so that every source decodes alike and an error can name the file
        images = splits[name].with_format(None).select_columns([data.image_key])
        try:
            self._images = images.cast_column(data.image_key, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"data.image_key {data.image_key!r} of {data.path} is no image column but "
                f"{images.features[data.image_key]}; columns there: {listed(splits[name].features)}."
            ) from error
        self._image_key = data.image_key
        refuse_outside(self._images, data.image_key, data.path)
        super().__init__(f"hub {data.path} {name}", labels, targets, data)

    def _read(self, row: int) -> Image.Image:
        file = self._images[row][self._image_key] or {}
        content = file.get("bytes")
        path = file.get("path")
        description = f"row {row} of {self.name}"
        if path:
            description += f" ({path})"
        if content is None and path is None:
            raise UnreadableImageError(f"image {description} is empty. {SKIP_HINT}")
        return decode(path if content is None else content, description, self.max_pixels)


def _hub(data: DataConfig, split: str) -> ImageSource:
    """A local folder of pictures is read by the one reader of such folders: classes, order and pixels are the same."""
    if not is_picture_folder(Path(data.path).expanduser(), data.train_split):
        return HubSource(data, split)
    for key, column, name in (("image_key", data.image_key, "image"), ("label_key", data.label_key, "label")):
        if column != name:
            raise ValueError(f"data.{key} {column!r} is not a column of {data.path}; columns there: image, label.")
    return FolderSource(data, split)


def _fractals(data: DataConfig, split: str) -> ImageSource:
    from trainer.data.fractals import FractalSource  # late: it builds on this file

    return FractalSource(data, split)


_SOURCES = {"digits": DigitsSource, "fractals": _fractals, "folder": FolderSource, "hub": _hub}


def _name_of(split: str, data: DataConfig) -> str:
    """What the data set calls "train" or "val"."""
    return data.train_split if split == "train" else data.val_split
