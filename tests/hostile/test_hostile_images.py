"""Pictures made to hurt: bombs, fragments, wrong contents, and files that are no files."""

import os
from pathlib import Path

import pytest
from PIL import Image

from tests.hostile.driver import cases
from tests.hostile.payloads import CONTENTS, NOISE, make_pictures, train_on

BAD = "train/b/03.png"
SLOW = ("GIF bomb of 4.3 Gpixel", "BMP of a negative size", "PNG of no size", "truncated WebP", "text", "pickle",
        "colour profile that unpacks to 100 MB", "TIFF of 32-bit integers", "8-bit values in a 16-bit PNG")  # fmt: skip


@pytest.fixture
def pictures(tmp_path) -> Path:
    """32 + 16 pictures of two classes."""
    return make_pictures(tmp_path / "pictures")


@pytest.mark.parametrize("name", cases(CONTENTS, SLOW))
def test_contents(hostile, tmp_path, pictures, name):
    (pictures / BAD).write_bytes(CONTENTS[name])
    hostile.refuse(f"images: {name}", tmp_path, train_on(pictures), BAD, "cannot be read", "data.skip_unreadable=true")


def test_more_pixels_than_allowed(hostile, tmp_path, pictures):
    Image.fromarray(NOISE[:40, :40]).save(pictures / BAD)
    overrides = train_on(pictures, "data.max_pixels=1500")
    hostile.refuse("images: above data.max_pixels", tmp_path, overrides, BAD, "1600", "data.max_pixels")


SPECIAL = {
    "link to an endless device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "named pipe": (os.mkfifo, "not a regular file"),
}


@pytest.mark.parametrize("name", cases(SPECIAL))
def test_files_that_are_no_files(hostile, tmp_path, pictures, name):
    (pictures / BAD).unlink()
    make, reason = SPECIAL[name]
    make(pictures / BAD)
    hostile.refuse(f"images: {name}", tmp_path, train_on(pictures), BAD, "cannot be read", reason)


def test_name_that_fakes_a_line(hostile, tmp_path, pictures):
    (pictures / BAD).rename(pictures / "train/b/x\nerror: all is well.png")
    (pictures / "train/b/x\nerror: all is well.png").write_bytes(b"")
    hostile.refuse("images: line break in a name", tmp_path, train_on(pictures), "cannot be read")
