"""What a data set may hold and where its names may lead: pixels, odd pictures, links, file names, and its commit."""

import re

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import EpsImagePlugin, Image
from torchvision.datasets import ImageFolder

from trainer.config.data import DataConfig
from trainer.data.sources import open_source


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, value, value))


@pytest.fixture
def folder(tmp_path):
    """train: cat 10, 11 and dog 20 (grey values)."""
    for name, values in (("cat", (10, 11)), ("dog", (20,))):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number, value in enumerate(values):
            picture(value).save(tmp_path / "train" / name / f"{number}.png")
    return tmp_path


def opened(path, **more):
    return open_source(DataConfig(source="folder", path=str(path), val_split="train", **more), "train")


def greys(source) -> list[int]:
    return [source.image(index).getpixel((0, 0))[0] for index in range(len(source))]


def test_pixel_limit_is_exact_and_leaves_pil_alone(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    assert greys(opened(folder, max_pixels=64)) == [10, 11, 20]  # 8 x 8 pixels
    for limit in (63, 40, 20):  # PIL itself only warns up to twice the limit, and raises above
        source = opened(folder, max_pixels=limit)
        with pytest.raises(ValueError, match=rf"0\.png cannot be read: .*64 pixels.*data\.max_pixels={limit}"):
            source.image(0)
    assert Image.MAX_IMAGE_PIXELS == 7


def test_pictures_that_only_look_odd_are_read(folder, recwarn):
    """Animation: its first frame. Broken EXIF, a transparent palette, links out of the folder: read."""
    cat = folder / "train" / "cat"
    picture(30).save(cat / "0.png", save_all=True, append_images=[picture(40), picture(50)])
    picture(31).save(cat / "1.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense", quality=100)
    picture(51).convert("P").save(cat / "2.png", transparency=b"\0" * 200)
    (folder / "more").mkdir()
    picture(33).save(folder / "more" / "3.png")
    (cat / "3.png").symlink_to(folder / "more" / "3.png")
    (cat / "more").symlink_to(folder / "more")
    assert greys(opened(folder)) == [30, 31, 11, 255, 33, 33, 20]
    assert not recwarn.list


def test_a_program_under_the_name_of_a_picture_is_not_run(folder, monkeypatch):
    """PIL reads what a file holds, not what it is called, and would start Ghostscript for this one."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: pytest.fail("it was started"))
    (folder / "train/cat/0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(ValueError, match=r"0\.png cannot be read: not a picture in a format that is read \(JPEG"):
        opened(folder).image(0)


def test_folder_is_read_as_torchvision_reads_it(folder):
    cat = folder / "train" / "cat"
    for name in ("Z.PNG", "a/b.png", "a/c/d.jpeg", "a.b/e.webp", "B/f.png"):
        (cat / name).parent.mkdir(parents=True, exist_ok=True)
        picture(1).save(cat / name)
    (cat / "a/notes.txt").write_text("not an image")
    source = opened(folder)
    expected = ImageFolder(folder / "train").samples
    assert [(path.decode(), target) for path, target in zip(source._paths, source.targets)] == expected


def test_links_in_a_circle_are_named(folder):
    for name in ("here", "again"):
        (folder / "train" / "dog" / name).symlink_to(folder / "train" / "dog")
    with pytest.raises(ValueError, match=r"train/dog/(here|again) leads to a folder that was read already"):
        opened(folder)


@pytest.fixture
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def named(path, *files: str) -> DataConfig:
    """A parquet data set whose images are file names."""
    rows = {"image": [{"bytes": None, "path": file} for file in files], "label": list(range(len(files)))}
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))
    pq.write_table(datasets.Dataset.from_dict(rows, features).data.table, path / "train.parquet")  # embeds nothing
    return DataConfig(source="hub", path=str(path), val_split="train")


def test_rows_may_name_files_of_the_folder_only(tmp_path, folder, private_cache):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pictures").symlink_to(folder / "train" / "cat")  # a link is the owner's own doing
    inside = [str(tmp_path / "data/pictures" / name) for name in ("0.png", "1.png")]
    assert greys(open_source(named(tmp_path / "data", *inside), "train")) == [10, 11]
    for outside in (
        str(folder / "train/cat/0.png"),
        str(tmp_path / "data/../train/cat/0.png"),
        "pictures/0.png",
        str(tmp_path / "data-of-others/0.png"),
    ):
        with pytest.raises(ValueError, match=f"row 1 of data.path .* names a file outside of it, {re.escape(outside)}"):
            open_source(named(tmp_path / "data", inside[0], outside), "train")


def test_origin_names_the_commit(monkeypatch):
    rows = {"image": [picture(1), picture(2)], "label": [0, 1]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(2))
    split = datasets.Dataset.from_dict(rows, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: datasets.DatasetDict(train=split))
    config = DataConfig(source="hub", path="user/birds@v1", val_split="train")
    assert open_source(config, "train").origin == "user/birds@v1"
    commit = "0123456789" * 4
    split.info.download_checksums = {f"hf://datasets/user/birds@{commit}/train.parquet": {}}
    assert open_source(config, "train").origin == f"user/birds@{commit}"
