"""What `datasets` loads, checked before it is used: splits, columns, labels, and that no file name leads elsewhere."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.files.places import expanded
from trainer.config.data import DataConfig
from trainer.config.load import one_line
from trainer.data.decode import printable

if TYPE_CHECKING:
    import datasets

NAMES_SHOWN = 10  # of a long list in an error message
REASON_SHOWN = 300  # characters of what a library says
MAX_CLASSES = 1_000_000  # a larger label is a mistake, and a list of that many names is no small one
EXPECTED = "Expected a hub id, id@revision, a save_to_disk folder, or a folder of images or parquet files."
HUB_FILE = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")


def load_splits(path: str) -> tuple["datasets.DatasetDict", str]:
    """The splits of a hub data set (id or id@revision), a `save_to_disk` folder, or a folder of images or parquet.

    Returns:
        (splits, origin): the folder, or the hub id with the commit its files came from, as far as `datasets` tells.

    Raises:
        ValueError: it cannot be loaded, or an index of it names files outside of it.
    """
    import datasets

    folder = Path(expanded(path))
    origin = str(folder)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            _refuse_other_files(folder)
            loaded = datasets.load_from_disk(str(folder))
        elif folder.exists():
            loaded = datasets.load_dataset(str(folder))
        else:
            origin, _, revision = path.partition("@")
            loaded = datasets.load_dataset(origin, revision=revision or None)
            origin = f"{origin}@{_commit(loaded) or revision or 'main'}"
    except MemoryError:
        raise
    except Exception as error:  # whatever the library raises, from its readers to its HTTP client: it cannot be loaded
        cause = error.__cause__ or error  # DatasetGenerationError says nothing itself
        reason = printable(one_line(cause)[:REASON_SHOWN]).rstrip(".")
        what = f"{type(cause).__name__}: {reason}"
        raise ValueError(f"data.path {path!r} cannot be loaded: {what}. {EXPECTED}") from error
    if isinstance(loaded, datasets.Dataset):  # save_to_disk of one split does not keep a split's name as a key
        return datasets.DatasetDict({str(loaded.split or "train"): loaded}), origin
    return loaded, origin


def check_columns(split: "datasets.Dataset", data: DataConfig) -> None:
    """Raise a ValueError that lists the columns when the image or the label column is not among them."""
    for key, column in (("data.image_key", data.image_key), ("data.label_key", data.label_key)):
        if column not in split.features:
            columns = listed(split.features)
            raise ValueError(f"{key} {column!r} is not a column of {data.path}; columns there: {columns}.")


def labels_and_targets(
    train: "datasets.Dataset", chosen: "datasets.Dataset", data: DataConfig
) -> tuple[list[str], np.ndarray]:
    """Label names, fixed by the train split, and the label number of every row of `chosen`.

    Raises:
        ValueError: an empty split, labels that are no labels, or one that the train split does not have.
    """
    import datasets

    what = f"data.label_key {data.label_key!r} of {data.path}"
    for name, split in ((data.train_split, train), (data.val_split, chosen)):
        if not len(split):
            raise ValueError(f"split {name!r} of {data.path} has no rows: set data.train_split and data.val_split.")
    feature = chosen.features[data.label_key]
    values = _column(chosen, data.label_key)
    if isinstance(feature, datasets.ClassLabel):
        labels = train.features[data.label_key].names
        if feature.names != labels:
            raise ValueError(
                f"{what} has other class names in {data.train_split} than in {data.val_split}: give both the same."
            )
    else:
        train_values = _column(train, data.label_key)
        kinds = set(map(type, train_values)) | set(map(type, values))
        if kinds == {int}:
            largest = max(train_values)
            if largest >= MAX_CLASSES:
                raise ValueError(f"{what} goes up to {largest}, expected numbers from 0 to below {MAX_CLASSES}.")
            labels = list(map(str, range(largest + 1)))
        elif kinds == {str}:
            labels = sorted(set(train_values))
            number_of = {label: number for number, label in enumerate(labels)}
            # a label that the train split does not have stays a text, and is refused below
            values = [number_of.get(value, value) for value in values]
        else:
            raise ValueError(f"{what} holds {feature}, expected class labels, integers or strings and no gaps.")
    for row, value in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < len(labels):
            raise ValueError(
                f"{what}: row {row} is labelled {value!r}, expected one of {len(labels)} labels of split "
                f"{data.train_split!r} ({listed(labels)})."
            )
    return labels, np.array(values, dtype=np.int64)


def refuse_outside(images: "datasets.Dataset", key: str, path: str) -> None:
    """Images that are named and not embedded must lie under `path`, or in the caches of `datasets` and the hub.

    A row of a parquet file or of metadata.csv can name any file of this machine; what it names would be decoded. Links
    in the folder may lead out of it: whoever made them has access here.

    Raises:
        ValueError: the first row that names a file elsewhere.
    """
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    config = datasets.config
    roots = [Path(expanded(path)), config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE]
    roots += list(map(os.path.realpath, roots))
    allowed = tuple(os.path.join(os.path.abspath(root), "") for root in roots)
    for row, file in _named_files(images, key):
        if not os.path.abspath(file).startswith(allowed):
            raise ValueError(
                f"row {row} of data.path {path!r} names a file outside of it, {printable(file)}: embed the images in "
                "the data set or give paths inside its folder."
            )


def listed(names: Iterable[Any]) -> str:
    """Sorted names in one line, cut when they are many."""
    names = sorted(names)
    shown = ", ".join(map(str, names[:NAMES_SHOWN]))
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return printable(shown or "none") + more


def _named_files(images: "datasets.Dataset", key: str) -> Iterable[tuple[int, str]]:
    """(row of the table, path) of every image without content; the contents themselves are not touched."""
    start = 0
    for chunk in images.data.column(key).chunks:
        content = chunk.field("bytes")
        names = chunk.field("path")
        if content.null_count:
            without_content = content.is_null().to_numpy(zero_copy_only=False)
            for row in np.flatnonzero(without_content).tolist():
                name = names[row].as_py()
                if name:
                    yield start + row, name
        start += len(chunk)


def _refuse_other_files(folder: Path) -> None:
    """`load_from_disk` opens whatever path its JSON files name."""
    names = []
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        names += splits
        states = [folder / name / "state.json" for name in splits if _plain(name)]
    else:
        states = [folder / "state.json"]
    for state in states:
        files = json.loads(state.read_text())["_data_files"]
        if not files:
            raise ValueError(f"split {state.parent.name!r} has no rows")
        names += [file["filename"] for file in files]
    for name in names:
        if not _plain(name):
            raise ValueError(f"{name!r} is not a plain name of something in this folder")


def _plain(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _commit(loaded: Any) -> str | None:
    """The commit of the hub that `datasets` read, from its record of the files; None when it keeps none."""
    for split in loaded.values():
        for file in split.info.download_checksums or ():
            address = HUB_FILE.match(file)
            if address:
                return address[1]
    return None


def _column(split: "datasets.Dataset", key: str) -> list[Any]:
    return split.with_format(None).select_columns([key])[:][key]  # leaves the images of the other column undecoded
