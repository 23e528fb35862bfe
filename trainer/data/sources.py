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
from torchvision.datasets.folder import IMG_EXTENSIONS

from models.files.places import expanded
from trainer.config.data import DataConfig
from trainer.data.base import ImageSource
from trainer.data.decode import SKIP_HINT, UnreadableImageError, decode, printable
from trainer.data.hub_splits import check_columns, labels_and_targets, listed, load_splits, refuse_outside

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
    """PATH/<split>/<class>/*.jpg, as torchvision's ImageFolder reads it; links are followed, also out of PATH."""

    def __init__(self, data: DataConfig, split: str):
        root = Path(expanded(data.path))
        train_classes = _class_folders(root, data.train_split, "data.train_split")
        name = _name_of(split, data)
        classes = _class_folders(root, name, f"data.{split}_split")
        if classes != train_classes:
            raise ValueError(
                f"the class folders of {root / data.train_split} and {root / name} differ: "
                f"only in {data.train_split}: {listed(set(train_classes) - set(classes))}; "
                f"only in {name}: {listed(set(classes) - set(train_classes))}. Give both the same folders."
            )
        paths_of = [_pictures(root / name / label) for label in classes]
        if not any(paths_of):
            raise ValueError(f"no images under {root / name}; expected {', '.join(IMG_EXTENSIONS)} in class folders.")
        # one array, not a million str objects: reference counts would copy those into every worker process
        self._paths = np.array(list(itertools.chain.from_iterable(paths_of)))
        targets = np.repeat(np.arange(len(classes)), list(map(len, paths_of)))
        self.origin = str(root)
        self._folder = os.fsencode(root / name)
        super().__init__(f"folder {root / name}", classes, targets, data)

    def name_of(self, row: int) -> bytes:
        return bytes(self._paths[row])[len(self._folder) :]

    def size_of(self, row: int) -> int:
        path = bytes(self._paths[row])
        return os.stat(path).st_size if os.path.exists(path) else -1

    def content_of(self, row: int, limit: int) -> bytes:
        return _beginning(bytes(self._paths[row]), limit)

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

    def content_of(self, row: int, limit: int) -> bytes:
        file = self._images[row][self._image_key] or {}
        content = file.get("bytes")
        if content is not None:
            return content[:limit]
        return _beginning(file["path"], limit) if file.get("path") else b""

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


def _fractals(data: DataConfig, split: str) -> ImageSource:
    from trainer.data.fractals import FractalSource  # late: it builds on this file

    return FractalSource(data, split)


_SOURCES = {"digits": DigitsSource, "fractals": _fractals, "folder": FolderSource, "hub": HubSource}


def _beginning(path: str | bytes, limit: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(limit)


def _name_of(split: str, data: DataConfig) -> str:
    """What the data set calls "train" or "val"."""
    return data.train_split if split == "train" else data.val_split


def _class_folders(root: Path, split: str, key: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        if not root.is_dir():
            raise ValueError(f"data.path {root} is not a folder: give the one that holds the splits.")
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        raise ValueError(f"{key} {split!r} is not a folder in {root}; folders there: {listed(folders)}.")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise ValueError(f"no class folders in {folder}; expected images in {folder}/<class>/.")
    for name in classes:
        if not name.isprintable():  # it becomes a label in JSON files and reports
            raise ValueError(f"the class folder {name!a} of {folder} has a name that is no text: give it another.")
    return classes


def _pictures(folder: Path) -> list[bytes]:
    """Paths of all images below a class folder, in ImageFolder's order.

    Raises:
        ValueError: a folder that is reached twice, through links in a circle or to one place: ImageFolder would count
            its images many times over, or never end.
    """
    pictures_in = {}  # folder -> its pictures
    read_already = set()
    for path, _, files in os.walk(folder, followlinks=True, onerror=_raise):
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)  # the same whichever link leads to it
        if identity in read_already:
            raise ValueError(f"{printable(path)} leads to a folder that was read already: remove the link.")
        read_already.add(identity)
        pictures = [name for name in sorted(files) if name.lower().endswith(IMG_EXTENSIONS)]
        pictures_in[path] = [os.fsencode(os.path.join(path, name)) for name in pictures]
    return list(itertools.chain.from_iterable(pictures_in[path] for path in sorted(pictures_in)))


def _raise(error: OSError) -> None:
    raise error
