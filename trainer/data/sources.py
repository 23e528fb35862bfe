"""Where images come from: the embedded digits, a folder in ImageFolder layout, or anything `datasets` loads map-style.

A source is random access (`image(i)`, `label(i)`), because a map-style source with a seeded sampler resumes exactly and
a streamed one with a shuffle buffer does not. Images are decoded here, by PIL, for every source alike.
"""

import io
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from trainer.schema import DataConfig

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)
DIGITS_FILE = Path(__file__).with_name("digits.npz")  # see DIGITS.md
SPLITS = ("train", "val")
NAMES_SHOWN = 10  # of a long list in an error message


class UnreadableImageError(ValueError):
    """An image that PIL cannot decode, named by file or row."""


class ImageSource(ABC):
    """The images of one split. `rows` are the numbers of the images used, `targets` their labels."""

    def __init__(self, name: str, labels: Sequence[str], targets: np.ndarray, data: DataConfig):
        self.name = name
        self.labels = list(labels)
        self.skip_unreadable = data.skip_unreadable
        self.skipped: set[int] = set()  # indices found unreadable so far; only filled when skip_unreadable is on
        self.rows = np.arange(len(targets))
        if 0 < data.limit < len(targets):
            # spread over the split: most data sets are sorted by class, and the first n would be one class
            self.rows = self.rows[: data.limit] * len(targets) // data.limit
        self.targets = targets[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def label(self, index: int) -> int:
        return int(self.targets[index])

    def image(self, index: int) -> Image.Image:
        """Image `index` in RGB. Raises UnreadableImageError (a ValueError) naming the file or row."""
        return self._read(int(self.rows[index]))

    def try_image(self, index: int) -> Image.Image | None:
        """Image `index`, or None when it is unreadable and skip_unreadable is on (counted in `skipped`, logged)."""
        if index in self.skipped:
            return None
        try:
            return self.image(index)
        except UnreadableImageError as error:
            if not self.skip_unreadable:
                raise
            self.skipped.add(index)
            logger.warning("skipped: %s", error)
            return None

    def image_or_next(self, index: int) -> tuple[Image.Image, int]:
        """Image `index`, or the next readable one when skip_unreadable is on, and the index that was read."""
        for candidate in range(index, index + len(self)):
            image = self.try_image(candidate % len(self))
            if image is not None:
                return image, candidate % len(self)
        raise ValueError(f"none of the {len(self)} images of {self.name} can be read.")

    @abstractmethod
    def _read(self, row: int) -> Image.Image: ...


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

    def __init__(self, data: DataConfig, split: str):
        with np.load(DIGITS_FILE) as arrays:
            values_NHW, targets = arrays["images"], arrays["labels"].astype(np.int64)
        is_val = np.zeros(len(targets), dtype=bool)
        is_val[np.argsort(targets, kind="stable")[::5]] = True
        chosen = is_val if split == "val" else ~is_val
        grey_NHW = ((values_NHW[chosen].astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)  # 0..16 -> 0..255
        self._images_NHWC = np.repeat(grey_NHW[..., None], 3, axis=-1)
        super().__init__(f"digits {split}", [str(digit) for digit in range(10)], targets[chosen], data)

    def _read(self, row: int) -> Image.Image:
        return Image.fromarray(self._images_NHWC[row])


class FolderSource(ImageSource):
    """PATH/<split>/<class>/*.jpg, as torchvision's ImageFolder reads it."""

    def __init__(self, data: DataConfig, split: str):
        from torchvision.datasets import ImageFolder
        from torchvision.datasets.folder import IMG_EXTENSIONS

        root = Path(data.path).expanduser()
        train_classes = _class_folders(root, data.train_split, "data.train_split")
        name = data.train_split if split == "train" else data.val_split
        classes = _class_folders(root, name, f"data.{split}_split")
        if classes != train_classes:
            raise ValueError(
                f"the class folders of {root / data.train_split} and {root / name} differ: "
                f"only in {data.train_split}: {_listed(set(train_classes) - set(classes))}; "
                f"only in {name}: {_listed(set(classes) - set(train_classes))}."
            )
        samples = ImageFolder(root / name, allow_empty=True).samples
        if not samples:
            raise ValueError(f"no images under {root / name}; looked for {', '.join(IMG_EXTENSIONS)} in class folders.")
        # one array, not a million str objects: reference counts would copy those into every worker process
        self._paths = np.array([os.fsencode(path) for path, _ in samples])
        targets = np.array([target for _, target in samples], dtype=np.int64)
        super().__init__(f"folder {root / name}", classes, targets, data)

    def _read(self, row: int) -> Image.Image:
        path = os.fsdecode(self._paths[row])
        return _decode(path, path)


class HubSource(ImageSource):
    """A split of a hub data set (id or id@revision), a `save_to_disk` folder, or a folder of images or parquet."""

    def __init__(self, data: DataConfig, split: str):
        import datasets

        splits = _load_splits(data.path)
        name = data.train_split if split == "train" else data.val_split
        for key, wanted in (("data.train_split", data.train_split), (f"data.{split}_split", name)):
            if wanted not in splits:
                raise ValueError(f"{key} {wanted!r} is not in {data.path}; splits there: {_listed(splits)}.")
            _check_columns(splits[wanted], data)
        labels, targets = _labels_and_targets(splits[data.train_split], splits[name], data)
        # undecoded, so that every source decodes alike and an error can name the file
        images = splits[name].with_format(None).select_columns([data.image_key])
        try:
            self._images = images.cast_column(data.image_key, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"data.image_key {data.image_key!r} of {data.path} is no image column but "
                f"{images.features[data.image_key]}; columns there: {_listed(splits[name].features)}."
            ) from error
        self._image_key = data.image_key
        super().__init__(f"hub {data.path} {name}", labels, targets, data)

    def _read(self, row: int) -> Image.Image:
        file = self._images[row][self._image_key] or {}
        content, path = file.get("bytes"), file.get("path")
        description = f"row {row} of {self.name}" + (f" ({path})" if path else "")
        if content is None and path is None:
            raise UnreadableImageError(f"image {description} is empty. {_SKIP_HINT}")
        return _decode(io.BytesIO(content) if content is not None else path, description)


_SOURCES = {"digits": DigitsSource, "folder": FolderSource, "hub": HubSource}
_SKIP_HINT = "Repair or remove it, or set data.skip_unreadable=true."


def _decode(file: str | io.BytesIO, description: str) -> Image.Image:
    """Decode to RGB as torchvision and timm do (EXIF rotation is not applied); every failure names the image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise UnreadableImageError(
            f"image {description} cannot be read: {type(error).__name__}: {error}. {_SKIP_HINT}"
        ) from error


def _class_folders(root: Path, split: str, key: str) -> list[str]:
    folder = root / split
    if not folder.is_dir():
        if not root.is_dir():
            raise ValueError(f"data.path {root} is not a folder.")
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        raise ValueError(f"{key} {split!r} is not a folder in {root}; folders there: {_listed(found)}.")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise ValueError(f"no class folders in {folder}; images belong in {folder}/<class>/.")
    return classes


def _load_splits(path: str) -> "datasets.DatasetDict":
    import datasets

    folder = Path(path).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        elif folder.exists():
            loaded = datasets.load_dataset(str(folder))
        else:
            repo_id, _, revision = path.partition("@")
            loaded = datasets.load_dataset(repo_id, revision=revision or None)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.path {path!r} cannot be loaded: {type(error).__name__}: {error}. Expected a hub id, id@revision, "
            "a save_to_disk folder, or a folder of images or parquet files."
        ) from error
    if isinstance(loaded, datasets.Dataset):  # save_to_disk of one split does not keep a split's name as a key
        return datasets.DatasetDict({str(loaded.split or "train"): loaded})
    return loaded


def _check_columns(split: "datasets.Dataset", data: DataConfig) -> None:
    for key, column in (("data.image_key", data.image_key), ("data.label_key", data.label_key)):
        if column not in split.features:
            raise ValueError(f"{key} {column!r} is not a column of {data.path}; columns: {_listed(split.features)}.")


def _labels_and_targets(
    train: "datasets.Dataset", chosen: "datasets.Dataset", data: DataConfig
) -> tuple[list[str], np.ndarray]:
    """Label names, fixed by the train split, and the label number of every row of `chosen`."""
    import datasets

    what = f"data.label_key {data.label_key!r} of {data.path}"
    feature, values = chosen.features[data.label_key], _column(chosen, data.label_key)
    if isinstance(feature, datasets.ClassLabel):
        labels = train.features[data.label_key].names
        if feature.names != labels:
            raise ValueError(f"{what} has other class names in {data.train_split} than in {data.val_split}.")
    else:
        train_values = _column(train, data.label_key)
        kinds = {type(value) for value in [*train_values, *values]}
        if kinds == {int}:
            labels = [str(number) for number in range(max(train_values) + 1)]
        elif kinds == {str}:
            labels = sorted(set(train_values))
            numbers = {label: number for number, label in enumerate(labels)}
            values = [numbers.get(value, value) for value in values]
        else:
            raise ValueError(f"{what} must hold class labels, integers or strings and no gaps, got {feature}.")
    for row, value in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < len(labels):
            raise ValueError(
                f"{what}: row {row} is labelled {value!r}, expected one of {len(labels)} labels of split "
                f"{data.train_split!r} ({_listed(labels)})."
            )
    return labels, np.array(values, dtype=np.int64)


def _column(split: "datasets.Dataset", key: str) -> list[Any]:
    return split.with_format(None).select_columns([key])[:][key]  # leaves the images of the other column undecoded


def _listed(names: Any) -> str:
    names = sorted(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return (", ".join(map(str, names[:NAMES_SHOWN])) or "none") + more
