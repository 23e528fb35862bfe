"""Images in tar files (WebDataset's shards), read where they lie: tars.py says which and where.

The source is random access, so whatever a folder of the same pictures promises holds: every image once in an epoch, the
same order on any number of ranks, resuming with the next image. Names, order and fingerprint are those of a folder
whose files were packed under their names.
"""

from __future__ import annotations

import json
import logging
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.config.data import DataConfig
from trainer.data.base import ImageSource
from trainer.data.classes import checked_names, first_names, near, numbered
from trainer.data.decode import SKIP_HINT, Pixels, ShrinkOf, UnreadableImageError, decode, decode_pixels, printable
from trainer.data.hub_splits import CLASSES_HINT, HELD_OUT_HINT, UNLABELLED_HINT, listed
from trainer.data.tars import Index, index_of, shard_splits
from trainer.data.walk import other_names

logger = logging.getLogger(__name__)
NAME_FILES = ("classes.txt", "classnames.txt")  # line i is the name of class i
INFO_FILE = "dataset_info.json"  # of `datasets`
OPEN_SHARE = 4  # a split's part of the files that a process may have open, as a divisor


class ShardSource(ImageSource):
    """The images of a split of a folder of tar files. Pickled or forked, every process opens the files anew."""

    def __init__(self, data: DataConfig, split: str, labels_needed: bool = True):
        root = Path(data.path).expanduser()
        splits = shard_splits(root, data)
        train_name = _found(splits, data.train_split, "data.train_split", root)
        asked = data.train_split if split == "train" else data.val_split
        name = _found(splits, asked, f"data.{split}_split", root)
        train = index_of(splits[train_name], data)
        index = train if name == train_name else index_of(splits[name], data)
        shards = splits[name]
        where = f"shards {root}" + (f" {name}" if name else "")
        if not len(index.names_N):
            raise ValueError(
                f"no image in {len(shards):,} tar files of {where}, expected members KEY.jpg and KEY.cls"
                f"{f' ({index.remarks})' if index.remarks else ''}: is data.image_key the extension of the images?"
            )
        labels, targets, named, remark = _classes(train, index, shards, root, labels_needed)
        self.origin = str(root)
        self._index = index
        self._files = _Files(shards)
        super().__init__(where, labels, targets, data, named=named)
        stands_for = f"it stands for data.{split}_split {asked!r}" if name and name != asked else ""
        self.remarks = "; ".join(filter(None, [stands_for, index.remarks, remark]))
        if self.remarks:
            logger.warning("%s: %s", self.name, self.remarks)

    def name_of(self, row: int) -> bytes:
        return b"/" + bytes(self._index.names_N[row])

    def size_of(self, row: int) -> int:
        return int(self._index.sizes_N[row])

    def content_of(self, row: int, limit: int) -> bytes:
        return self._content(row, limit)[0]

    def pixels(self, index: int, shrink_of: ShrinkOf) -> Pixels:
        return decode_pixels(*self._content(int(self.rows[index])), self.max_pixels, shrink_of)

    def _read(self, row: int) -> Image.Image:
        return decode(*self._content(row), self.max_pixels)

    def _content(self, row: int, limit: int | None = None) -> tuple[bytes, str]:
        """The bytes of an image, all or the first ones, and what an error calls it."""
        shard = int(self._index.shards_N[row])
        size = int(self._index.sizes_N[row])
        description = f"{self._files.paths[shard]}: {os.fsdecode(bytes(self._index.names_N[row]))}"
        wanted = size if limit is None else min(size, limit)
        try:
            return self._files.read(shard, int(self._index.offsets_N[row]), wanted), description
        except OSError as error:
            raise UnreadableImageError(
                f"image {printable(description)} cannot be read: {error}. {SKIP_HINT}"
            ) from error


class _Files:
    """Reads of many files at any place, of which a process keeps some open, each until others push it out.

    A read has its place with it (pread), so processes that were forked do not disturb each other.
    """

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.sizes = [os.stat(path).st_size for path in paths]
        self._open: dict[int, int] = {}  # number of the file -> descriptor, the one that was opened first in front

    def read(self, number: int, offset: int, size: int) -> bytes:
        """`size` bytes of a file.

        Raises:
            OSError: it cannot be read, or is not that long.
            ValueError: it is another one than when it was indexed.
        """
        descriptor = self._descriptor(number)
        parts = []
        while size > 0:  # a single read ends at 2 GiB
            part = os.pread(descriptor, size, offset)
            if not part:
                raise OSError(f"the shard ends {size:,} bytes too early")
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)

    def _descriptor(self, number: int) -> int:
        if number in self._open:
            return self._open[number]
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        while self._open and len(self._open) >= most // OPEN_SHARE:
            os.close(self._open.pop(next(iter(self._open))))
        path = self.paths[number]
        self._open[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(self._open[number]).st_size != self.sizes[number]:
            raise ValueError(f"{printable(path)} was changed since its index was made: start again, it is made anew.")
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


def _found(splits: dict[str, list[str]], split: str, key: str, root: Path) -> str:
    """The split that is meant: by its name, by another name of it, or tars without any for training.

    Raises:
        ValueError: none or several; those there are listed.
    """
    if split in splits:
        return split
    meant = other_names(split, splits)
    if len(meant) == 1:
        return meant[0]
    if key == "data.train_split" and list(splits) == [""]:
        return ""
    several = f", {' and '.join(meant)} could each be meant" if meant else ""
    hint = HELD_OUT_HINT if key == "data.val_split" else CLASSES_HINT
    there = listed(name or "tar files without a split in their names" for name in splits)
    raise ValueError(f"{key} {split!r} is no split of the tar files in {root}{several}; splits there: {there}.{hint}")


def _classes(
    train: Index, index: Index, shards: list[str], root: Path, labels_needed: bool
) -> tuple[list[str], np.ndarray, bool, str]:
    """Label names, fixed by the training split, and the label number of every image of `index`.

    Returns:
        (names, targets (N,) int64, whether anybody gave the names, a remark in one line or "").

    Raises:
        ValueError: no labels, where they are needed; or some that the training split, or its list of names, has not.
    """
    if bool(train.kind) != bool(index.kind):
        raise ValueError(f"of the splits in {root} one has labels and the other has none: give both, or neither.")
    if not train.kind:
        if labels_needed:
            raise ValueError(
                f"no labels in the tar files of {root}, expected KEY.cls (a whole number), KEY.json with the field "
                f"'label', or KEY.txt (a class name) beside KEY.jpg. {UNLABELLED_HINT}"
            )
        return [], np.zeros(len(index.codes_N), dtype=np.int64), False, ""
    if train.kind == "txt" and not labels_needed and len(train.keys) > len(train.codes_N) / 2:
        remark = f"of {len(train.codes_N):,} texts {len(train.keys):,} differ: captions, not classes"
        return [], np.zeros(len(index.codes_N), dtype=np.int64), False, remark
    keys = train.keys.tolist()
    other_keys = index.keys.tolist()
    if type(keys[0]) is not type(other_keys[0]):
        raise ValueError(
            f"labels in {root} are {keys[0]!r}, ... in training and {other_keys[0]!r}, ... in the "
            "other split, expected numbers or texts in both: write them alike."
        )
    named, remark = True, ""
    names = _class_names(root) if isinstance(keys[0], int) else None
    if names is not None:
        labels = checked_names(names, f"the list of class names in {root}")
        keys = list(range(len(labels)))
        expected = f"a number below {len(labels)}, the class names listed in {root}"
    else:
        if isinstance(keys[0], int):
            named, remark = numbered(keys)
        labels = [str(key) for key in keys]
        expected = f"one of the {len(labels)} labels of training ({first_names(labels, 10)})"
    number_of = {key: number for number, key in enumerate(keys)}
    for key in (*train.keys.tolist(), *other_keys):
        if key not in number_of:
            raise ValueError(
                f"{_first_with(index, key, shards)} is labelled {key!r}, expected {expected}.{near(key, labels)} Give "
                "both splits the same classes."
            )
    numbers = np.array([number_of[key] for key in other_keys], dtype=np.int64)
    return labels, numbers[index.codes_N], named, remark


def _first_with(index: Index, key: int | str, shards: list[str]) -> str:
    """Shard and member of the first image with a label; of one that only training has, training."""
    places = np.flatnonzero(index.keys == key)
    if not len(places):
        return "an image of training"
    row = int(np.flatnonzero(index.codes_N == places[0])[0])
    name = os.fsdecode(bytes(index.names_N[row]))
    return f"{printable(shards[int(index.shards_N[row])])}: {printable(name)!r}"


def _class_names(root: Path) -> list[str] | None:
    """Names of the classes 0, 1, 2 ..., where a file beside the shards lists them.

    Raises:
        ValueError: the file cannot be read.
    """
    for name in NAME_FILES:
        file = root / name
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeError) as error:
                raise ValueError(f"{file} cannot be read as text ({error}): write a class name a line.") from error
    file = root / INFO_FILE
    if not file.is_file():
        return None
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}): write it again, or remove it.") from error
    features = described.get("features") if isinstance(described, dict) else None
    columns = features.values() if isinstance(features, dict) else ()
    lists = [column["names"] for column in columns if isinstance(column, dict) and "names" in column]
    whole = len(lists) == 1 and isinstance(lists[0], list) and all(isinstance(name, str) for name in lists[0])
    return lists[0] if whole else None
