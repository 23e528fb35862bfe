"""Whether two lists of class names mean the same classes, and which row of a head belongs to which class.

A class is a name, not a number: two lists of the same classes may stand in different orders, be spelt differently, or
speak different languages (the ImageNet synsets of a folder, the words of a model of the hub). One place for all of it:
teachers, students to start from, results of other runs and validation splits are compared with the data here.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 5  # names of a long list in one line
IMAGENET_CLASSES = 1000
MADE_UP = 0.01  # share of ImageNet's names that may be others than WordNet's
SYNSET = re.compile(r"n\d{8}")
UNNAMED = re.compile(r"LABEL_(\d+)")  # transformers' own words where nobody gave names
POLICIES = ("names", "subset", "numbers")  # of teacher.classes


class OtherClasses(ValueError):
    """A head does not have the data's classes; `problem` says it in short, without a next step."""

    def __init__(self, problem: str, message: str) -> None:
        super().__init__(message)
        self.problem = problem


@dataclass(frozen=True)
class Match:
    """Where the classes of a head are found.

    Attributes:
        rows: number of the head's row for each class of the data, in the data's order.
        note: what a person should know of it in one line; empty when both lists are the same.
        sure: whether names say so; False when only their places do.
    """

    rows: tuple[int, ...]
    note: str = ""
    sure: bool = True


def tidy(name: str) -> str:
    """A class name in the one form all are kept in: composed Unicode (macOS writes names decomposed)."""
    return unicodedata.normalize("NFC", name)


def names_tell(data: Sequence[str], head: Sequence[Any] | None) -> bool:
    """Whether the names of the data's classes mean something in the words of a head with more classes than the data.

    They do where the head has names, and where the data has the synsets of ImageNet; numbers as names tell nothing.
    """
    if all(name.isascii() and name.isdigit() for name in data):
        return False
    return known_names(head) is not None or all(SYNSET.fullmatch(name) for name in data)


def folded(name: str) -> str:
    """What two spellings of one name have in common: no case, `_` as a space, one space between words."""
    text = unicodedata.normalize("NFKC", name).casefold().replace("_", " ")
    return " ".join(text.split())


def first_names(names: Sequence[str], shown: int = SHOWN) -> str:
    """The first names of a list in one line, in their order."""
    text = ", ".join(printable(name) for name in names[:shown])
    more = len(names) - shown
    return f"{text} and {more} more" if more > 0 else text


def _names_from(first: int, names: Sequence[str]) -> str:
    """The names from the first place at which two lists differ."""
    where = f"from class {first} on " if first else ""
    return where + first_names(names[first:])


def printable(name: str) -> str:
    """A name as part of a line: control characters and bytes that are no text are escaped."""
    return name if name.isprintable() else ascii(name)[1:-1]


def known_names(names: Sequence[Any] | None) -> list[str] | None:
    """The names of a checkpoint's classes; None when nobody gave any (LABEL_0, LABEL_1, ...)."""
    if not names:
        return None
    names = [tidy(str(name)) for name in names]
    return None if all(UNNAMED.fullmatch(name) for name in names) else names


def match_classes(
    data: Sequence[str],
    head: Sequence[str] | None,
    num_classes: int,
    *,
    data_named: bool,
    what: str,
    where: str,
    policy: str = "names",
    policy_key: str = "",
) -> Match:
    """Find the row of a head for every class of the data.

    Args:
        data: class names of the data, by number.
        head: those of the head; None = it has no names.
        num_classes: rows of the head.
        data_named: False when the data's classes are plain numbers 0, 1, 2 ... that nobody gave a name.
        what: the owner of the head in messages, "teacher x/y".
        where: the data in messages.
        policy: "names"; "subset" = the head may have more classes than the data; "numbers" = class i of the data is
            row i, whatever it is called.
        policy_key: the knob that sets it, for messages; empty = there is none.

    Raises:
        OtherClasses: other classes, or another number of them.
        ValueError: names that leave open which is which.
    """
    data = [tidy(name) for name in data]
    head = known_names(head)
    counts = f"{what} has {num_classes} classes and the data ({where}) has {len(data)}"
    by_number = tuple(range(len(data)))
    if policy == "numbers":
        if num_classes != len(data):
            raise OtherClasses(counts, f"{counts}: {policy_key}=numbers needs as many. Use one fine-tuned on this data")
        if head == data:
            return Match(by_number)
        return Match(by_number, f"{what}: class i of the data is row i of its head, as {policy_key}=numbers says")
    if head is None:
        head = _names_of_unnamed(data, num_classes, what, policy, policy_key)
        if head is None:
            return _by_number(data, num_classes, counts, f"{what} does not name its classes", policy_key)
    elif not data_named and len(head) == len(data) and sorted(head) != sorted(data):
        return _by_number(data, num_classes, counts, f"the data ({where}) has numbers for its classes", policy_key)
    if head == data:
        return Match(by_number)
    rows = _rows(data, head)
    if rows is None or (len(head) > len(data) and policy != "subset"):
        raise _refusal(data, head, rows is not None, counts, what, policy_key)
    order, how = rows
    if len(head) > len(data):
        kept = [head[row] for row in order]
        text = f"{what} has {num_classes} classes; the rows of the data's {len(data)} are kept: {first_names(kept)}"
        return Match(order, text + how)
    if order == by_number:
        return Match(order, f"{what} has the data's classes in the data's order{how}")
    first = next(number for number, row in enumerate(order) if row != number)
    theirs, ours = _names_from(first, head), _names_from(first, data)
    done = f"the rows of its head are put into the data's, {ours}"
    text = f"{what} has the data's classes in another order, {theirs}; {done}"
    return Match(order, text + how)


def refuse_other_classes(
    data: Sequence[str], other: Sequence[str] | None, *, what: str, where: str, step: str
) -> str | None:
    """Compare the classes of something made on other data, which cannot be put into another order.

    Args:
        what, where: what it is, and the data, in messages.
        step: the end of the message, what to do.

    Returns:
        None, or a line to log: its classes are not known by name.

    Raises:
        ValueError: other classes, or the same ones in another order; both sides are named.
    """
    data = [tidy(name) for name in data]
    other = known_names(other)
    if other is None:
        return f"{what} does not say which classes it was made on: they are taken to be those of the data, in order"
    if other == data:
        return None
    if sorted(other) == sorted(data):
        first = next(number for number, name in enumerate(data) if name != other[number])
        raise ValueError(
            f"{what} was made on classes in another order: {_names_from(first, other)} there, "
            f"{_names_from(first, data)} in {where}. {step}"
        )
    raise ValueError(f"{what} was made on other classes: {differences(data, other, 'it')}. {step}")


def differences(data: Sequence[str], other: Sequence[str], other_side: str, data_side: str = "the data") -> str:
    """What is only on either side, and which of it is nearly the same, as part of a message."""
    in_data, in_other = set(data), set(other)
    only_data = [name for name in data if name not in in_other]
    only_other = [name for name in other if name not in in_data]
    parts = []
    for side, names in ((data_side, only_data), (other_side, only_other)):
        parts.append(f"only in {side}: {first_names(names) if names else 'none'}")
    close = _close(only_data, only_other)
    if close:
        parts.append(close)
    return "; ".join(parts)


def _close(only_here: Sequence[str], only_there: Sequence[str]) -> str:
    """The pairs that are nearly the same; those that differ in case and spaces alone are said to."""
    there_by_fold = {folded(name): name for name in only_there}
    pairs = [(name, there_by_fold[folded(name)]) for name in only_here if folded(name) in there_by_fold]
    if pairs:
        shown = ", ".join(f"{printable(a)!r} and {printable(b)!r}" for a, b in pairs[:3])
        return f"{shown} differ only in case, spaces or underscores"
    for name in only_here[:3]:
        near = difflib.get_close_matches(name, only_there, n=1)
        if near:
            pairs.append((name, near[0]))
    return ", ".join(f"{printable(a)!r} is close to {printable(b)!r}" for a, b in pairs)


def _names_of_unnamed(
    data: Sequence[str], num_classes: int, what: str, policy: str, policy_key: str
) -> list[str] | None:
    """What the classes of a head without names are called in the data's words; None where only places can tell.

    "0", "1", ... where the data's classes are numbers; with policy "subset" also the synsets of ImageNet-1k, in the
    order everybody has them in.

    Raises:
        ValueError: the order of the data's numbers as text, 1, 10, 2, is not their order as numbers.
    """
    subset = policy == "subset"
    if all(name.isascii() and name.isdigit() for name in data):
        numbers = [int(name) for name in data]
        if not subset and len(data) != num_classes:
            return None
        if numbers != sorted(numbers):
            say_so = f"Set {policy_key}=numbers if its head has them in this order, or" if policy_key else "Please"
            raise ValueError(
                f"{what} does not name its classes, and those of the data are numbers in the order of text, "
                f"{first_names(data)}. {say_so} give it names (id2label in its config.json)"
            )
        if numbers == list(range(num_classes)) or (subset and numbers[-1] < num_classes):
            return [str(number) for number in range(num_classes)]
    if subset and all(SYNSET.fullmatch(name) for name in data):
        from timm.data import ImageNetInfo

        synsets = ImageNetInfo("imagenet-1k").label_names()
        if num_classes == len(synsets):
            return list(synsets)
    return None


def _by_number(data: Sequence[str], num_classes: int, counts: str, why: str, policy_key: str) -> Match:
    if num_classes != len(data):
        raise OtherClasses(counts, f"{counts}: use one fine-tuned on this data")
    hint = f"; {policy_key}=numbers says that it is so" if policy_key else ""
    text = f"{why}: class i of the data is taken to be row i of the head ({first_names(data)}){hint}"
    return Match(tuple(range(len(data))), text, sure=False)


def _rows(data: list[str], head: list[str]) -> tuple[tuple[int, ...], str] | None:
    """Rows of the head for the classes of the data, and how the names were read; None when one is not found."""
    rows = _looked_up(data, head)
    if rows is not None:
        return rows, ""
    rows = _looked_up([folded(name) for name in data], [folded(name) for name in head])
    if rows is not None:
        pairs = [(name, head[row]) for name, row in zip(data, rows) if name != head[row]]
        shown = ", ".join(f"{printable(a)!r} is {printable(b)!r}" for a, b in pairs[:3])
        return rows, f" ({shown}: they differ only in case, spaces or underscores)"
    synsets = _as_synsets(data, head)
    if synsets is None:
        return None
    rows = _looked_up(*synsets)
    if rows is None:
        return None
    shown = ", ".join(f"{printable(data[i])!r} is {printable(head[rows[i]])!r}" for i in range(min(2, len(data))))
    return rows, f" (by their ImageNet synsets: {shown})"


def known_rows(data: Sequence[str], head: Sequence[Any] | None, num_classes: int) -> list[int | None]:
    """The row of a head for each class of the data that it has, read as match_classes reads all of them; else None.

    A name that stands in the head twice, or that two classes of the data share, belongs to no row.
    """
    data = [tidy(name) for name in data]
    names = known_names(head)
    if names is None:
        names = _names_of_unnamed(data, num_classes, "the head", "subset", "")
    if names is None:
        return [None] * len(data)
    readings = [(data, names), ([folded(name) for name in data], [folded(name) for name in names])]
    synsets = _as_synsets(data, names)
    if synsets is not None:
        readings.append(synsets)
    found = []
    for ours, theirs in readings:
        row_of = {name: row for row, name in enumerate(theirs) if theirs.count(name) == 1}
        found.append([row_of.get(name) if ours.count(name) == 1 else None for name in ours])
    return min(found, key=lambda rows: rows.count(None))  # of equally many the plainest reading


def _looked_up(data: Sequence[str], head: Sequence[str]) -> tuple[int, ...] | None:
    """Where each name of `data` stands in `head`; None when one is missing or stands there, or here, twice."""
    row_of = {name: row for row, name in enumerate(head)}
    if len(row_of) < len(head) or len(set(data)) < len(data):
        return None
    if not all(name in row_of for name in data):
        return None
    return tuple(row_of[name] for name in data)


def _refusal(
    data: list[str], head: list[str], all_found: bool, counts: str, what: str, policy_key: str
) -> OtherClasses:
    step = "use one fine-tuned on this data"
    if policy_key and all_found:
        step += f", or set {policy_key}=subset to keep the rows of the data's classes alone"
    elif policy_key and len(head) == len(data):
        step += f", or set {policy_key}=numbers if they are the same classes in the same order under other names"
    repeated = [name for name in dict.fromkeys(head) if head.count(name) > 1]
    if len(head) != len(data):
        problem = counts
    elif sorted(data) == sorted(head) and repeated:
        problem = f"{what} has the data's classes in another order"
    else:
        problem = f"{what} has other classes than the data"
    text = f"{problem}: {differences(data, head, 'its head')}"
    if repeated:
        text += f"; {first_names(repeated)} stands more than once in its head, so which is which is open"
    return OtherClasses(problem, f"{text}. {step[0].upper()}{step[1:]}")


def _as_synsets(data: list[str], head: list[str]) -> tuple[list[str], list[str]] | None:
    """Both lists as ImageNet synsets (n01440764), where one is written so or both have all 1000 in words; else None."""
    written = [all(SYNSET.fullmatch(name) for name in names) for names in (data, head)]
    if all(written) or (not any(written) and not len(data) == len(head) == IMAGENET_CLASSES):
        return None
    sides = []
    for names, is_synsets in zip((data, head), written):
        synsets = names if is_synsets else _synsets_of_words(names)
        if synsets is None:
            return None
        sides.append(synsets)
    return sides[0], sides[1]


def _synsets_of_words(names: Sequence[str]) -> list[str] | None:
    """The ImageNet-1k synset of each name in words, "tench, Tinca tinca"; None when one is unknown or ambiguous.

    Two synsets are called "crane". In a list of all 1000 in ImageNet's own order the place tells which.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    synsets = info.label_names()
    words_of = {synset: _words(info.label_name_to_description(synset)) for synset in synsets}
    if _stand_in_order(names, [words_of[synset] for synset in synsets]):
        return list(synsets)
    found = []
    for name in names:
        words = _words(name)
        candidates = [synset for synset in synsets if words_of[synset] == words]
        if not candidates:
            candidates = [synset for synset in synsets if words <= words_of[synset]]
        if len(candidates) != 1:
            return None
        found.append(candidates[0])
    return found


def _stand_in_order(names: Sequence[str], words_of: Sequence[frozenset[str]]) -> bool:
    """Whether names stand in the order of these synsets.

    Each has a word of the synset of its place, but for a few that somebody made up ("crane2"); and those have no word
    of another's place.
    """
    if len(names) != len(words_of):
        return False
    others = [place for place, name in enumerate(names) if not _words(name) & words_of[place]]
    if len(others) > MADE_UP * len(names):
        return False
    return not any(_words(names[place]) & words_of[other] for place in others for other in others)


def _words(name: str) -> frozenset[str]:
    """The names of one synset: "tench, Tinca tinca" has two."""
    return frozenset(folded(part) for part in name.split(","))
