"""One picture, from a file or from bytes, into RGB within limits: whatever a data set holds costs one clear error."""

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from .pixels import UnclearPixelsError, to_rgb

# what a .jpg holds decides how PIL reads it, and for an EPS it would start Ghostscript: only these are tried
EXTENSIONS_OF = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
FORMATS = tuple(EXTENSIONS_OF)
EXTENSIONS = sum(EXTENSIONS_OF.values(), ())  # in lower case, of the files that a folder is searched for
REPAIR = "Repair or remove it."
MAX_PIXELS = 100_000_000  # as data.max_pixels of a recipe; so many take 300 MB


class UnreadableImageError(ValueError):
    """An image that cannot be decoded, named by file or row."""


def decode(
    source: str | bytes,
    description: str,
    max_pixels: int = MAX_PIXELS,
    *,
    limit: str = "max_pixels",
    hint: str = REPAIR,
) -> Image.Image:
    """Decode to 8-bit RGB by the table of pixels.py, as torchvision and timm: first frame, EXIF rotation not applied.

    Args:
        source: path of a file, or the content of one.
        description: what an error calls the image.
        max_pixels: width x height that is still decoded; told from the header, before memory is taken.
        limit, hint: what an error calls max_pixels, and the next step it names.

    Raises:
        UnreadableImageError: anything that keeps it from being read; the image is named.
    """
    try:
        with opened(source) as file, _pixel_limit(max_pixels), Image.open(file, formats=FORMATS) as image:
            return to_rgb(image)
    except MemoryError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        reason = f"{error} The limit is {limit}={max_pixels}; raise it for a picture you trust"
    except UnclearPixelsError as error:
        reason = str(error)
    except UnidentifiedImageError:
        reason = f"not a picture in a format that is read ({', '.join(FORMATS)})"
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        reason = f"{type(error).__name__}: {error}"
    raise UnreadableImageError(f"image {printable(description)} cannot be read: {printable(reason)}. {hint}")


def printable(text: str) -> str:
    """Names from a data set as one line: line breaks, control characters and bytes that are no text are escaped."""
    return text if text.isprintable() else ascii(text)[1:-1]


def opened(source: str | bytes) -> io.IOBase:
    """A file by its path, or the content of one, to read; OSError where it is no regular file: a pipe may never end."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    # not blocking, so that a named pipe is refused below instead of being waited for
    file = open(source, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file


@contextmanager
def _pixel_limit(max_pixels: int) -> Iterator[None]:
    """PIL's own limit, which is global and up to twice its value only warned about, as an error at `max_pixels`."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # odd EXIF or palettes: there is a picture all the same
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
