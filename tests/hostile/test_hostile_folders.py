"""Image folders whose layout is wrong or made to hurt."""

import os
import shutil
from pathlib import Path

import pytest

from tests.hostile.driver import cases
from tests.hostile.payloads import make_pictures, train_on


def circle(root: Path) -> None:
    for name in ("here", "again"):  # two: what follows them blindly reads 2**40 folders
        (root / "train/a" / name).symlink_to(".")


def one_class(root: Path) -> None:
    for split in ("train", "validation"):
        shutil.rmtree(root / split / "b")


def no_pictures(root: Path) -> None:
    for path in root.glob("train/*/*"):
        path.unlink()


def only(root: Path, count: int) -> None:
    for path in list(root.glob("train/*/*"))[count:]:
        path.unlink()


def heic(root: Path) -> None:
    for path in root.glob("train/*/*.png"):
        path.rename(path.with_suffix(".heic"))


def one_folder_twice(root: Path) -> None:
    for split in ("train", "validation"):
        (root / split / "c").symlink_to("b")


LAYOUTS = {
    "links in a circle": (circle, ["leads to a folder that was read already", "train/a/"]),
    "one class": (one_class, ["has one class (a)", "two or more"]),
    "no pictures": (no_pictures, ["no images under", "train", ".jpeg"]),
    "pictures of a telephone": (heic, ["no images under", "left out: 32 with an extension", ".heic 32"]),
    "one folder under two classes": (one_folder_twice, ["train/c leads to a folder that was read already"]),
    "no classes": (lambda root: [shutil.rmtree(path) for path in root.glob("train/*")], ["no class folders in"]),
    "no splits": (lambda root: [shutil.rmtree(path) for path in root.glob("*")], ["'train' is not a folder in"]),
    "other classes in validation": (
        lambda root: (root / "validation/b").rename(root / "validation/c"),
        ["only in train: b", "only in validation: c"],
    ),
    "class name that is no text": (
        lambda root: [
            (root / split / "b").rename(root / split / os.fsdecode(b"b\xff\n")) for split in ("train", "validation")
        ],
        ["'b\\udcff\\n'", "give it another"],
    ),
    "smaller than the batch": (lambda root: only(root, 15), ["15 training images are fewer than", "batch of 16"]),
    "a file": (lambda root: (shutil.rmtree(root), root.write_text("")), ["is not a folder"]),
    "nothing": (shutil.rmtree, ["is not a folder"]),
    "a link to itself": (lambda root: (shutil.rmtree(root), root.symlink_to(root)), ["is not a folder"]),
}

SLOW = (
    "pictures of a telephone",
    "one folder under two classes",
    "no classes",
    "no splits",
    "a file",
    "nothing",
    "a link to itself",
)


@pytest.mark.parametrize("name", cases(LAYOUTS, SLOW))
def test_layout(hostile, tmp_path, name):
    change, expected = LAYOUTS[name]
    pictures = make_pictures(tmp_path / "pictures")
    change(pictures)
    hostile.refuse(
        f"folders: {name}",
        tmp_path,
        train_on(pictures),
        str(pictures) if name != "smaller than the batch" else "",
        *expected,
    )


def test_hub_says_of_a_folder_what_folder_says(hostile, tmp_path):
    """A class named otherwise in the validation folder, which `datasets` calls validation: no phantom class of it."""
    pictures = make_pictures(tmp_path / "pictures")
    (pictures / "validation/b").rename(pictures / "validation/B")
    (pictures / "validation").rename(pictures / "val")
    overrides = ["--phase", "teacher", "data.source=hub", f"data.path={pictures}", "data.val_split=validation"]
    hostile.refuse("folders: hub, other classes", tmp_path, overrides, "only in train: b", "only in val: B")
