"""The walk through PATH/<split>/<class>/: which files are pictures of which class, and what is left out and why.

A folder in the folder of a split is a class, and a picture anywhere below it is one of that class, in ImageFolder's
order; links are followed. Pictures in a split without folders have no labels. What is passed over is counted: hidden
names (HIDDEN, and whatever begins with a dot), extensions of no format that decode.py reads, links that lead nowhere,
files beside the class folders.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainer.data.decode import EXTENSIONS, printable
from trainer.data.hub_splits import CLASSES_HINT, HELD_OUT_HINT, UNLABELLED_HINT, listed

# names by which `datasets` knows a split: where the folder asked for is not, the one with another name of its row is
# taken, in any case
SPLIT_NAMES = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
)
# what systems and programs leave in folders, in lower case
HIDDEN = frozenset(
    ("__macosx", "__pycache__", "@eadir", "@__thumb", "@recycle", "#recycle", "$recycle.bin", "lost+found",
     "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
)  # fmt: skip
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # these tell `datasets` of a label for each picture
SAVED = ("dataset_dict.json", "state.json")  # of a save_to_disk folder
NAMES_SHOWN = 5  # of each reason


@dataclass
class Tally:
    """What a walk passed over, for each reason how often which name, extension or class, and what else to say."""

    hidden: Counter[str] = field(default_factory=Counter)
    not_read: Counter[str] = field(default_factory=Counter)
    dead_links: Counter[str] = field(default_factory=Counter)
    beside: Counter[str] = field(default_factory=Counter)
    nested: int = 0  # pictures in folders inside of class folders
    empty: list[str] = field(default_factory=list)  # classes without a picture

    def __str__(self) -> str:
        """One line, e.g. `left out: 3 hidden (._* 2, .git 1), 12 with an extension that is not read (.heic 12)`.

        Empty when there is nothing to say.
        """
        reasons = (
            (self.hidden, "hidden"),
            (self.not_read, "with an extension that is not read"),
            (self.dead_links, "as a link to nowhere"),
            (self.beside, "beside the class folders"),
        )
        parts = []
        for counts, reason in reasons:
            if counts:
                parts.append(f"{counts.total():,} {reason} ({_most_common(counts)})")
        remarks = []
        if parts:
            remarks.append(f"left out: {', '.join(parts)}")
        if self.nested:
            remarks.append(f"in folders inside of class folders, counted as the class's: {self.nested:,} pictures")
        if self.empty:
            remarks.append(f"no picture in class folder {listed(self.empty)}")
        return "; ".join(remarks)


def split_folder(root: Path, split: str, key: str) -> str:
    """The name of the folder of a split in `root`: `split`, or the one folder there that SPLIT_NAMES takes for it.

    Args:
        key: the knob that names the split, for errors.

    Raises:
        ValueError: no such folder, or several that could be meant; the folders there are listed.
    """
    if os.path.isdir(root / split):
        return split
    if not os.path.isdir(root):
        raise ValueError(f"data.path {root} is not a folder: give the one that holds the splits.")
    folders = sorted(entry.name for entry in _entries(root) if _is_folder(entry))
    meant = other_names(split, folders)
    if len(meant) == 1:
        return meant[0]
    several = f", {' and '.join(meant)} could each be meant" if meant else ""
    hint = HELD_OUT_HINT if key == "data.val_split" else CLASSES_HINT
    raise ValueError(f"{key} {split!r} is not a folder in {root}{several}; folders there: {listed(folders)}.{hint}")


def other_names(split: str, names: Iterable[str]) -> list[str]:
    """Those of `names` by which a split is known as well (SPLIT_NAMES), in any case."""
    known = next((row for row in SPLIT_NAMES if split.lower() in row), ())
    return [name for name in names if name.lower() in known]


def class_folders(folder: Path, tally: Tally) -> list[str]:
    """Names of the classes of a split, sorted.

    Args:
        tally: what is passed over beside the class folders is counted here.

    Raises:
        ValueError: no class folders, or one whose name is no text.
    """
    classes = []
    for entry in _entries(folder):
        if is_hidden(entry.name):
            tally.hidden[hidden_as(entry.name)] += 1
        elif _leads_nowhere(entry):
            tally.dead_links[entry.name] += 1
        elif _is_folder(entry):
            classes.append(entry.name)
        else:
            tally.beside[_extension(entry.name)] += 1
    if not classes:
        remarks = f" ({tally})" if str(tally) else ""
        raise ValueError(
            f"no class folders in {folder}; expected images in {folder}/<class>/{remarks}. {UNLABELLED_HINT}"
        )
    for name in classes:
        if not name.isprintable():  # it becomes a label in JSON files and reports
            raise ValueError(f"the class folder {name!a} of {folder} has a name that is no text: give it another.")
    return sorted(classes)


def is_flat(folder: Path) -> bool:
    """Whether a folder holds pictures and no folder: images without labels."""
    found = False
    for entry in _entries(folder):
        if is_hidden(entry.name) or _leads_nowhere(entry):
            continue
        if _is_folder(entry):
            return False
        found |= entry.name.lower().endswith(EXTENSIONS)
    return found


def is_flat_picture_folder(root: Path, train_split: str) -> bool:
    """Whether a local path holds pictures without class folders and nothing else for `datasets` to read."""
    if not os.path.isdir(root) or _holds_any(root, SAVED) or _card_says_how(root / "README.md"):
        return False
    try:
        train = root / split_folder(root, train_split, "data.train_split")
    except ValueError:  # laid out in another way, which `datasets` may know
        return False
    tables = any(entry.name.endswith((".parquet", ".arrow")) for entry in [*_entries(root), *_entries(train)])
    described = _holds_any(root, METADATA) or _holds_any(train, METADATA)
    return is_flat(train) and not tables and not described


def flat_pictures(folder: Path, tally: Tally) -> list[bytes]:
    """Paths of the pictures of a flat folder, sorted; what is passed over is counted in `tally`."""
    paths = []
    for path, names in _walk(folder, folder.name, tally, set()):
        paths += [os.fsencode(os.path.join(path, name)) for name in names]
    return paths


def pictures(folder: Path, classes: list[str], tally: Tally) -> dict[str, list[bytes]]:
    """Paths of the pictures of each class, in ImageFolder's order.

    Args:
        folder: of the split.
        tally: what is passed over inside the class folders is counted here.

    Raises:
        ValueError: a folder that is reached twice, through links in a circle or to one place: its pictures would count
            many times over or under two classes, or the walk would never end. Or a folder that cannot be read.
    """
    read_already = set()
    pictures_of = {}
    for label in classes:
        names_in = dict(_walk(folder / label, label, tally, read_already))
        paths = []
        for path in sorted(names_in):
            paths += [os.fsencode(os.path.join(path, name)) for name in names_in[path]]
        pictures_of[label] = paths
        tally.nested += len(paths) - len(names_in[str(folder / label)])
        if not paths:
            tally.empty.append(label)
    return pictures_of


def is_picture_folder(root: Path, train_split: str) -> bool:
    """Whether a local path holds pictures in class folders and nothing else for `datasets` to read."""
    if not os.path.isdir(root) or is_dataset_folder(root):
        return False
    try:
        train = root / split_folder(root, train_split, "data.train_split")
        classes = class_folders(train, Tally())
    except ValueError:  # laid out in another way, which `datasets` may know
        return False
    if any(_holds_any(train / label, METADATA) for label in classes):
        return False
    read_already = set()
    walks = [_walk(train / label, label, Tally(), read_already) for label in classes]
    return any(names for _, names in itertools.chain.from_iterable(walks))


def is_dataset_folder(root: Path) -> bool:
    """Whether a folder has files that only `datasets` reads.

    Written by save_to_disk, or metadata files, parquet or arrow files in it or in a folder of it, or a README.md that
    says how it is read.
    """
    if _holds_any(root, SAVED):
        return True
    upper_folders = [root]
    for entry in _entries(root):
        if _is_folder(entry) and not is_hidden(entry.name):
            upper_folders.append(Path(entry.path))
    for folder in upper_folders:
        if _holds_any(folder, METADATA):
            return True
        if any(entry.name.endswith((".parquet", ".arrow")) for entry in _entries(folder)):
            return True
    return _card_says_how(root / "README.md")


def _walk(
    folder: Path, label: str, tally: Tally, read_already: set[tuple[int, int]]
) -> Iterator[tuple[str, list[str]]]:
    """(path, sorted names of the pictures in it) of a class folder and every folder below it."""
    to_do = [str(folder)]
    while to_do:
        path = to_do.pop()
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)  # the same whichever link leads to it
        if identity in read_already:
            raise ValueError(f"{printable(path)} leads to a folder that was read already: remove the link.")
        read_already.add(identity)
        names = []
        for entry in _entries(path):
            if is_hidden(entry.name):
                tally.hidden[hidden_as(entry.name)] += 1
            elif _leads_nowhere(entry):
                tally.dead_links[label] += 1
            elif _is_folder(entry):
                to_do.append(entry.path)
            elif entry.name.lower().endswith(EXTENSIONS):
                names.append(entry.name)
            else:
                tally.not_read[_extension(entry.name)] += 1
        yield path, sorted(names)


def _holds_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any(os.path.exists(folder / name) for name in names)


def _entries(folder: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(
            f"the folder {printable(str(folder))} cannot be read ({error.strerror}): give this user access to it, or "
            "remove it."
        ) from error


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is what systems and programs leave behind."""
    return name.startswith(".") or name.lower() in HIDDEN


def _leads_nowhere(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def hidden_as(name: str) -> str:
    """What a hidden name is counted as: macOS lays a ._NAME beside every file it copies."""
    return "._*" if name.startswith("._") else name


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no extension"


def _most_common(counts: Counter[str]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{printable(name)} {count:,}" for name, count in ordered[:NAMES_SHOWN])
    more = f" and {len(ordered) - NAMES_SHOWN} more" if len(ordered) > NAMES_SHOWN else ""
    return shown + more


def _card_says_how(card: Path) -> bool:
    """Whether the head of a dataset card names configurations or columns."""
    try:
        _, head, _ = card.read_text(errors="replace").split("---", 2)
    except (OSError, ValueError):
        return False
    return any(line.startswith(("configs:", "dataset_info:")) for line in head.splitlines())
