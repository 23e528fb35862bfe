"""Where images come from: embedded digits, procedural images, an ImageFolder, tar files, or what `datasets` loads.

A source is random access (`image(i)`, `label(i)`), because a map-style source with a seeded sampler resumes exactly and
a streamed one with a shuffle buffer does not. Images are decoded by decode.py for every source alike.
"""

import difflib
import itertools
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from models.files.places import expanded
from models.labels import tidy
from trainer.config.data import BUILT_IN, HELD_OUT, PROCEDURAL, VALIDATION, DataConfig
from trainer.data.base import ImageSource
from trainer.data.classes import checked_names, held_out, labels_and_targets, refuse_differing_folders
from trainer.data.decode import (
    EXTENSIONS,
    SKIP_HINT,
    Pixels,
    ShrinkOf,
    UnreadableImageError,
    decode,
    decode_pixels,
    opened,
)
from trainer.data.hub_splits import HELD_OUT_HINT, check_columns, listed, load_splits, refuse_outside
from trainer.data.shards import ShardSource
from trainer.data.tars import is_shard_folder, shard_splits
from trainer.data.walk import (
    SPLIT_NAMES,
    Tally,
    class_folders,
    flat_pictures,
    is_dataset_folder,
    is_flat,
    is_flat_picture_folder,
    is_picture_folder,
    other_names,
    pictures,
    split_folder,
)

logger = logging.getLogger(__name__)
DIGITS_FILE = Path(__file__).with_name("digits.npz")  # see DIGITS.md
SPLITS = ("train", "val")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@\S+)?")  # owner/name, with a revision perhaps
PACKED = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


def open_source(data: DataConfig, split: str, *, labels_needed: bool = True) -> ImageSource:
    """Open the images of `split` ("train" or "val") of the configured data.

    Args:
        labels_needed: refuse images without labels; else those of a folder without class folders, or of a hub set
            without the label column, are taken (`labels == []`).

    Raises:
        ValueError: a split, column, folder or label is missing or unusable; the message lists what is there.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}.")
    data = replace(data, path=expanded(data.path))
    data = replace(data, source=source_of(data))
    others = _without_validation(data) if data.val_share is None else None
    if data.val_share:
        return _held_out(data, split, labels_needed)
    if others is None:
        return _SOURCES[data.source](data, split, labels_needed)
    source = _held_out(replace(data, val_share=HELD_OUT), split, labels_needed)
    instead = f"; data.val_split={others[0]} would measure on {others[0]}" if others else ""
    remark = f"no split {data.val_split!r}: {HELD_OUT:g} of the training images of each class are held out{instead}"
    if split == "val":  # once, of both sides
        source.remarks = remark
        logger.warning("%s: %s", source.name, remark)
    return source


def source_of(data: DataConfig) -> str:
    """The kind of source that the recipe names or data.path is: digits, fractals, textures, folder, shards or hub.

    A folder of tar files is read as shards, whichever of auto, folder and hub the recipe names.

    Raises:
        ValueError: data.path is nothing that can be read, or is given beside a source that reads none.
    """
    if data.source in BUILT_IN:
        if data.path:
            raise ValueError(
                f"data.path is {data.path!r}, but data.source is {data.source!r}, which reads no path: set "
                "data.source=auto for the images of data.path, or 'data.path=\"\"' for none"
            )
        return data.source
    if data.source == "auto" and not data.path:
        return "digits"
    path = Path(expanded(data.path))
    if path.is_dir() and is_shard_folder(path):
        return "shards"
    if data.source != "auto":
        return data.source
    if path.is_dir():
        if not any(path.iterdir()):
            raise ValueError(f"data.path {data.path!r} is an empty folder, expected folders of pictures, one per class")
        return "hub" if is_dataset_folder(path) else "folder"
    if path.exists():
        raise ValueError(f"data.path {data.path!r} is a file, expected a folder of pictures: {_unpacked(path)}")
    if HUB_ID.fullmatch(data.path):
        return "hub"
    raise ValueError(
        f"data.path {data.path!r} is no folder on this machine{_names_there(path)}, and no hub id, which reads "
        "owner/name: give the folder that holds the pictures, or a hub id"
    )


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
    """PATH/<split>/<class>/*.jpg, as torchvision's ImageFolder reads it; what is left out is counted (walk.py).

    Where no labels are needed, PATH/<split>/*.jpg is images without labels.
    """

    def __init__(self, data: DataConfig, split: str, labels_needed: bool = True):
        root = Path(data.path).expanduser()
        train_name = split_folder(root, data.train_split, "data.train_split")
        name = split_folder(root, _name_of(split, data), f"data.{split}_split")
        tally = Tally()
        if not labels_needed and is_flat(root / train_name):
            paths_of = {"": _without_labels(root / train_name, root / name, tally)}
            folders = []
        else:
            folders = _classes_of(root, train_name, name, tally)
            paths_of = pictures(root / name, folders, tally)
        if not any(paths_of.values()):
            expected = f"expected {', '.join(EXTENSIONS)} in class folders"
            raise ValueError(f"no images under {root / name}; {expected} ({tally}).")
        if len(folders) == 1 and tally.nested == len(paths_of[folders[0]]):
            inner = str(root / name / folders[0])
            raise ValueError(
                f"{root / name} holds one folder, {folders[0]!r}, with folders in it: if those are the classes, set "
                f"data.path={inner!r}"
            )
        # one array, not a million str objects: reference counts would copy those into every worker process
        self._paths = np.array(list(itertools.chain.from_iterable(paths_of.values())))
        targets = np.repeat(np.arange(len(paths_of)), list(map(len, paths_of.values())))
        self.origin = str(root)
        self._folder = os.fsencode(root / name)
        super().__init__(f"folder {root / name}", folders, targets, data)
        self.remarks = str(tally)
        asked_name = _name_of(split, data)
        if name != asked_name:
            self.remarks = "; ".join(filter(None, [f"it stands for data.{split}_split {asked_name!r}", self.remarks]))
        if self.remarks:
            logger.warning("%s: %s", self.name, self.remarks)

    def name_of(self, row: int) -> bytes:
        return bytes(self._paths[row])[len(self._folder) :]

    def size_of(self, row: int) -> int:
        path = bytes(self._paths[row])
        return os.stat(path).st_size if os.path.exists(path) else -1

    def content_of(self, row: int, limit: int) -> bytes:
        return _beginning(os.fsdecode(self._paths[row]), limit)

    def _read(self, row: int) -> Image.Image:
        path = os.fsdecode(self._paths[row])
        return decode(path, path, self.max_pixels)

    def pixels(self, index: int, shrink_of: ShrinkOf) -> Pixels:
        path = os.fsdecode(self._paths[self.rows[index]])
        return decode_pixels(path, path, self.max_pixels, shrink_of)


class HubSource(ImageSource):
    """A split of a hub data set (id or id@revision), a `save_to_disk` folder, or a folder of images or parquet."""

    def __init__(self, data: DataConfig, split: str, labels_needed: bool = True):
        import datasets

        splits, self.origin = load_splits(data.path, data.config)
        data = _as_named_there(data, splits)
        name = _name_of(split, data)
        for key, split_name in (("data.train_split", data.train_split), (f"data.{split}_split", name)):
            if split_name not in splits:
                held_out_hint = HELD_OUT_HINT if key == "data.val_split" else ""
                raise ValueError(
                    f"{key} {split_name!r} is not in {data.path}; splits there: {listed(splits)}.{held_out_hint}"
                )
            check_columns(splits[split_name], data, labels_needed=labels_needed)
        if data.val_share and data.val_split in splits:
            raise ValueError(f"data.val_share is {data.val_share:g}, but {data.path} has {_unused_split(data)}")
        if data.label_key in splits[data.train_split].features:
            check_columns(splits[name], data)  # the same in both splits
            labels, targets, named, remark = labels_and_targets(splits[data.train_split], splits[name], data, name)
        else:
            targets = np.zeros(len(splits[name]), dtype=np.int64)
            labels, named, remark = [], False, ""
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
        super().__init__(f"hub {data.path} {name}", labels, targets, data, named=named)
        if remark and split == "train":  # the same of both splits
            self.remarks = remark
            logger.warning("%s: %s", self.name, remark)

    def content_of(self, row: int, limit: int) -> bytes:
        file = self._images[row][self._image_key] or {}
        content = file.get("bytes")
        if content is not None:
            return content[:limit]
        return _beginning(file["path"], limit) if file.get("path") else b""

    def _read(self, row: int) -> Image.Image:
        return decode(*self._file(row), self.max_pixels)

    def pixels(self, index: int, shrink_of: ShrinkOf) -> Pixels:
        return decode_pixels(*self._file(int(self.rows[index])), self.max_pixels, shrink_of)

    def _file(self, row: int) -> tuple[str | bytes, str]:
        """Path or content of an image, and what an error calls it."""
        file = self._images[row][self._image_key] or {}
        content = file.get("bytes")
        path = file.get("path")
        description = f"row {row} of {self.name}"
        if path:
            description += f" ({path})"
        if content is None and path is None:
            raise UnreadableImageError(f"image {description} is empty. {SKIP_HINT}")
        return path if content is None else content, description


def _classes_of(root: Path, train_name: str, name: str, tally: Tally) -> list[str]:
    """The class folders of a split, which have to be those of the training split.

    Raises:
        ValueError: they are not, or there are none.
    """
    train_classes = class_folders(root / train_name, Tally())
    folders = class_folders(root / name, tally)
    both = f"the class folders of {root / train_name} and {root / name}"
    refuse_differing_folders(list(map(tidy, train_classes)), list(map(tidy, folders)), train_name, name, both)
    checked_names(folders, f"folder {root / name}")
    return sorted(folders, key=tidy)  # the same order where one split was written on a Mac and the other was not


def _without_labels(train: Path, folder: Path, tally: Tally) -> list[bytes]:
    """The pictures of a split beside a training split without class folders.

    Raises:
        ValueError: this one has folders.
    """
    if not is_flat(folder):
        raise ValueError(
            f"{train} holds pictures without class folders, but {folder} does not: give both class folders, or neither."
        )
    return flat_pictures(folder, tally)


def _hub(data: DataConfig, split: str, labels_needed: bool) -> ImageSource:
    """A local folder of pictures is read by the one reader of such folders: classes, order and pixels are the same."""
    root = Path(data.path).expanduser()
    flat = not labels_needed and is_flat_picture_folder(root, data.train_split)
    if not flat and not is_picture_folder(root, data.train_split):
        return HubSource(data, split, labels_needed)
    for key, column, name in (("image_key", data.image_key, "image"), ("label_key", data.label_key, "label")):
        if column != name:
            raise ValueError(f"data.{key} {column!r} is not a column of {data.path}; columns there: image, label.")
    return FolderSource(data, split, labels_needed)


def _without_validation(data: DataConfig) -> list[str] | None:
    """None where there is a validation split, or one is asked for by name; else the splits that could stand for it."""
    if data.source in BUILT_IN or data.val_split not in ("", VALIDATION):
        return None
    root = Path(data.path)
    if data.source == "folder" and not root.is_dir():
        return None
    if data.source == "shards":
        names = list(shard_splits(root, data))
    elif root.is_dir() and (data.source == "folder" or is_picture_folder(root, data.train_split)):
        names = [entry.name for entry in root.iterdir() if entry.is_dir()]
    else:
        names = list(load_splits(data.path, data.config)[0])
    if data.val_split in names or other_names(data.val_split, names):
        return None
    kinds = set(itertools.chain.from_iterable(SPLIT_NAMES))
    train_names = {data.train_split, *other_names(data.train_split, names)}
    return sorted(name for name in names if name.lower() in kinds and name not in train_names)


def _held_out(data: DataConfig, split: str, labels_needed: bool) -> ImageSource:
    """One side of the training split, of which data.val_share of each class is validation; then data.limit.

    Images without labels are held out as one class.
    """
    if data.source == "shards":
        _refuse_unused_split(data, shard_splits(Path(data.path), data))
    elif data.source not in BUILT_IN and (data.source == "folder" or Path(data.path).expanduser().is_dir()):
        data = _without_split_folders(data, labels_needed)
    whole = _SOURCES[data.source](replace(data, limit=0), "train", labels_needed)
    is_val = held_out(whole.targets, whole.labels or [""], data.val_share)
    side = is_val if split == "val" else ~is_val
    source = whole.subset(np.flatnonzero(side))
    source.counts = np.bincount(source.targets, minlength=len(source.labels))
    source.held_out = data.val_share if split == "val" else 0.0
    source.name = f"{whole.name}, {'the' if split == 'val' else 'without the'} {data.val_share:g} held out"
    return source.spread(data.limit) if data.limit else source


def _without_split_folders(data: DataConfig, labels_needed: bool) -> DataConfig:
    """The same data, read as PATH/<class>/ where PATH has class folders in place of the training split's folder.

    Or as PATH/*.jpg, where it has none and no labels are needed.

    Raises:
        ValueError: there is a validation split, so none has to be held out.
    """
    root = Path(data.path).expanduser()
    if not root.is_dir() or (root / "dataset_dict.json").is_file():
        return data
    if not labels_needed and is_flat(root):
        return replace(data, train_split="")
    folders = [entry.name for entry in root.iterdir() if entry.is_dir()]
    _refuse_unused_split(data, folders)
    try:
        split_folder(root, data.train_split, "data.train_split")
    except ValueError:
        known = set(itertools.chain.from_iterable(SPLIT_NAMES))
        if known & set(map(str.lower, folders)):
            raise
        return replace(data, train_split="")
    return data


def _refuse_unused_split(data: DataConfig, names: Iterable[str]) -> None:
    """Raise a ValueError when the validation split is among these: none has to be held out."""
    if data.val_split in names:
        raise ValueError(f"data.val_share is {data.val_share:g}, but {data.path} has {_unused_split(data)}")


def _unpacked(path: Path) -> str:
    """What to do with a file that stands where a folder is expected."""
    if path.suffix.lower() == ".tar":
        return f"if it is a shard (KEY.jpg beside KEY.cls) give its folder, {str(path.parent)!r}; else unpack it"
    if path.suffix.lower() in PACKED:
        return "unpack it, and give the folder"
    return f"give the folder it lies in, {str(path.parent)!r}"


def _names_there(path: Path) -> str:
    """The folders beside a path that is not there, of which one may have been meant."""
    if not path.parent.is_dir():
        return ""
    folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    near = difflib.get_close_matches(path.name, folders, n=3)
    return f" (there is {', '.join(near)})" if near else ""


def _unused_split(data: DataConfig) -> str:
    unused = "'data.val_split=\"\"'"  # quoted twice: a shell takes one pair away, and YAML reads nothing as null
    return f"a split {data.val_split!r}: set data.val_share=0 to use it, or {unused} to leave it unused."


def _digits(data: DataConfig, split: str, labels_needed: bool) -> ImageSource:
    return DigitsSource(data, split)


def _procedural(data: DataConfig, split: str, labels_needed: bool) -> ImageSource:
    from trainer.data.procedural import ProceduralSource  # late: it builds on this file

    return ProceduralSource(data, getattr(data, data.source), split)


_SOURCES = {
    "digits": _digits,
    "folder": FolderSource,
    "shards": ShardSource,
    "hub": _hub,
    **dict.fromkeys(PROCEDURAL, _procedural),
}


def _beginning(path: str, limit: int) -> bytes:
    with opened(path) as file:
        return file.read(limit)


def _as_named_there(data: DataConfig, splits: Iterable[str]) -> DataConfig:
    """The same data with the names that its splits have there, where those are other names of the same (walk.py)."""
    named = {}
    for key in ("train_split", "val_split"):
        split = getattr(data, key)
        meant = other_names(split, splits)
        if split not in splits and len(meant) == 1:
            named[key] = meant[0]
    return replace(data, **named)


def _name_of(split: str, data: DataConfig) -> str:
    """What the data set calls "train" or "val"."""
    return data.train_split if split == "train" else data.val_split
