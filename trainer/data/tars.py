"""The tar files of a data set (WebDataset's shards), and an index of them: where each image lies, and its label.

A sample is what one shard holds under one key, the name up to the first dot of its last part: KEY.jpg is its image,
KEY.cls (a whole number), a field of KEY.json or KEY.txt its label. The index is made from the headers alone and kept in
a cache, so that any image is one read at a known place: the sampler is that of a folder. What others offer costs that:
webdataset streams, so an order is exact only within a shuffle buffer; its `wids` reads the headers again in every
process, knows a label only once the sample is read, and no long names; `datasets` copies all images into Arrow files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from models.files.places import expanded
from models.labels import tidy
from trainer.config.data import DataConfig
from trainer.data.decode import EXTENSIONS, printable
from trainer.data.walk import SAVED, SPLIT_NAMES, Tally, hidden_as, is_hidden

logger = logging.getLogger(__name__)
FORMAT = 1  # of the cached index; another one is made anew
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # of what these hold, whatever they are called
BLOCK = 512  # bytes; two of zeros end a tar
LABELS = ("cls", "json", "txt")  # where a label is looked for, in this order
LARGEST_LABEL = 2**20  # bytes
MAX_CLASSES = 1_000_000  # a larger label is a mistake
READERS = 8  # shards whose headers are read at the same time: a shared file system answers each late
IMAGE_KEY, LABEL_KEY = DataConfig.image_key, DataConfig.label_key  # their defaults


@dataclass(frozen=True)
class Index:
    """Images of one split, in the order of a folder of them: by label, then folder and name. N = images.

    Attributes:
        names_N: member's name, as bytes.
        shards_N: number of the shard, in the order the shards were given.
        offsets_N, sizes_N: of the image in its shard, bytes.
        keys: what labels there are, sorted: whole numbers, or texts; none of images without labels.
        codes_N: place of the image's label in `keys`.
        kind: where the labels stand: a member of LABELS, or "" for none.
        remarks: what was left out, in one line.
    """

    names_N: np.ndarray
    shards_N: np.ndarray
    offsets_N: np.ndarray
    sizes_N: np.ndarray
    keys: np.ndarray
    codes_N: np.ndarray
    kind: str
    remarks: str


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    offset: int
    size: int


# which tar files there are


def is_shard_folder(root: Path) -> bool:
    """Whether a folder, or folders in it, hold tar files and no pictures: archives beside pictures are left alone."""
    if any((root / name).exists() for name in SAVED):
        return False
    tars = _tars(root)
    stems = {os.path.splitext(path)[0] for path in tars}
    if not tars:
        return False
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in names:
            stem, extension = os.path.splitext(os.path.join(folder, name))
            if extension.lower() in EXTENSIONS and not is_hidden(name):
                return False
            if extension in (".parquet", ".arrow") and stem not in stems:  # img2dataset lays a table beside each
                return False
    return True


def shard_splits(root: Path, data: DataConfig) -> dict[str, list[str]]:
    """Paths of the tar files of each split, sorted.

    The split is the folder's name, or a word of the file's (train-0000.tar, imagenet1k-validation-00.tar), where that
    is a name of a split; else the folder's. "" = files in `root` without such a word.

    Raises:
        ValueError: a file's name has words for two splits.
    """
    known = {*chain.from_iterable(SPLIT_NAMES), data.train_split, data.val_split}
    splits: dict[str, list[str]] = {}
    for path in sorted(_tars(root)):
        folder, file = os.path.split(os.path.relpath(path, root))
        split = folder
        if folder not in known and folder.lower() not in known:
            words = [word for word in re.findall(r"[a-z]+", file.partition(".")[0].lower()) if word in known]
            if len(set(words)) > 1:
                raise ValueError(
                    f"the name of {printable(path)} has words for several splits ({', '.join(words)}): give it one, or "
                    "lay the shards of each split into a folder of its own."
                )
            split = words[0] if words else folder
        splits.setdefault(split, []).append(path)
    return splits


def _tars(root: Path) -> list[str]:
    """Tar files in a folder and in the folders of it; none of what this user may not list, which other readers name.

    None at all where one of these folders holds pictures: the first of a thousand folders of classes tells.
    """
    found = []
    with suppress(PermissionError):
        folders = [root, *(root / name for name in os.listdir(root) if not is_hidden(name))]
        for folder in folders:
            if folder.is_dir():
                tars = _tars_in(folder)
                if tars is None:
                    return []
                found += tars
    return found


def _tars_in(folder: Path) -> list[str] | None:
    """Tar files in one folder; None as soon as there is a picture, since such a list may be long."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.lower()
            if is_hidden(name):
                continue
            if name.endswith(EXTENSIONS):
                return None
            if name.endswith((".tar", *COMPRESSED)) and not entry.is_dir():
                found.append(entry.path)
    return found


# what is in them


def index_of(shards: list[str], data: DataConfig) -> Index:
    """The index of these tar files: from the cache, or made, which reads every header of them once.

    It is kept in M2MKD_CACHE (else ~/.cache/m2mkd) under what the shards are called, their sizes and when they were
    last changed.

    Raises:
        ValueError: a tar that is compressed, cut or none; images without label or the other way round; a label that is
            none; a key that stands twice. Shard and member are named.
    """
    states = []
    for path in shards:
        try:
            status = os.stat(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        states.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
    key = json.dumps([FORMAT, data.image_key, data.label_key, states])
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    cache = Path(expanded(os.environ.get("M2MKD_CACHE") or "~/.cache/m2mkd"))
    file = cache / f"shards-{digest}.npz"
    index = _load(file)
    if index is None:
        logger.info("an index of %s shards is made, once: %s ...", f"{len(shards):,}", shards[0])
        index = _made(shards, data)
        try:
            _keep(index, file)
        except OSError as error:
            logger.warning(
                "the index of the shards cannot be kept in %s (%s), so every start makes it anew: set the variable "
                "M2MKD_CACHE to a folder that can be written.",
                cache,
                error.strerror,
            )
    return index


def _unreadable(path: str, error: OSError) -> ValueError:
    return ValueError(
        f"the tar file {printable(path)} cannot be read ({error.strerror}), expected one that this user may read: "
        "copy it again, or remove what is left of it."
    )


def _load(file: Path) -> Index | None:
    """None where it is not there or not whole."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            values = {field.name: arrays[field.name] for field in fields(Index)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Index(**values | {"kind": str(values["kind"]), "remarks": str(values["remarks"])})


def _keep(index: Index, file: Path) -> None:
    """Write an index whole or not at all, whoever else does so at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("wb") as content:
            np.savez(content, **{field.name: getattr(index, field.name) for field in fields(Index)})
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)


def _made(shards: list[str], data: DataConfig) -> Index:
    tally = Tally()
    kind = _kind(shards, data)
    images: list[tuple[Any, str, str, int, _Member]] = []  # label, folder, name, shard, member
    with ThreadPoolExecutor(READERS) as threads:
        for shard, (found, passed_over) in enumerate(threads.map(partial(_images, kind=kind, data=data), shards)):
            for member, label in found:
                images.append((label, *os.path.split(member.name), shard, member))
            tally.hidden += passed_over.hidden
            tally.not_read += passed_over.not_read
    if len({type(image[0]) for image in images}) > 1:
        number, text = (next(image for image in images if isinstance(image[0], kind)) for kind in (int, str))
        raise ValueError(
            f"labels are numbers ({number[0]} of {printable(number[4].name)!r} in {printable(shards[number[3]])}) and "
            f"texts ({text[0]!r} of {printable(text[4].name)!r} in {printable(shards[text[3]])}), expected "
            "one of both: write them alike."
        )
    images.sort(key=lambda image: image[:4])
    _refuse_doubles(images, shards)
    labels = [image[0] for image in images]
    keys = sorted(set(labels)) if kind else []
    place_of = {key: place for place, key in enumerate(keys)}
    members = [image[4] for image in images]
    return Index(
        names_N=np.array([member.name.encode("utf-8", "surrogateescape") for member in members], dtype=bytes),
        shards_N=np.array([image[3] for image in images], dtype=np.int32),
        offsets_N=np.array([member.offset for member in members], dtype=np.int64),
        sizes_N=np.array([member.size for member in members], dtype=np.int64),
        keys=np.array(keys),
        codes_N=np.array([place_of.get(label, 0) for label in labels], dtype=np.int64),
        kind=kind,
        remarks=str(tally),
    )


def _kind(shards: list[str], data: DataConfig) -> str:
    """Where the labels stand: the first of LABELS that a sample of the first shard with images has; "" = nowhere."""
    kinds = {LABEL_KEY: LABELS, "cls": ("cls",), "txt": ("txt",)}.get(data.label_key, ("json",))
    for path in shards:
        with _OpenTar(path) as tar:
            samples = [parts for parts in tar.samples(data).values() if _image_of(parts, data)]
            for kind in kinds:
                with_it = [parts for parts in samples if kind in parts]
                if with_it and (kind != "json" or _field(tar, with_it[0]["json"], data.label_key) is not None):
                    return kind
            if samples:
                break
    if data.label_key != LABEL_KEY:
        raise ValueError(
            f"data.label_key {data.label_key!r} is neither an extension of a label (cls, txt) nor a field of KEY.json "
            f"in {printable(shards[0])}: leave it out, or name one that is there."
        )
    return ""


def _images(path: str, *, kind: str, data: DataConfig) -> tuple[list[tuple[_Member, Any]], Tally]:
    """Every image of a shard with its label, and what was passed over."""
    found = []
    with _OpenTar(path) as tar:
        for key, parts in tar.samples(data).items():
            image = _image_of(parts, data)
            where = f"{printable(path)}: {printable(key)!r}"
            if image is None:
                if kind in parts:
                    raise ValueError(
                        f"{where} has a label (.{kind}) and no image, expected KEY.jpg (or another of "
                        f"{', '.join(EXTENSIONS)}) beside it: add the image, or pack the shard without the label."
                    )
                continue
            if kind and kind not in parts:
                raise ValueError(
                    f"{where} has an image and no label, expected KEY.{kind} as beside other images: add it, or pack "
                    "the shard without the image."
                )
            found.append((image, _label(tar, parts[kind], kind, data.label_key) if kind else 0))
        return found, tar.tally


def _image_of(parts: dict[str, _Member], data: DataConfig) -> _Member | None:
    if data.image_key != IMAGE_KEY:
        return parts.get(data.image_key)
    images = [member for extension, member in parts.items() if f".{extension}" in EXTENSIONS]
    return images[0] if images else None


class _OpenTar:
    """A tar file whose headers are read one after another.

    Raises:
        ValueError: it is compressed, cut, or no tar.
    """

    def __init__(self, path: str):
        self.path = path
        self.tally = Tally()

    def __enter__(self) -> _OpenTar:
        try:
            self.file = open(self.path, "rb")
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, member: _Member) -> bytes:
        """The content of a member."""
        return os.pread(self.file.fileno(), member.size, member.offset)

    def samples(self, data: DataConfig) -> dict[str, dict[str, _Member]]:
        """The members of each key, by extension; hidden ones and extensions of no use are counted in `tally`.

        Raises:
            ValueError: see the class; or a member that stands twice, is a link, or a second image of its key.
        """
        samples: dict[str, dict[str, _Member]] = {}
        of_use = {*LABELS, *(extension[1:] for extension in EXTENSIONS), data.image_key}
        for member in self._members():
            name = os.path.normpath(member.name)
            folder, file = os.path.split(name)
            stem, _, extension = file.partition(".")
            extension = extension.lower()
            hidden = next((part for part in name.split("/") if is_hidden(part)), None)
            if hidden:
                self.tally.hidden[hidden_as(hidden)] += 1
                continue
            if extension not in of_use:
                self.tally.not_read[f".{extension}"] += 1
                continue
            where = f"{printable(self.path)}: {printable(member.name)!r}"
            if not member.isreg() or member.issparse():
                raise ValueError(
                    f"{where} is a link or no plain file, expected a file: pack it with tar --dereference."
                )
            parts = samples.setdefault(os.path.join(folder, stem), {})
            if extension in parts:
                raise ValueError(f"{where} stands twice in it, expected one member of each name: pack it once.")
            parts[extension] = _Member(name, member.offset_data, member.size)
            images = [other for other in parts if f".{other}" in EXTENSIONS]
            if len(images) > 1 and data.image_key == IMAGE_KEY:
                raise ValueError(
                    f"{where} is the second image of its key ({', '.join(images)}), expected one: set data.image_key "
                    "to the extension that is meant."
                )
        return samples

    def _members(self) -> Iterator[tarfile.TarInfo]:
        path = printable(self.path)
        if self.path.lower().endswith(COMPRESSED) or os.pread(self.file.fileno(), 6, 0).startswith(MAGIC):
            raise ValueError(
                f"{path} is compressed, so no place in it can be read alone, expected a plain .tar (JPEGs hardly "
                "shrink any more): uncompress it (gunzip, unxz, unzstd) if it holds shards, or unpack it to a "
                "folder of pictures."
            )
        size = os.fstat(self.file.fileno()).st_size
        try:
            with tarfile.open(fileobj=self.file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # else a header of each stays in memory
                    if not 0 <= member.size <= size - member.offset_data:
                        raise tarfile.ReadError(f"{member.name!r} reaches beyond its end")
                    yield member
                end = tar.offset
        except (tarfile.TarError, OSError, OverflowError, UnicodeError) as error:
            raise ValueError(
                f"{path} ({size:,} bytes) is cut, damaged or no tar ({printable(str(error))}): copy or pack it again."
            ) from error
        # tarfile takes a file that ends between two members, or a header it cannot read, for the end of the tar
        if os.pread(self.file.fileno(), BLOCK, end) != bytes(BLOCK):
            raise ValueError(
                f"{path} ({size:,} bytes) has no end at byte {end:,}, expected a block of zeros: it is cut or damaged; "
                "copy or pack it again."
            )


def _label(tar: _OpenTar, member: _Member, kind: str, label_key: str) -> int | str:
    """A whole number of 0 or more, or a text."""
    where = f"{printable(tar.path)}: {printable(member.name)!r}"
    if kind == "json":
        value = _field(tar, member, label_key)
        if value is None:
            raise ValueError(
                f"{where} has no field {label_key!r}, expected the label in it: add it, or set data.label_key."
            )
    else:
        value = _text(tar, member)
        if kind == "cls" and re.fullmatch(r"[+-]?\d{1,18}", value):
            value = int(value)
        elif kind == "cls":
            raise ValueError(
                f"{where} holds {value!r:.60}, expected a whole number: number the classes, and lay their names into "
                "classes.txt beside the shards, a line each; or write class names as KEY.txt."
            )
    if isinstance(value, str) and value:
        return tidy(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(
            f"{where} holds {value!r:.60} as label, expected a whole number or a text: one image has one label here; "
            "set data.label_key to the field with the class."
        )
    if not 0 <= value < MAX_CLASSES:
        raise ValueError(
            f"{where} holds label {value}, expected a number from 0 to below {MAX_CLASSES} (negative ones stand for no "
            "label, as in test splits): give it a label, or pack the shard without the image."
        )
    return value


def _field(tar: _OpenTar, member: _Member, name: str) -> Any:
    """A field of a JSON member; None where there is none."""
    text = _text(tar, member)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{printable(tar.path)}: {printable(member.name)!r} is no JSON ({printable(str(error))}): write it again."
        ) from error
    return value.get(name) if isinstance(value, dict) else None


def _text(tar: _OpenTar, member: _Member) -> str:
    if member.size > LARGEST_LABEL:
        raise ValueError(
            f"{printable(tar.path)}: {printable(member.name)!r} has {member.size:,} bytes, expected a label of at most "
            f"{LARGEST_LABEL:,}."
        )
    try:
        return tar.read(member).decode().strip()
    except UnicodeError as error:
        raise ValueError(
            f"{printable(tar.path)}: {printable(member.name)!r} is no text in UTF-8, expected a label: write it again."
        ) from error


def _refuse_doubles(images: list[tuple[Any, str, str, int, _Member]], shards: list[str]) -> None:
    """One key is one image of the data set: a shard that was copied, or packed twice, would count its images twice."""
    first_of: dict[tuple[str, str], int] = {}
    for _, folder, name, shard, _ in images:
        key = folder, name.partition(".")[0]
        if key in first_of:
            raise ValueError(
                f"key {printable(os.path.join(*key))!r} stands in {printable(shards[first_of[key]])} and in "
                f"{printable(shards[shard])}, expected every key once: remove the shard that is there twice, or give "
                "every image a key of its own."
            )
        first_of[key] = shard
