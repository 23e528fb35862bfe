"""What tells a split's images from others, wherever they lie and whatever loads them; cheap also for a million files.

Labels of all images, relative names of all files (source folder), the sizes of about a thousand files and the bytes of
64 images, spread evenly, go into one SHA-256. What it can miss: an image that was replaced under its name, with its
size, or beyond the first thousand images, and is none of those that were read.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from trainer.data.base import ImageSource
from trainer.data.decode import UnreadableImageError

SIZES_TAKEN = 1000
CONTENTS_READ = 64
BYTES_READ = 2**20  # of each of these


def fingerprint(source: ImageSource) -> dict[str, Any]:
    """The number of images, how many of each class by its name, and the SHA-256 of what they are.

    Returns:
        images, classes ({name: images}) and sha256, as plain values; no path is in it.
    """
    counts = np.bincount(source.targets, minlength=len(source.labels)).tolist()
    digest = hashlib.sha256()
    digest.update(np.ascontiguousarray(source.targets, dtype="<i8").tobytes())
    for row in source.rows.tolist():
        digest.update(source.name_of(row) + b"\0")
    for row in _spread(source, SIZES_TAKEN):
        digest.update(f"{source.size_of(row)} ".encode())
    for row in _spread(source, CONTENTS_READ):
        try:
            content = source.content_of(row, BYTES_READ)
        except (UnreadableImageError, OSError):
            content = b"unreadable"
        digest.update(hashlib.sha256(content).digest())
    return {"images": len(source), "classes": dict(zip(source.labels, counts)), "sha256": digest.hexdigest()}


def _spread(source: ImageSource, count: int) -> list[int]:
    """Rows of `count` images spread evenly over a source, or of all when it has no more."""
    return source.spread(count).rows.tolist()
