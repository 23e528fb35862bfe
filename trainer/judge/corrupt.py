"""The 15 corruptions of ImageNet-C at 5 severities (Hendrycks and Dietterich 2019, arXiv 1903.12261), on the fly.

The functions are those of the package imagecorruptions-imaug, the kept form of the authors' own code, with its pictures
of frost. It draws from numpy's global generator, which is seeded here for each image and put back.
"""

from __future__ import annotations

import functools
import zlib
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

PACKAGE = "imagecorruptions-imaug"
LEAST = 32  # pixels of a side: the package takes no smaller pictures
OWN_SEED = ("impulse_noise", "glass_blur")  # kinds that draw from a generator of their own


class Corruption:
    """One kind at one severity: (a picture, its row in the data) -> the corrupted picture, of the same size.

    What is drawn depends on (seed, kind, severity, row) alone: not on ranks, batches, workers or other images.

    Args:
        kind: of trainer.config.evaluate.CORRUPTIONS.
        severity: 1 to 5.
        side: pixels that a smaller picture is enlarged to before, and reduced from after; at least LEAST.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, kind: str, severity: int, seed: int, side: int = 0) -> None:
        self.kind = kind
        self.severity = severity
        self.seed = seed
        self.side = max(side, LEAST)
        _package()  # now, and not in the middle

    def __call__(self, image: Image.Image, row: int) -> Image.Image:
        size = image.size
        scale = self.side / min(size)
        if scale > 1:
            enlarged = tuple(round(scale * length) for length in size)
            image = image.resize(enlarged, Image.Resampling.BICUBIC)
        values_HWC = np.asarray(image.convert("RGB"))
        words = [self.seed, zlib.crc32(self.kind.encode()), self.severity, row]
        drawn = int(np.random.SeedSequence(words).generate_state(1)[0])
        options: dict[str, Any] = {"seed": drawn} if self.kind in OWN_SEED else {}
        state = np.random.get_state()
        try:
            np.random.seed(drawn)
            changed_HWC = _package().corrupt(values_HWC, self.severity, self.kind, **options)
        finally:
            np.random.set_state(state)
        changed = Image.fromarray(changed_HWC)
        return changed.resize(size, Image.Resampling.BOX) if scale > 1 else changed


@functools.cache
def _package() -> ModuleType:
    try:
        import imagecorruptions
    except ModuleNotFoundError as error:
        raise ValueError(
            f"evaluation corruptions needs the package {PACKAGE} (import failed at {error.name}): pip install {PACKAGE}"
        ) from None
    return imagecorruptions
