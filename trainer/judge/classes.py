"""Which logits of a model belong to the classes of a data set: the same ones, some of them, or others by a table."""

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
        rows: the logit of each class that is told, (K,) int64.
        number_of: for each class of the data its place among those, (C,) int64; -1 = its images are left out.
        names: of the K classes, in the data's words.
        note: how they were found, in one line; empty when they are the model's own in its order.
    """

    rows: np.ndarray
    number_of: np.ndarray
    names: list[str]
    note: str


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
    names: list[str | None] = list(source.labels)
    if settings.map == NUMBERS:
        names = [_by_number(name, subject, source) for name in source.labels]
    elif settings.map:
        names = _by_table(Path(expanded(settings.map)), source, allow_missing=settings.unknown == "drop")
    head = subject.labels
    if settings.map == NUMBERS:
        head = [str(row) for row in range(subject.num_classes)]
    rows, note = _rows(names, head, subject, source, settings)
    known = [number for number, row in enumerate(rows) if row is not None]
    if len(known) < 2:
        raise ValueError(
            f"{subject.name} knows {len(known)} of the {len(rows)} classes of {source.name} "
            f"({first_names(source.labels)}), expected two or more: judge it on others, or give map=FILE"
        )
    number_of = np.full(len(rows), -1, dtype=np.int64)
    number_of[known] = np.arange(len(known))
    return Placed(np.array([rows[number] for number in known]), number_of, [source.labels[k] for k in known], note)


def _rows(
    names: Sequence[str | None],
    head: Sequence[str] | None,
    subject: Subject,
    source: ImageSource,
    settings: AccuracyConfig,
) -> tuple[list[int | None], str]:
    """The model's row for each name, and how they were found; None for those that are left out."""
    asked = [name for name in names if name is not None]
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
    left_out = len(names) - len(asked)
    if left_out:
        note = "; ".join(filter(None, [note, f"{left_out} classes are not in the table, their images are left out"]))
    of_asked = iter(rows)
    return [None if name is None else next(of_asked) for name in names], note


def _by_number(name: str, subject: Subject, source: ImageSource) -> str:
    if not (name.isascii() and name.isdigit() and int(name) < subject.num_classes):
        raise ValueError(
            f"map={NUMBERS}: {source.name} has a class {name!r}, expected a number from 0 to "
            f"{subject.num_classes - 1}, the last class of {subject.name}"
        )
    return str(int(name))


def _by_table(path: Path, source: ImageSource, *, allow_missing: bool) -> list[str | None]:
    """For each class of the data the model's name of it.

    Raises:
        ValueError: no such table, or a name in it that is unknown, missing or there twice; close ones are named.
    """
    pairs = _read(path)
    for column, where in ((0, "of the data"), (1, "of the model")):
        first_of: dict[str, int] = {}
        for line, pair in enumerate(pairs, start=1):
            if pair[column] in first_of:
                raise ValueError(
                    f"map {path} has class {pair[column]!r} {where} twice, in rows {first_of[pair[column]]} and "
                    f"{line}: each class has one row"
                )
            first_of[pair[column]] = line
    table = dict(pairs)
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
    return [table.get(label) for label in labels]


def _read(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise ValueError(f"map {path} is not a file: give a table of two columns, class of the data and of the model")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=list)  # pairs: a name that is there twice is seen
            rows = [[str(cell) for cell in row] for row in content]
        else:
            rows = list(csv.reader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","))
    except (UnicodeDecodeError, ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"map {path} cannot be read: {error}") from None
    rows = [row for row in rows if row]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise ValueError(f"map {path}: row {number} has {len(row)} columns, expected two: {row}")
    if not rows:
        raise ValueError(f"map {path} is empty, expected a row for each class of the data")
    return [(tidy(own.strip()), tidy(of_model.strip())) for own, of_model in rows]
