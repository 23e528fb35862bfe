"""Which logits of a model belong to the classes of a data set: the same ones, some of them, or others by a table.

A table may give a class of the data several of the model's, as ObjectNet does (Barbu et al. 2019). R logits are looked
at then for K classes, and the rule is ObjectNet's: the class with the largest of all R logits is what is told, so an
answer counts as right when it is any of the model's classes that the true one is mapped to.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.files.places import expanded
from models.labels import OtherClasses, first_names, known_rows, match_classes, tidy
from trainer.config.evaluate import NUMBERS, AccuracyConfig
from trainer.config.knobs import close
from trainer.data.base import ImageSource
from trainer.judge.subjects import Subject


@dataclass(frozen=True)
class Placed:
    """Where the classes of the data stand in the model's logits.

    Attributes:
        rows: the logits that are looked at, (R,) int64, those of a class beside each other.
        class_of: which of the K classes each of them tells, (R,) int64, rising; R = K where each class has one.
        number_of: for each class of the data its place among the K, (C,) int64; -1 = its images are left out.
        names: of the K classes, in the data's words.
        note: how they were found, in one line; empty when they are the model's own in its order.
    """

    rows: np.ndarray
    class_of: np.ndarray
    number_of: np.ndarray
    names: list[str]
    note: str

    @property
    def one_to_one(self) -> bool:
        """Whether each class has one logit."""
        return len(self.rows) == len(self.names)

    def told(self, logits: np.ndarray) -> np.ndarray:
        """The class (N,) of the largest of the R logits; `logits` are all of the model's, (N, all)."""
        return self.class_of[logits[:, self.rows].argmax(axis=1)]

    def of_classes(self, values_NR: np.ndarray, combine: np.ufunc) -> np.ndarray:
        """(N, K): the values of a class's logits put together, by np.maximum or np.logaddexp."""
        if self.one_to_one:
            return values_NR
        starts = np.searchsorted(self.class_of, np.arange(len(self.names)))
        return combine.reduceat(values_NR, starts, axis=1)


def place_classes(subject: Subject, source: ImageSource, settings: AccuracyConfig) -> Placed:
    """Find them, by name, by ImageNet synset, or as `settings.map` says.

    Raises:
        ValueError: a model or images without classes, a table that does not fit, classes that the model does not have,
            or fewer than two that it has.
    """
    if not subject.num_classes:
        raise ValueError(
            f"{subject.name} has no classes, it gives features: judge it by knn, probe or fewshot, which need none"
        )
    if not source.labels:
        raise ValueError(f"{source.name} has no labels: accuracy needs them")
    names: list[tuple[str, ...]] = [(name,) for name in source.labels]
    if settings.map == NUMBERS:
        names = [(_by_number(name, subject, source),) for name in source.labels]
    elif settings.map:
        names = _by_table(Path(expanded(settings.map)), source, allow_missing=settings.unknown == "drop")
    head = subject.labels
    if settings.map == NUMBERS:
        head = [str(row) for row in range(subject.num_classes)]
    rows, note = _rows(names, head, subject, source, settings)
    known = [number for number, of_class in enumerate(rows) if of_class]
    if len(known) < 2:
        raise ValueError(
            f"{subject.name} knows {len(known)} of the {len(rows)} classes of {source.name} "
            f"({first_names(source.labels)}), expected two or more: judge it on others, or give map=FILE"
        )
    number_of = np.full(len(rows), -1, dtype=np.int64)
    number_of[known] = np.arange(len(known))
    of_known = [rows[number] for number in known]
    class_of = np.repeat(np.arange(len(known)), [len(of_class) for of_class in of_known])
    return Placed(np.concatenate(of_known), class_of, number_of, [source.labels[k] for k in known], note)


def _rows(
    names: Sequence[tuple[str, ...]],
    head: Sequence[str] | None,
    subject: Subject,
    source: ImageSource,
    settings: AccuracyConfig,
) -> tuple[list[list[int]], str]:
    """The model's rows for the names of each class, and how they were found; none for those that are left out."""
    asked = [name for of_class in names for name in of_class]
    rows: list[int | None]
    try:
        match = match_classes(
            asked,
            head,
            subject.num_classes,
            data_named=source.named or bool(settings.map),
            what=subject.name,
            where=source.name,
            policy="subset",
        )
        rows, note = list(match.rows), match.note
    except OtherClasses as error:
        found = known_rows(asked, head, subject.num_classes)
        count = sum(row is not None for row in found)
        if settings.unknown != "drop" or not count:
            hint = ""
            if count:
                hint = f". {count} of them are known: unknown=drop leaves the images of the others out"
            raise ValueError(f"{error}{hint}, or map=FILE says which is which") from None
        rows = found
        lost = [name for name, row in zip(asked, found) if row is None]
        note = f"{subject.name} does not know {len(lost)} classes, whose images are left out: {first_names(lost)}"
        if len(asked) > len(names):
            note += " (where it knows none of the others that the table gives)"
    left_out = sum(not of_class for of_class in names)
    if left_out:
        note = "; ".join(filter(None, [note, f"{left_out} classes are not in the table, their images are left out"]))
    of_asked = iter(rows)
    found_of = []
    for of_class in names:
        of_names = [next(of_asked) for _ in of_class]
        found_of.append([row for row in of_names if row is not None])
    return found_of, note


def _by_number(name: str, subject: Subject, source: ImageSource) -> str:
    if not (name.isascii() and name.isdigit() and int(name) < subject.num_classes):
        raise ValueError(
            f"map={NUMBERS}: {source.name} has a class {name!r}, expected a number from 0 to "
            f"{subject.num_classes - 1}, the last class of {subject.name}"
        )
    return str(int(name))


def _by_table(path: Path, source: ImageSource, *, allow_missing: bool) -> list[tuple[str, ...]]:
    """For each class of the data the model's names of it; none where it is left out.

    Raises:
        ValueError: no such table, or a name in it that is unknown, missing or there twice; close ones are named.
    """
    lines = _read(path)
    first_of: dict[tuple[str, str], int] = {}
    for number, (own, of_model) in enumerate(lines, start=1):
        for name, where in ((own, "of the data"), *((name, "of the model") for name in of_model)):
            if (name, where) in first_of:
                raise ValueError(
                    f"map {path} has class {name!r} {where} twice, in rows {first_of[name, where]} and {number}: each "
                    "class of the data has one row, with all the classes of the model that it stands for behind it"
                )
            first_of[name, where] = number
    table = dict(lines)
    labels = [tidy(label) for label in source.labels]
    unknown = [name for name in table if name not in set(labels)]
    if unknown:
        raise ValueError(
            f"map {path} names {len(unknown)} classes that {source.name} does not have: {first_names(unknown)}. "
            f"{close(unknown[0], labels, f'There are {first_names(labels)}')}"
        )
    missing = [label for label in labels if label not in table]
    if missing and not allow_missing:
        raise ValueError(
            f"map {path} lacks {len(missing)} classes of {source.name}: {first_names(missing)}. Add them, or set "
            "unknown=drop to leave their images out"
        )
    return [table.get(label, ()) for label in labels]


def _read(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(class of the data, classes of the model) of each row."""
    if not path.is_file():
        raise ValueError(
            f"map {path} is not a file: give a table of two columns or more, class of the data and of the model"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=list)  # pairs: a name that is there twice is seen
            rows = [[str(own), *(map(str, of) if isinstance(of, list) else [str(of)])] for own, of in content]
        else:
            rows = list(csv.reader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","))
    except (UnicodeDecodeError, ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"map {path} cannot be read: {error}") from None
    found = []
    for row in filter(None, rows):
        own, *of_model = (tidy(cell.strip()) for cell in row)
        of_model = [name for name in of_model if name]  # rows of a spreadsheet are as long as the longest
        if not own or not of_model:
            raise ValueError(
                f"map {path}: row {len(found) + 1} has {len(of_model) + bool(own)} columns, expected two or more: {row}"
            )
        found.append((own, tuple(of_model)))
    if not found:
        raise ValueError(f"map {path} is empty, expected a row for each class of the data")
    return found
