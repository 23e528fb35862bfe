"""One picture of a data set into RGB: models/pictures/decode.py, with errors that name the recipe's keys."""

from PIL import Image

from models.pictures import decode as pictures
from models.pictures.decode import EXTENSIONS, UnreadableImageError, opened, printable

__all__ = ["EXTENSIONS", "SKIP_HINT", "UnreadableImageError", "decode", "opened", "printable"]
SKIP_HINT = "Repair or remove it, or set data.skip_unreadable=true."


def decode(source: str | bytes, description: str, max_pixels: int) -> Image.Image:
    """See models.pictures.decode.

    Raises:
        UnreadableImageError: anything that keeps it from being read; the image is named.
    """
    return pictures.decode(source, description, max_pixels, limit="data.max_pixels", hint=SKIP_HINT)
