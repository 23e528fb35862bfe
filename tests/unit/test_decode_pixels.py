"""The short way for JPEGs beside Pillow's: the same pixels, the same refusals, and Pillow for everything else."""

import io
import os

import numpy as np
import PIL
import pytest
from PIL import Image

from trainer.config.data import DataConfig
from trainer.data import decode as decode_module
from trainer.data.decode import UnreadableImageError, decode, decode_pixels
from trainer.data.sources import open_source

rng = np.random.default_rng(0)
WAVES = [128 + 90 * np.sin(np.arange(90)[:, None] / (9 + k)) * np.cos(np.arange(121) / (7 + k)) for k in range(3)]
COLOUR = Image.fromarray((np.stack(WAVES, axis=-1) + rng.normal(0, 9, (90, 121, 3))).clip(0, 255).astype(np.uint8))
LIMIT = 10**6
SIDEWAYS = Image.Exif()
SIDEWAYS[274] = 6  # to be turned by 90 degrees


def encoded(image: Image.Image, file_format: str = "JPEG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, file_format, **options)
    return content.getvalue()


JPEGS = {
    "4:2:0": encoded(COLOUR, quality=85),
    "4:2:2": encoded(COLOUR, subsampling=1),
    "4:4:4": encoded(COLOUR, subsampling=0, quality=97),
    "progressive": encoded(COLOUR, progressive=True),
    "restart markers, profile, rotation": encoded(
        COLOUR, restart_marker_blocks=4, icc_profile=b"x" * 300, exif=SIDEWAYS
    ),
    "grey": encoded(COLOUR.convert("L")),
    "CMYK": encoded(COLOUR.convert("CMYK")),
    "RGB": encoded(COLOUR, keep_rgb=True),
    "several pictures": encoded(COLOUR, "MPO", save_all=True, append_images=[COLOUR.transpose(0)]),
}
OTHERS = {
    "PNG": encoded(COLOUR, "PNG"),
    "palette": encoded(COLOUR.convert("P"), "PNG", transparency=3),
    "16 bits": encoded(Image.fromarray((rng.integers(0, 65536, (9, 7))).astype(np.uint16)), "PNG"),
    "transparent": encoded(COLOUR.convert("RGBA"), "WEBP"),
    "TIFF": encoded(COLOUR, "TIFF", compression="jpeg"),
}
# of several pictures whose index is damaged, Pillow from 13 on reads the first (as libjpeg-turbo does)
REFUSES_DAMAGED_INDEX = int(PIL.__version__.partition(".")[0]) < 13
SHORT = [name for name in JPEGS if name not in ("CMYK", "RGB")]


def outcome(read) -> np.ndarray | str:
    try:
        return read()
    except UnreadableImageError as error:
        return str(error)


def assert_alike(content: bytes, name: str) -> bool:
    """Whether it is a picture; either way both readers say so."""
    by_pillow = outcome(lambda: np.asarray(decode(content, "it", LIMIT)))
    found = outcome(lambda: decode_pixels(content, "it", LIMIT, lambda *_: 1).values_HWC)
    if name == "several pictures" and REFUSES_DAMAGED_INDEX and "not a picture in a format" in str(by_pillow):
        return False
    if isinstance(by_pillow, str) or isinstance(found, str):
        assert found == by_pillow
        return False
    np.testing.assert_array_equal(found, by_pillow)
    return True


@pytest.mark.parametrize("name", [*JPEGS, *OTHERS])
def test_pixels_are_those_of_pillow_to_the_bit(name):
    assert assert_alike((JPEGS | OTHERS)[name], name)


@pytest.mark.parametrize("name", JPEGS)
def test_altered_and_cut_files_have_one_outcome(name):
    generator = np.random.default_rng(1)
    pictures = 0
    for number in range(240):
        content = bytearray(JPEGS[name])
        if number % 6 == 0:
            content = content[: generator.integers(2, len(content))]
        # every second time among the headers
        end = len(content) if number % 2 else min(len(content), 700)
        for place in generator.integers(2, max(end, 3), generator.integers(1, 5)):
            if place < len(content):
                content[place] = generator.integers(0, 256)
        pictures += assert_alike(bytes(content), name)
    assert 40 < pictures < 240  # some of either outcome


@pytest.mark.parametrize("name", SHORT)
def test_the_short_way_is_taken(name, monkeypatch):
    monkeypatch.setattr(decode_module, "decode", lambda *_: pytest.fail("decoded by Pillow"))
    for shrink in (1, 2, 4, 8):
        pixels = decode_pixels(JPEGS[name], "it", LIMIT, lambda *_, shrink=shrink: shrink)
        assert pixels.values_HWC.shape == (-(-90 // shrink), -(-121 // shrink), 3)
        assert (pixels.width, pixels.height, pixels.shrink) == (121, 90, shrink)


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_smaller_is_what_pillow_calls_a_draft(shrink):
    for name in SHORT:
        pixels = decode_pixels(JPEGS[name], "it", LIMIT, lambda *_: shrink)
        draft = Image.open(io.BytesIO(JPEGS[name]))
        draft.draft(draft.mode, (121 // shrink, 90 // shrink))
        np.testing.assert_array_equal(pixels.values_HWC, np.asarray(draft.convert("RGB")))


def test_the_size_is_told_before_anything_is_decoded_and_of_every_format():
    sizes = []
    for content in (JPEGS["4:2:0"], OTHERS["PNG"]):
        decode_pixels(content, "it", LIMIT, lambda *size: sizes.append(size) or 1)
    assert sizes == [(121, 90)] * 2


def test_what_pillow_does_not_shrink_is_whole():
    for name in ("CMYK", "RGB"):
        pixels = decode_pixels(JPEGS[name], "it", LIMIT, lambda *_: 4)
        assert (pixels.shrink, pixels.values_HWC.shape) == (1, (90, 121, 3))


def test_the_limit_of_pixels_is_that_of_decode():
    for limit in (90 * 121 - 1, 90 * 121):
        read = outcome(lambda limit=limit: decode_pixels(JPEGS["4:2:0"], "it", limit, lambda *_: 1).shrink)
        expected = 1 if limit == 90 * 121 else outcome(lambda limit=limit: decode(JPEGS["4:2:0"], "it", limit))
        assert read == expected
        assert limit == 90 * 121 or f"data.max_pixels={limit}" in read


def test_files_that_are_large_or_no_files_go_pillows_way(tmp_path, monkeypatch):
    path = tmp_path / "picture.jpg"
    path.write_bytes(JPEGS["4:2:0"])
    monkeypatch.setattr(decode_module, "LARGEST_JPEG", 100)
    np.testing.assert_array_equal(
        decode_pixels(str(path), "it", LIMIT, lambda *_: 2).values_HWC, np.asarray(decode(str(path), "it", LIMIT))
    )
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing there", "."):
        with pytest.raises(UnreadableImageError, match="image it cannot be read"):
            decode_pixels(str(tmp_path / name), "it", LIMIT, lambda *_: 1)


def test_a_hub_set_and_a_folder_go_the_same_way(tmp_path):
    import datasets

    rows = {"image": [], "label": []}
    for number, name in enumerate(("4:2:0", "CMYK", "PNG")):
        content = (JPEGS | OTHERS)[name]
        path = tmp_path / "pictures" / "train" / f"class {number % 2}" / f"{number}.{'png' if name == 'PNG' else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        rows["image"].append({"bytes": content, "path": None})
        rows["label"].append(number % 2)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["class 0", "class 1"])}
    )
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)}).save_to_disk(tmp_path / "saved")
    common = {"val_split": "train"}
    folder = open_source(DataConfig(source="folder", path=str(tmp_path / "pictures"), **common), "train")
    saved = open_source(DataConfig(source="hub", path=str(tmp_path / "saved"), **common), "train")
    asked = []
    for index, row in enumerate((0, 2, 1)):  # a folder is read class by class
        asked.clear()
        for source, number in ((folder, index), (saved, row)):
            pixels, read = source.pixels_or_next(number, lambda *size: asked.append(size) or 2)
            assert read == number
            assert pixels.shrink == (2 if row == 0 else 1)
            asked.append(pixels.values_HWC.tobytes())
        half = len(asked) // 2
        assert asked[:half] == asked[half:]
