"""Pixels that are not 8-bit RGB: each becomes what its stated rule says, or is refused by the name of its mode."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from models.pictures import pixels
from tests.hostile.payloads import chunk
from trainer.data.decode import UnreadableImageError, decode

RNG = np.random.default_rng(0)
GREY_HW = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
GREY_HW[0, :2] = 0, 255
DEEP_HW = GREY_HW.astype(np.uint16) * 257  # 0..65535, the same greys in 16 bits


def encoded(image: Image.Image, file_format: str, **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **how)
    return buffer.getvalue()


def read(content: bytes) -> np.ndarray:
    """(H, W, 3) uint8."""
    image = decode(content, "it", 10**6)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values_HW: np.ndarray) -> np.ndarray:
    """The RGB picture of these greys, (H, W, 3)."""
    return np.repeat(values_HW[..., None], 3, axis=2)


def png(values_HWC: np.ndarray, colour: int, *extra: bytes) -> bytes:
    """A PNG of 16 bits a channel. colour: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    height, width = values_HWC.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)
    return png_of(rows, width, height, 16, colour, *extra)


def png_of(rows: bytes, width: int, height: int, bits: int, colour: int, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(content: bytes, shape: tuple[int, int], *, bits: int = 16, white: int = 1, sample: int = 1, order: str = "<"):
    """A grey TIFF. white: PhotometricInterpretation (0: zero is white). sample: 1 unsigned, 2 signed, 3 float."""
    height, width = shape
    # ImageWidth, ImageLength, BitsPerSample, Compression, Photometric, StripOffsets, SamplesPerPixel, RowsPerStrip,
    # StripByteCounts, SampleFormat
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: white, 273: 8, 277: 1, 278: height, 279: len(content)}
    tags[339] = sample
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(content))
    return head + content + struct.pack(f"{order}H", len(tags)) + entries + b"\0" * 4


SIXTEEN_BITS = {
    "PNG": png(DEEP_HW, 0),
    "PNG by Pillow": encoded(Image.fromarray(DEEP_HW), "PNG"),
    "TIFF": tiff(DEEP_HW.astype("<u2").tobytes(), DEEP_HW.shape),
    "TIFF, big-endian": tiff(DEEP_HW.astype(">u2").tobytes(), DEEP_HW.shape, order=">"),
    "TIFF, zero is white": tiff((65535 - DEEP_HW).astype("<u2").tobytes(), DEEP_HW.shape, white=0),
    "TIFF, compressed": encoded(Image.fromarray(DEEP_HW), "TIFF", compression="tiff_lzw"),
    "PGM": b"P5 7 5 65535 " + DEEP_HW.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_grey_of_16_bits_is_its_8_bit_twin(name):
    """Pillow alone cuts off at 255: all but white."""
    np.testing.assert_array_equal(read(SIXTEEN_BITS[name]), grey(GREY_HW))


def test_it_is_the_high_byte_whatever_the_low_one_is():
    low_byte = RNG.integers(0, 256, GREY_HW.shape, dtype=np.uint16)
    np.testing.assert_array_equal(read(png(GREY_HW * np.uint16(256) + low_byte, 0)), grey(GREY_HW))


def test_colour_of_16_bits_goes_the_same_way():
    colour_HWC = RNG.integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    np.testing.assert_array_equal(read(png(colour_HWC, 2)), colour_HWC >> 8)
    ppm = b"P6 7 5 65535 " + colour_HWC.astype(">u2").tobytes()
    # Pillow scales by the largest value: v * 255 / 65535, rounded
    assert np.abs(read(ppm).astype(int) - (colour_HWC >> 8)).max() <= 1


def test_twelve_bits_in_a_tiff_that_says_so_and_in_a_pgm():
    # two pixels of 12 bits in three bytes: 0x12c and 0xfff
    assert read(tiff(bytes([0x12, 0xCF, 0xFF]), (1, 2), bits=12))[0, :, 0].tolist() == [0x12, 0xFF]
    assert read(b"P5 2 1 4095 " + struct.pack(">HH", 0x12C, 0xFFF))[0, :, 0].tolist() == [0x12, 0xFF]


def test_twelve_bits_in_a_16_bit_file_are_warned_about_once(caplog):
    pixels._warn_of_few_bits.cache_clear()
    for _ in range(3):
        assert read(png(np.array([[0, 4095]]), 0))[0, :, 0].tolist() == [0, 15]
    assert caplog.text.count("a 16-bit picture has no value above 4095") == 1
    caplog.clear()
    read(png(np.array([[0, 0]]), 0))  # black is black
    assert not caplog.records


UNCLEAR = {
    "float TIFF of 0 to 1": (
        tiff((GREY_HW / np.float32(255)).astype("<f4").tobytes(), GREY_HW.shape, bits=32, sample=3),
        "mode F",
    ),
    "float TIFF of 0 to 255": (encoded(Image.fromarray(GREY_HW.astype(np.float32)), "TIFF"), "mode F"),
    # Pillow knows it from 10.3 on
    "PFM under the name of a PPM": (b"Pf 7 5 -1.0\n" + GREY_HW.astype("<f4").tobytes(), "(mode F|format that is)"),
    "32-bit TIFF": (tiff(DEEP_HW.astype("<u4").tobytes(), DEEP_HW.shape, bits=32), "mode I[)]"),
    "32-bit TIFF by Pillow": (encoded(Image.fromarray(GREY_HW.astype(np.int32)), "TIFF"), "mode I[)]"),
    "signed 16-bit TIFF": (tiff(DEEP_HW.astype("<u2").tobytes(), DEEP_HW.shape, sample=2), "signed integers"),
    "signed 8-bit TIFF": (tiff(GREY_HW.tobytes(), GREY_HW.shape, bits=8, sample=2), "signed integers"),
    "8-bit values in a 16-bit PNG": (png(GREY_HW, 0), r"go up to 255 of 65535, so all would be black"),
    "16-bit colour with a transparent one": (
        png(np.stack([DEEP_HW] * 3, axis=2), 2, chunk(b"tRNS", struct.pack(">HHH", 300, 300, 300))),
        "transparent colour",
    ),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_values_that_could_mean_several_pictures_are_refused(name):
    content, reason = UNCLEAR[name]
    with pytest.raises(UnreadableImageError, match=f"image it cannot be read: .*{reason}.*data.skip_unreadable=true"):
        read(content)


# transparency: laid over white


def clear_left(image: Image.Image) -> Image.Image:
    """RGBA: black and quite transparent on the left, opaque on the right."""
    image = image.convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 3, 5))
    return image


COLOUR = Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8))
ON_WHITE = np.asarray(COLOUR).copy()
ON_WHITE[:, :3] = 255


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_what_hides_under_transparent_pixels_is_not_shown(file_format):
    how = {"lossless": True} if file_format == "WEBP" else {}
    np.testing.assert_array_equal(read(encoded(clear_left(COLOUR), file_format, **how)), ON_WHITE)


def test_half_transparent_is_half_white():
    content = encoded(Image.new("RGBA", (1, 1), (0, 100, 200, 51)), "PNG")  # alpha 0.2
    assert read(content)[0, 0].tolist() == [204, 224, 244]  # 0.8 * 255 + 0.2 * (0, 100, 200)
    assert read(encoded(Image.new("LA", (1, 1), (100, 51)), "PNG"))[0, 0].tolist() == [224] * 3


def test_opaque_pictures_with_an_alpha_channel_stay_to_the_bit():
    for image in (COLOUR, COLOUR.convert("L")):
        opaque = image.copy()
        opaque.putalpha(255)
        np.testing.assert_array_equal(read(encoded(opaque, "PNG")), np.asarray(image.convert("RGB")))


def test_transparent_colours_and_palette_entries():
    colours = Image.new("RGB", (2, 1), (1, 2, 3))
    colours.putpixel((1, 0), (4, 5, 6))
    assert read(encoded(colours, "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [4, 5, 6]]
    grey_one = Image.fromarray(np.array([[10, 20]], np.uint8))
    assert read(encoded(grey_one, "PNG", transparency=10))[0].tolist() == [[255] * 3, [20] * 3]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette = palette.convert("P")
    palette.putpalette([0, 0, 0, 9, 9, 9])
    for file_format in ("PNG", "GIF"):
        content = encoded(palette, file_format, transparency=0)
        assert read(content)[0].tolist() == [[255] * 3, [9] * 3]
    assert read(encoded(palette, "PNG", transparency=bytes([255, 51])))[0, 1].tolist() == [206] * 3  # .8 * 255 + .2 * 9
    deep = png(np.array([[300, 40000]]), 0, chunk(b"tRNS", struct.pack(">H", 300)))
    assert read(deep)[0].tolist() == [[255] * 3, [156] * 3]


def test_transparent_grey_of_few_bits():
    """As programs write it that make PNG files small; Pillow alone takes 85, which 1 of 2 bits becomes, for another."""
    for bits, row, greys in ((2, 0b00011011, [0, 255, 170, 255]), (4, 0x1F, [255, 255])):
        content = png_of(bytes([0, row]), len(greys), 1, bits, 0, chunk(b"tRNS", struct.pack(">H", 1)))
        assert read(content)[0, :, 0].tolist() == greys


def test_alpha_of_16_bits():
    deep = np.array([[[0, 65535], [0, 0], [40000, 65535]]])
    assert read(png(deep, 4))[0, :, 0].tolist() == [0, 255, 156]


# other modes that Pillow knows how to convert


def test_modes_that_are_converted_as_pillow_does():
    for mode, file_format in (("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("1", "TIFF"), ("L", "BMP"), ("P", "GIF")):
        image = COLOUR.convert(mode)
        np.testing.assert_array_equal(read(encoded(image, file_format)), np.asarray(image.convert("RGB")), mode)


def test_cmyk_and_lab_have_their_colours():
    """A JPEG of Adobe's holds CMYK turned over; Pillow writes and reads it so."""
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for file_format in ("JPEG", "TIFF"):
        assert np.abs(read(encoded(red, file_format)).astype(int) - (255, 0, 0)).max() <= 2
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.new("RGB", (8, 8), (20, 180, 90)), to_lab)
    try:
        found = read(encoded(lab, "TIFF"))
    except UnreadableImageError as error:  # an older Pillow
        assert "LAB" in str(error)
    else:
        assert np.abs(found.astype(int) - (20, 180, 90)).max() <= 6


def test_exif_rotation_is_not_applied_and_the_first_frame_is_taken():
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    assert read(encoded(COLOUR, "JPEG", exif=exif)).shape == (5, 7, 3)
    frames = [Image.new("RGB", (2, 1), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for file_format in ("GIF", "TIFF", "PNG"):
        content = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
        assert read(content)[0, 0].tolist() == [200, 0, 0]


def test_rgb_takes_the_short_way(monkeypatch):
    monkeypatch.setattr(pixels, "_refuse_unclear", lambda image: pytest.fail("looked at more than the mode"))
    np.testing.assert_array_equal(read(encoded(COLOUR, "PNG")), np.asarray(COLOUR))


INTACT = {
    "JPEG": encoded(COLOUR, "JPEG"),
    "PNG": encoded(COLOUR, "PNG"),
    "PNG with alpha": encoded(clear_left(COLOUR), "PNG"),
    "PNG with a palette": encoded(COLOUR.convert("P"), "PNG", transparency=3),
    "WebP": encoded(clear_left(COLOUR), "WEBP"),
    "BMP": encoded(COLOUR, "BMP"),
    "GIF": encoded(COLOUR.convert("P"), "GIF", transparency=3),
    "CMYK": encoded(COLOUR.convert("CMYK"), "TIFF", compression="tiff_lzw"),
} | SIXTEEN_BITS


@pytest.mark.parametrize("name", INTACT)
def test_damaged_files_are_read_or_named(name):
    """Up to four bytes altered: an 8-bit RGB picture all the same, or one error of ours, whatever a decoder says."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(INTACT[name])
        for place in rng.integers(0, len(content), rng.integers(1, 5)):
            content[place] = rng.integers(0, 256)
        try:
            pixels_HWC = read(bytes(content))
        except UnreadableImageError as error:
            assert "image it cannot be read" in str(error)
        else:
            assert pixels_HWC.dtype == np.uint8 and pixels_HWC.shape[2] == 3
