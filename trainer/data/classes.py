"""The classes of a data set: their names and numbers, how many images each has, and what is odd about that.

A class is a name. Both splits are read by the names of the training split, whatever numbers their own files use, and
names are kept in one form (models/labels.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import numpy as np

from models.labels import differences, first_names, folded, printable, tidy
from trainer.config.data import DataConfig

if TYPE_CHECKING:
    import datasets

MAX_CLASSES = 1_000_000  # a larger label is a mistake
LISTED = 12  # as many classes are all listed with their counts, of more the smallest few
SMALLEST = 3
FEW_IMAGES = 3  # of a class in training: with fewer it is worth a line
EXPECTED = "expected class labels, integers or strings"


class Counted(Protocol):
    """What the checks below need of an image source."""

    name: str
    labels: list[str]
    targets: np.ndarray  # of the images used
    counts: np.ndarray  # per class, before data.limit


# names


def checked_names(names: Sequence[str], where: str) -> list[str]:
    """Class names in the one form they are kept in.

    Raises:
        ValueError: a name that is empty or no text, or two that are one: equal but for white space or Unicode form.
    """
    first_of: dict[str, str] = {}
    kept = []
    for name in names:
        if not name.strip():
            raise ValueError(f"{where} has a class whose name {name!r} is empty: give it a name.")
        if not name.isprintable():  # it becomes a label in JSON files and reports
            raise ValueError(f"{where} has a class {name!a} whose name is no text: give it another.")
        form = " ".join(tidy(name).split())
        if form in first_of:
            raise ValueError(
                f"{where} has two classes {first_of[form]!a} and {name!a}, which differ in white space or Unicode form "
                "alone: give both one name."
            )
        first_of[form] = name
        kept.append(tidy(name))
    return kept


def refuse_differing_folders(
    train: Sequence[str], other: Sequence[str], train_name: str, name: str, where: str
) -> None:
    """Raise a ValueError when two splits of a folder do not have the same classes; both sides are named."""
    if sorted(train) != sorted(other):
        raise ValueError(f"{where} differ: {differences(train, other, name, train_name)}. Give both the same folders.")


# labels of what `datasets` loads


def labels_and_targets(
    train: datasets.Dataset, chosen: datasets.Dataset, data: DataConfig, name: str
) -> tuple[list[str], np.ndarray, bool, str]:
    """Label names, fixed by the train split, and the label number of every row of `chosen`.

    Integers of a plain column are renumbered: the classes are the numbers that occur in the train split, sorted, and
    called by them. Text is sorted as text.

    Args:
        name: of the chosen split in the data set.

    Returns:
        (names, targets (N,) int64, whether anybody gave the names, a remark in one line or "").

    Raises:
        ValueError: an empty split, labels that are no labels, or one that the train split does not have.
    """
    what = f"data.label_key {data.label_key!r} of {data.path}"
    for split_name, split in ((data.train_split, train), (name, chosen)):
        if not len(split):
            raise ValueError(
                f"split {split_name!r} of {data.path} has no rows: set data.train_split and data.val_split."
            )
    values = _labels_of(chosen, data.label_key, what, name)
    if name == data.train_split:
        train_values = values
    else:
        train_values = _labels_of(train, data.label_key, what, data.train_split)
    kinds = {type(train_values[0]), type(values[0])}
    if len(kinds) > 1:
        train_kind = train.features[data.label_key]
        raise ValueError(
            f"{what} holds {train_kind} in {data.train_split} and {chosen.features[data.label_key]} in {name}: give "
            "both splits the same kind of labels."
        )
    remark, named = "", True
    train_names = _class_label_names(train, data.label_key)
    if train_names is not None:
        keys: list[Any] = checked_names(train_names, what)
        _compare_class_labels(keys, chosen, data, what, name)
    elif kinds == {int}:
        keys = sorted(set(train_values))
        named, remark = numbered(keys)
    else:
        keys = sorted(set(train_values))
        checked_names(keys, what)
    labels = [str(key) for key in keys]
    number_of = {key: number for number, key in enumerate(keys)}
    for row, value in enumerate(values):
        if value not in number_of:
            raise ValueError(
                f"{what}: row {row} is labelled {value!r}, expected one of {len(labels)} labels of "
                f"split {data.train_split!r} ({first_names(labels, 10)}).{near(value, labels)}"
            )
    targets = np.fromiter((number_of[value] for value in values), dtype=np.int64, count=len(values))
    return labels, targets, named, remark


def numbered(keys: Sequence[int]) -> tuple[bool, str]:
    """Whether sorted label numbers name their classes, which 0, 1, 2 ... do not, and a remark on it."""
    if list(keys) == list(range(len(keys))):
        return False, ""
    numbers = first_names([str(key) for key in keys])
    return True, f"label numbers {numbers} are the classes 0 to {len(keys) - 1}, named by their numbers"


def _labels_of(split: datasets.Dataset, key: str, what: str, name: str) -> list[Any]:
    """The label of every row: a name where the column has names or text, else a whole number of 0 or more.

    Raises:
        ValueError: labels that are missing, negative, or neither.
    """
    values = split.with_format(None).select_columns([key])[:][key]  # leaves the images of the other column undecoded
    kinds = Counter(map(type, values))
    gaps = kinds.pop(type(None), 0)
    if gaps:
        row = values.index(None)
        raise ValueError(
            f"{what} has no label in {gaps:,} of {len(values):,} rows of split {name!r}, the first is row {row}: "
            f"{EXPECTED} and no gaps. {_how_to_drop(gaps, len(values))}"
        )
    if len(kinds) > 1 or next(iter(kinds)) not in (int, str):
        holds = f"{split.features[key]} ({values[0]!r:.60})"
        raise ValueError(f"{what} holds {holds} in split {name!r}, {EXPECTED}. {_advice(values[0])}")
    names = _class_label_names(split, key)
    if kinds.keys() == {str}:
        return [tidy(value) for value in values]
    least, largest = min(values), max(values)
    if least < 0:
        count = sum(value < 0 for value in values)
        row = next(row for row, value in enumerate(values) if value < 0)
        among = f" ({first_names(names, 10)})" if names is not None else ""
        expected = f"expected one of {len(names)} labels{among}" if names is not None else "expected 0 or more"
        raise ValueError(
            f"{what}: row {row} is labelled {values[row]}, {expected}; {count:,} of {len(values):,} rows of split "
            f"{name!r} are negative, which stands for no label. {_how_to_drop(count, len(values))}"
        )
    if names is None:
        if largest >= MAX_CLASSES:
            raise ValueError(f"{what} goes up to {largest}, expected numbers from 0 to below {MAX_CLASSES}.")
        return values
    if largest >= len(names):
        row = values.index(largest)
        raise ValueError(
            f"{what}: row {row} is labelled {largest}, expected one of {len(names)} labels ({first_names(names, 10)})."
        )
    tidy_names = [tidy(label) for label in names]
    return [tidy_names[value] for value in values]


def _how_to_drop(without: int, rows: int) -> str:
    if without == rows:
        return "It is a split without labels, as test splits often are: set another one in data.val_split."
    return "Remove these rows, or give them a label."


def _advice(value: Any) -> str:
    """The next step for a kind of value that is no label."""
    if isinstance(value, bool):
        return "Cast true and false to 1 and 0, or to names."
    if isinstance(value, float):
        return "Cast the column to integers."
    if isinstance(value, list):
        return "One image has one label here: a data set with several per image cannot be used."
    return "Set data.label_key to the column with the class."


def _class_label_names(split: datasets.Dataset, key: str) -> list[str] | None:
    import datasets

    feature = split.features[key]
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def _compare_class_labels(labels: list[str], chosen: datasets.Dataset, data: DataConfig, what: str, name: str) -> None:
    """Another order of the same names is read by name; other names are refused."""
    names = _class_label_names(chosen, data.label_key)
    if names is None:
        return  # texts, which are compared one by one
    names = [tidy(label) for label in names]
    if sorted(names) != sorted(labels):
        raise ValueError(
            f"{what} has other class names in {data.train_split} than in {name}: "
            f"{differences(labels, names, name, data.train_split)}. Give both the same."
        )


def near(value: Any, labels: Sequence[str]) -> str:
    """The label that was meant, where only its spelling is another; else nothing."""
    same = [label for label in labels if folded(label) == folded(str(value))]
    return f" {same[0]!r} differs in case, spaces or underscores alone." if same else ""


# how many images each class has


def describe(train: Counted, val: Counted) -> str:
    """Images per class and split in one line, e.g. `images per class: cat 10 + 2, dog 8 + 2 (training + validation)`.

    Of the images used, after data.limit. Of more than LISTED classes only the smallest, the median and the largest
    count, and which classes are smallest.
    """
    if not train.labels:
        return "without labels"
    if len(train.labels) <= LISTED:
        rows = zip(train.labels, _used(train).tolist(), _used(val).tolist())
        each = ", ".join(f"{printable(name)} {t:,} + {v:,}" for name, t, v in rows)
        return f"images per class (training + validation): {each}"
    parts = []
    for kind, source in (("training", train), ("validation", val)):
        counts = _used(source)
        smallest = np.argsort(counts, kind="stable")[:SMALLEST]
        named = ", ".join(f"{printable(source.labels[c])} {counts[c]:,}" for c in smallest)
        parts.append(f"{kind} {counts.min():,} to {counts.max():,}, median {np.median(counts):g}, smallest {named}")
    return f"images per class: {'; '.join(parts)}"


def doubts(train: Counted, val: Counted) -> list[str]:
    """What a person should know of the classes before trusting a run on them, a line each.

    Raises:
        ValueError: a class without a training image whose name is nearly that of another: one class, spelt twice.
    """
    if not train.labels:
        return []
    found = []
    spelt = {folded(name): name for name, count in zip(train.labels, train.counts) if count}
    for c in np.flatnonzero(train.counts == 0):
        twin = spelt.get(folded(train.labels[c]))
        if twin is not None and val.counts[c]:
            raise ValueError(
                f"{train.name}: class {train.labels[c]!r} has no training image but {val.counts[c]:,} validation "
                f"images, and {twin!r} differs from it in case, spaces or underscores alone. Give both splits the same "
                "names."
            )
    spellings = Counter(map(folded, train.labels))
    alike = [name for name in train.labels if spellings[folded(name)] > 1]
    if alike:
        shown = first_names(alike)
        found.append(f"{train.name}: {shown} differ in case, spaces or underscores alone; each is a class of its own")
    for kind, source in (("training", train), ("validation", val)):
        without = np.flatnonzero(_used(source) == 0)
        if len(without):
            names = first_names([source.labels[c] for c in without])
            found.append(
                f"{source.name}: {len(without):,} of {len(source.labels):,} classes have no {kind} image: {names}"
            )
    scarce = np.flatnonzero((train.counts > 0) & (train.counts < FEW_IMAGES))
    if len(scarce) and train.counts.max() > 1:
        names = first_names([f"{train.labels[c]} {train.counts[c]}" for c in scarce])
        found.append(
            f"{train.name}: {len(scarce):,} of {len(train.labels):,} classes have fewer than {FEW_IMAGES} training "
            f"images, of which nothing general is learned: {names}"
        )
    if len(train.labels) > 2 and train.counts.max() == 1:
        found.append(f"{train.name}: every class has one image; is data.label_key the column with the class?")
    return found


def _used(source: Counted) -> np.ndarray:
    """Images per class, of those used."""
    return np.bincount(source.targets, minlength=len(source.labels))


# validation images held out of the training split


def held_out(targets: np.ndarray, labels: Sequence[str], share: float) -> np.ndarray:
    """Which images are validation when a share of each class is held out.

    Of every class with two images or more both parts get at least one; a single image stays in training. The draw
    depends on the names of the classes and the numbers of their images alone: not on seed, ranks or versions.

    Args:
        targets: (N,) label number of each image, in the order of the data.
        share: of each class, above 0 and below 1.

    Returns:
        (N,) bool, True for validation.

    Raises:
        ValueError: no class has two images.
    """
    is_val = np.zeros(len(targets), dtype=bool)
    order = np.argsort(targets, kind="stable")
    bounds = np.searchsorted(targets[order], np.arange(len(labels) + 1))
    for label, start, end in zip(labels, bounds[:-1], bounds[1:]):
        images = order[start:end]
        count = min(max(round(share * len(images)), 1), len(images) - 1)
        if count < 1:
            continue
        # the legacy generator, whose draws never change between versions of numpy
        draw = np.random.RandomState(crc32(label.encode("utf-8", "surrogateescape"))).permutation(len(images))
        is_val[images[draw[:count]]] = True
    if not is_val.any():
        raise ValueError(f"data.val_share is {share}, but no class has two images: give more images, or a val_split.")
    return is_val
