"""Contents made to hurt, and a small good data set to put them into."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def png(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG of one black row, whatever size it claims."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 64)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *extra, chunk(b"IDAT", rows), chunk(b"IEND", b"")])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def encoded(format: str, size: int = 64) -> bytes:
    return saved(NOISE[:size, :size], format)


def saved(pixels: np.ndarray, format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def jpeg_claiming(side: int) -> bytes:
    content = encoded("JPEG")
    at = content.index(b"\xff\xc0") + 5  # start of frame: length (2), precision (1), height, width
    return content[:at] + struct.pack(">HH", side, side) + content[at + 4 :]


def tiff_claiming(side: int) -> bytes:
    entries = [
        (256, side),
        (257, side),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, side),
        (279, 2**31 - 1),
    ]
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + b"\0" * 4


ZEROS = zlib.compress(b"\0" * 100_000_000, 9)
PICKLE = b"\x80\x04\x95\x1c\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x05false\x94\x85\x94R\x94."
CONTENTS = {
    "PNG bomb of 3.6 Gpixel": png(60_000, 60_000),
    "JPEG bomb of 4.3 Gpixel": jpeg_claiming(65_535),
    "TIFF bomb of 10 Gpixel": tiff_claiming(100_000),
    "GIF bomb of 4.3 Gpixel": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\x02\0\0\0;",
    "PPM of 1e18 pixels": b"P6 1000000000 1000000000 255 ",
    "BMP of a negative size": b"BM" + struct.pack("<IIIIiiHH", 99, 0, 54, 40, -5, -(2**31), 1, 24) + b"\0" * 24,
    "PNG of no size": png(0, 0),
    "text chunk that unpacks to 100 MB": png(8, 8, chunk(b"zTXt", b"k\0\0" + ZEROS)),
    "colour profile that unpacks to 100 MB": png(8, 8, chunk(b"iCCP", b"k\0\0" + ZEROS)),
    "truncated JPEG": encoded("JPEG")[:1500],
    "truncated PNG": encoded("PNG")[:3000],
    "truncated WebP": encoded("WEBP")[:800],
    "empty file": b"",
    "TIFF of floats": saved(NOISE[:, :, 0].astype(np.float32), "TIFF"),
    "TIFF of 32-bit integers": saved(NOISE[:, :, 0].astype(np.int32), "TIFF"),
    "8-bit values in a 16-bit PNG": saved(NOISE[:, :, 0].astype(np.uint16), "PNG"),
    "text": b"error: not a picture\n",
    "PostScript program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(owned) (w) file closefile\n",
    "pickle": PICKLE,
}  # fmt: skip
# nine levels of nine aliases: 81 characters a line, 9**10 values when written out
ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


def make_pictures(root: Path, classes: tuple[str, ...] = ("a", "b")) -> Path:
    for split, count in (("train", 16), ("validation", 8)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(NOISE[i : i + 16, i : i + 16]).save(root / split / name / f"{i:02}.png")
    return root


def train_on(pictures: Path, *overrides: str) -> list[str]:
    return ["--phase", "teacher", "data.source=folder", f"data.path={pictures}", *overrides]
