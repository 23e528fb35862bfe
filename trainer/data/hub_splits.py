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
from trainer.config.knobs import close
from trainer.config.load import one_line
from trainer.data.decode import printable

if TYPE_CHECKING:
    import datasets

LABEL_KEY = DataConfig.label_key  # its default: a set without this column may be one without labels
NAMES_SHOWN = 10  # of a long list in an error message
REASON_SHOWN = 300  # characters of what a library says
EXPECTED = "Expected a hub id, id@revision, a save_to_disk folder, or a folder of images or parquet files."
# what `datasets` says when a configuration is missing or unknown, and which ones its cache has
CONFIGURATIONS = re.compile(r"(?:available configs: |not found. Available: )\[([^\]]*)\]")
SEVERAL_CACHED = re.compile(r"There are multiple .* configurations in the cache: (.*)")
CACHED_CONFIGURATIONS = re.compile(r"(?s)Couldn't find cache for .*Available configs in the cache: \[([^\]]*)\]")
COMMIT = re.compile(r"[0-9a-f]{40}")
CLASSES_HINT = " If these are the classes: data.val_share=0.1 takes them all for training but for a tenth."
HELD_OUT_HINT = " Or set data.val_share=0.1 to hold out a tenth of the training images."
UNLABELLED_HINT = (
    "Images without labels can be taught from a given teacher alone: set teacher.source and teacher.head=none."
)
HUB_FILE = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")


def load_splits(path: str, configuration: str = "") -> tuple["datasets.DatasetDict", str]:
    """The splits of a hub data set (id or id@revision), a `save_to_disk` folder, or a folder of images or parquet.

    Args:
        configuration: which one of a data set that has several ("" = its only one).

    Returns:
        (splits, origin): the folder, or the hub id with the commit its files came from, as far as `datasets` tells; and
        the configuration, where it has a name of its own.

    Raises:
        ValueError: it cannot be loaded, has no such configuration, or an index of it names files outside of it.
    """
    import datasets

    folder = Path(expanded(path))
    origin = str(folder)
    options = {"name": configuration} if configuration else {}
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    if saved and configuration:
        raise ValueError(
            f"data.config is {configuration!r}, but data.path {path!r} was written by save_to_disk, which has no "
            "configurations: leave data.config out."
        )
    try:
        if saved:
            _refuse_other_files(folder)
            loaded = datasets.load_from_disk(str(folder))
        elif folder.exists():
            loaded = datasets.load_dataset(str(folder), **options)
        else:
            origin, _, revision = path.partition("@")
            loaded = datasets.load_dataset(origin, revision=revision or None, **options)
            commit = _commit(loaded)
            if COMMIT.fullmatch(revision) and commit not in (None, revision):  # the cache does not ask which
                raise ValueError(f"the cache of this machine holds commit {commit} of it and not the one asked for")
            origin = f"{origin}@{commit or revision or 'main'}"
    except MemoryError:
        raise
    except Exception as error:  # whatever the library raises, from its readers to its HTTP client: it cannot be loaded
        raise ValueError(_why_not(path, configuration, error)) from error
    if isinstance(loaded, datasets.Dataset):  # save_to_disk of one split does not keep a split's name as a key
        loaded = datasets.DatasetDict({str(loaded.split or "train"): loaded})
    chosen = _configuration_of(loaded)
    if not saved and chosen != "default":
        origin += f", configuration {chosen}"
    return loaded, origin


def _why_not(path: str, configuration: str, error: Exception) -> str:
    """One line on why `datasets` does not load something: what it says itself, or what that means here."""
    configurations = CONFIGURATIONS.search(str(error))
    if configurations:
        known = re.findall(r"'([^']+)'", configurations[1])
        if not configuration:
            return f"{path!r} has several configurations: set data.config to one of {', '.join(known)}."
        return f"data.config {configuration!r} is not a configuration of {path!r}. {close(configuration, known)}"
    several = SEVERAL_CACHED.search(str(error))
    if several:
        return f"{path!r} has several configurations in the cache: set data.config to one of {several[1]}."
    cause = error.__cause__ or error  # DatasetGenerationError says nothing itself
    reason = printable(one_line(cause)[:REASON_SHOWN]).rstrip(".")
    said = f"{type(cause).__name__}: {reason}"
    in_cache = CACHED_CONFIGURATIONS.search(str(error))
    local = Path(path).expanduser().exists() or path.startswith(("/", "./", "../", "~"))
    if in_cache or (_offline() and not local):
        what = f"configuration {configuration!r} of {path!r}" if configuration else repr(path)
        others = f"; cached of it: {in_cache[1]}" if in_cache else ""
        return (
            f"data.path {what} is not in the cache of this machine{others}. This says nothing of whether it exists: "
            "nothing is downloaded while HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set. Download it where there is a "
            f"network and share HF_HOME, or unset them ({said})."
        )
    if local and not Path(path).expanduser().exists():
        return f"data.path {path!r} cannot be loaded: there is no such folder on this machine. {EXPECTED}"
    return f"data.path {path!r} cannot be loaded: {said}. {EXPECTED}"


def _offline() -> bool:
    import datasets
    from huggingface_hub import constants

    return bool(datasets.config.HF_HUB_OFFLINE or constants.HF_HUB_OFFLINE)


def _configuration_of(loaded: Any) -> str:
    """The configuration `datasets` took; "default" where it has no name of its own."""
    names = [split.info.config_name for split in loaded.values()]
    return next((name for name in names if name), "default")


def check_columns(split: "datasets.Dataset", data: DataConfig, *, labels_needed: bool = True) -> None:
    """Raise a ValueError that lists the columns when the image or the label column is not among them.

    Args:
        labels_needed: whether the label column has to be there; one that was named has to be there anyhow.
    """
    for key, column in (("data.image_key", data.image_key), ("data.label_key", data.label_key)):
        if column in split.features:
            continue
        is_label = key == "data.label_key"
        if is_label and not labels_needed and column == LABEL_KEY:
            continue
        hint = f" {UNLABELLED_HINT}" if is_label and labels_needed else ""
        raise ValueError(
            f"{key} {column!r} is not a column of {data.path}; columns there: {listed(split.features)}.{hint}"
        )


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
