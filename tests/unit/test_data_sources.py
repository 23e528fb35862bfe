"""Sources: the embedded digits against known pixels, folder and hub layouts made on the spot, and what they refuse."""

import re

import datasets
import numpy as np
import pytest
from PIL import Image

from trainer.config.data import DataConfig
from trainer.data.sources import DIGITS_FILE, open_source, source_of


def picture(value: int, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), (value, value, value))


@pytest.fixture
def folder(tmp_path):
    """train: cat 10, 11, 12 and dog 20, 21, 22; validation: cat 13, dog 23 (grey values)."""
    for split, values in (("train", (0, 1, 2)), ("validation", (3,))):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for value in values:
                picture(10 + 10 * number + value).save(tmp_path / split / name / f"{value}.png")
    return tmp_path


def folder_config(path, **more) -> DataConfig:
    return DataConfig(source="folder", path=str(path), **more)


def greys(source) -> list[int]:
    return [source.image(index).getpixel((0, 0))[0] for index in range(len(source))]


# digits


def test_digits_first_validation_image_is_the_first_of_the_data_set():
    source = open_source(DataConfig(), "val")
    image = np.asarray(source.image(0))
    assert image.shape == (8, 8, 3)
    assert source.label(0) == 0
    # the data set starts with the row 0 0 5 13 9 1 0 0 of 0..16; 5 * 255 / 16 = 79.7, 13: 207.2, 9: 143.4, 1: 15.9
    assert image[0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert (image == image[..., :1]).all()


def test_digits_split_is_stratified_and_loses_nothing():
    train, val = (open_source(DataConfig(), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    assert train.labels == val.labels == [str(digit) for digit in range(10)]
    counts = np.bincount(np.concatenate([train.targets, val.targets]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.abs(np.bincount(val.targets) - counts / 5).max() < 1
    with np.load(DIGITS_FILE) as arrays:
        expected = sorted(image.tobytes() for image in np.round(arrays["images"] * (255 / 16)).astype(np.uint8))
    served = [np.asarray(source.image(i))[..., 0].tobytes() for source in (train, val) for i in range(len(source))]
    assert sorted(served) == expected


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test' is not one of train, val"):
        open_source(DataConfig(), "test")


# folder


def test_folder_reads_classes_and_images(folder):
    train, val = (open_source(folder_config(folder), split) for split in ("train", "val"))
    assert train.labels == val.labels == ["cat", "dog"]
    assert greys(train) == [10, 11, 12, 20, 21, 22]
    assert train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert greys(val) == [13, 23]


def test_limit_spreads_over_the_classes(folder):
    source = open_source(folder_config(folder, limit=2), "train")
    assert greys(source) == [10, 20]
    assert [source.label(0), source.label(1)] == [0, 1]
    assert len(open_source(folder_config(folder, limit=99), "train")) == 6


def test_missing_split_folder_lists_the_folders_there(folder):
    with pytest.raises(ValueError, match=r"data.val_split 'held' .* folders there: train, validation"):
        open_source(folder_config(folder, val_split="held"), "val")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        open_source(folder_config(folder / "nowhere"), "train")


def test_folder_without_images_or_classes(folder):
    for file in (folder / "train").rglob("*.png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no images under .*train; expected \.jpg"):
        open_source(folder_config(folder), "train")
    (folder / "train" / "cat").rmdir()
    (folder / "train" / "dog").rmdir()
    with pytest.raises(ValueError, match=r"no class folders in .*train"):
        open_source(folder_config(folder), "train")


def test_differing_class_folders_are_named(folder):
    (folder / "validation" / "dog").rename(folder / "validation" / "fox")
    with pytest.raises(ValueError, match=r"only in train: dog; only in validation: fox"):
        open_source(folder_config(folder), "val")


def test_truncated_and_unidentified_images_are_named(folder):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    broken = folder / "train" / "cat" / "1.jpg"
    noise.save(broken)
    broken.write_bytes(broken.read_bytes()[:1500])
    (folder / "train" / "cat" / "1.png").write_text("not an image")
    source = open_source(folder_config(folder), "train")
    for index, name in ((1, "1.jpg"), (2, "1.png")):
        with pytest.raises(ValueError, match=re.escape(f"cat/{name} cannot be read")):
            source.image(index)


def test_skip_unreadable_takes_the_next_and_counts(folder, caplog):
    for name in ("1.png", "2.png"):
        (folder / "train" / "cat" / name).write_text("not an image")
    source = open_source(folder_config(folder, skip_unreadable=True), "train")
    for _ in range(2):
        image, index = source.image_or_next(1)
        assert (index, image.getpixel((0, 0))[0]) == (3, 20)
    assert source.skipped == {1, 2}
    assert caplog.text.count("skipped: image") == 2  # once per image
    for file in (folder / "train").rglob("*.png"):
        file.write_text("not an image")
    with pytest.raises(ValueError, match="none of the 6 images"):
        open_source(folder_config(folder, skip_unreadable=True), "train").image_or_next(4)


# hub


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def hub_dataset(labels, feature, values=None) -> datasets.Dataset:
    columns = {"image": [picture(value) for value in values or range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(columns, datasets.Features(image=datasets.Image(), label=feature))


def saved(path, train, validation, feature) -> DataConfig:
    """A save_to_disk folder with the labels given; the images count 0, 1, 2 ... in grey."""
    splits = {"train": hub_dataset(train, feature), "validation": hub_dataset(validation, feature)}
    # one shard: datasets 5.1 divides by the size of an empty split to find how many
    datasets.DatasetDict(splits).save_to_disk(path, num_shards=dict.fromkeys(splits, 1))
    return DataConfig(source="hub", path=str(path))


def test_hub_class_labels_from_save_to_disk(tmp_path):
    config = saved(tmp_path, [1, 0, 1], [0], datasets.ClassLabel(names=["zebra", "ant"]))
    train, val = (open_source(config, split) for split in ("train", "val"))
    assert train.labels == val.labels == ["zebra", "ant"]
    assert (train.targets.tolist(), greys(train)) == ([1, 0, 1], [0, 1, 2])
    assert (val.targets.tolist(), greys(val)) == ([0], [0])


def test_hub_integers_and_strings_take_their_names_from_train(tmp_path):
    integers = open_source(saved(tmp_path / "a", [2, 0], [0], datasets.Value("int64")), "val")
    assert (integers.labels, integers.label(0)) == (["0", "2"], 0)
    strings = open_source(saved(tmp_path / "b", ["n02", "n01", "n03"], ["n03"], datasets.Value("string")), "val")
    assert (strings.labels, strings.label(0)) == (["n01", "n02", "n03"], 2)


@pytest.mark.parametrize(
    ("train", "validation", "feature", "message"),
    [
        ([0, 1], [0, -1], datasets.ClassLabel(2), r"row 1 is labelled -1, expected one of 2 labels"),
        ([0, 1], [2], datasets.Value("int32"), r"row 0 is labelled 2, expected one of 2 labels .*'train' \(0, 1\)"),
        (["a", "b"], ["c"], datasets.Value("string"), r"row 0 is labelled 'c', expected one of 2 labels"),
        ([0.5, 1.0], [1.0], datasets.Value("float32"), "expected class labels, integers or strings"),
        ([0, 2**40], [0], datasets.Value("int64"), r"goes up to 1099511627776, expected numbers from 0"),
        ([0, 0], [0], datasets.Value("int64"), r"has one class \(0\): give images of two or more"),
        ([], [0], datasets.ClassLabel(2), r"split 'train'.* has no rows"),
        ([0, 1], [], datasets.ClassLabel(2), r"split 'validation'.* has no rows"),
        ([0, 1], [None], datasets.Value("int64"), "expected class labels, integers or strings"),
    ],
)
def test_hub_labels_that_are_refused(tmp_path, train, validation, feature, message):
    with pytest.raises(ValueError, match=message):
        open_source(saved(tmp_path, train, validation, feature), "val")


def test_hub_missing_split_and_columns_list_those_there(tmp_path):
    saved(tmp_path, [0], [0], datasets.ClassLabel(2))
    for wrong, message in (
        ({"val_split": "test"}, "data.val_split 'test' is not in .* splits there: train, validation"),
        ({"image_key": "img"}, "data.image_key 'img' is not a column of .* columns there: image, label"),
        ({"label_key": "wnid"}, "data.label_key 'wnid' is not a column of .* columns there: image, label"),
        ({"image_key": "label"}, "data.image_key 'label' .* is no image column but ClassLabel"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(DataConfig(source="hub", path=str(tmp_path), **wrong), "val")


def test_hub_reads_a_folder_of_parquet_and_a_folder_of_images(tmp_path, folder):
    feature = datasets.Value("int64")
    for split, labels in (("train", [1, 0]), ("test", [1])):
        hub_dataset(labels, feature).to_parquet(tmp_path / "p" / f"{split}-00000-of-00001.parquet")
    source = open_source(DataConfig(source="hub", path=str(tmp_path / "p"), val_split="test"), "train")
    assert (source.targets.tolist(), greys(source)) == ([1, 0], [0, 1])

    (tmp_path / "i").mkdir()
    for split in ("train", "validation"):
        (folder / split).rename(tmp_path / "i" / split)
    source = open_source(DataConfig(source="hub", path=str(tmp_path / "i")), "train")
    assert (source.labels, greys(source)) == (["cat", "dog"], [10, 11, 12, 20, 21, 22])


def test_hub_unreadable_row_is_named(tmp_path):
    content = {"image": [{"bytes": b"not an image", "path": "x.jpg"}, None], "label": [0, 1]}
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(2))
    datasets.DatasetDict(train=datasets.Dataset.from_dict(content, features)).save_to_disk(tmp_path)
    source = open_source(DataConfig(source="hub", path=str(tmp_path), val_share=0), "train")
    with pytest.raises(ValueError, match=r"image row 0 of hub .* train \(x.jpg\) cannot be read"):
        source.image(0)
    with pytest.raises(ValueError, match=r"image row 1 of hub .* train is empty"):
        source.image(1)


def test_hub_id_and_revision(monkeypatch):
    asked = []

    def load_dataset(name, revision):
        asked.append((name, revision))
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path in ("user/birds", "user/birds@v1.0"):
        with pytest.raises(ValueError, match=f"data.path '{path}' cannot be loaded: FileNotFoundError: no such"):
            open_source(DataConfig(source="hub", path=path), "train")
    assert asked == [("user/birds", None), ("user/birds", "v1.0")]


# data.source=auto: what data.path is


def drawn(root, *splits, classes=("cat", "dog"), images=10):
    for split in splits or ("",):
        for label in classes:
            for number in range(images):
                path = root / split / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    return root


def test_without_a_path_the_source_is_the_digits():
    assert source_of(DataConfig()) == "digits"
    assert open_source(DataConfig(), "val").origin == "embedded digits"


@pytest.mark.parametrize("spelt", ["{}", "{}/", "{}/../my pictures", "~/my pictures", "$PICTURES", "${{PICTURES}}/"])
def test_a_folder_of_pictures_is_found_however_it_is_spelt(tmp_path, monkeypatch, spelt):
    root = drawn(tmp_path / "my pictures", "train", "val")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PICTURES", str(root))
    data = DataConfig(path=spelt.format(root))
    assert source_of(data) == "folder"
    assert [len(open_source(data, split)) for split in ("train", "val")] == [20, 20]


def test_what_datasets_wrote_is_left_to_datasets(tmp_path):
    saved(tmp_path / "saved", [0, 1], [0, 1], datasets.ClassLabel(2))
    (tmp_path / "parquet").mkdir()
    hub_dataset([1, 0], datasets.Value("int64")).to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    drawn(tmp_path / "described", "train")
    (tmp_path / "described" / "train" / "metadata.csv").write_text("file_name,label\n")
    for name in ("saved", "parquet", "described"):
        assert source_of(DataConfig(path=str(tmp_path / name))) == "hub", name


@pytest.mark.parametrize("name", ["uoft-cs/cifar100", "zh-plus/tiny-imagenet@main", "a_b/c.d-e"])
def test_owner_and_name_are_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert source_of(DataConfig(path=name)) == "hub"


def test_a_path_to_nothing_is_refused_in_one_line(tmp_path):
    drawn(tmp_path / "flowers")
    (tmp_path / "flowers.zip").write_bytes(b"PK")
    for path, message in (
        ("flower", r"data\.path '.*flower' is no folder on this machine \(there is flowers\), and no hub id"),
        ("no/where/at/all", "is no folder on this machine, and no hub id, which reads owner/name"),
        ("flowers.zip", r"flowers\.zip' is a file, expected a folder of pictures: unpack it, and give the folder"),
        ("flowers/cat/0.png", r"is a file, expected a folder of pictures: give the folder it lies in, '.*flowers/cat'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(DataConfig(path=str(tmp_path / path)), "train")
    with pytest.raises(ValueError, match="'flowers' is no folder on this machine, and no hub id"):
        open_source(DataConfig(path="flowers"), "train")
    with pytest.raises(ValueError, match=r"\$NOWHERE in '\$NOWHERE/x' is not set here"):
        open_source(DataConfig(path="$NOWHERE/x"), "train")


def test_an_empty_folder_and_a_folder_around_the_class_folders_are_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' is an empty folder, expected folders of pictures, one per class"):
        open_source(DataConfig(path=str(tmp_path / "empty")), "train")
    (tmp_path / "flat").mkdir()
    picture(9).save(tmp_path / "flat" / "0.png")
    with pytest.raises(ValueError, match=r"no class folders in .*flat; expected images in .*flat/<class>/"):
        open_source(DataConfig(path=str(tmp_path / "flat")), "train")
    drawn(tmp_path / "unpacked" / "flowers")
    with pytest.raises(ValueError, match=r"holds one folder, 'flowers', with folders in it: .*'.*/flowers'"):
        open_source(DataConfig(path=str(tmp_path / "unpacked")), "train")


@pytest.mark.parametrize("path", ["mnist", "owner/na me", "https://huggingface.co/a/b", "C:\\pictures", "a/b/"])
def test_what_is_neither_folder_nor_hub_id_is_told(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is no folder on this machine, and no hub id, which reads owner/name: give"):
        open_source(DataConfig(path=path), "train")


@pytest.mark.parametrize("source", ["digits", "fractals", "textures"])
def test_a_path_that_would_be_passed_over_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match=rf"data\.source is '{source}', which reads no path: set data\.source=auto"):
        open_source(DataConfig(source=source, path=str(tmp_path)), "train")


# data.val_share: null


@pytest.mark.parametrize("split", ["", "train"])
def test_a_tenth_is_held_out_where_there_is_no_validation_split(tmp_path, split, caplog):
    data = DataConfig(path=str(drawn(tmp_path, split)))
    train, val = open_source(data, "train"), open_source(data, "val")
    assert (train.counts.tolist(), val.counts.tolist()) == ([9, 9], [1, 1])
    expected = "no split 'validation': 0.1 of the training images of each class are held out"
    assert (train.remarks, val.remarks, caplog.text.count(expected)) == ("", expected, 1)
    assert (train.held_out, val.held_out) == (0, 0.1)


def test_a_set_without_validation_split_names_the_one_that_could_be_measured_on(tmp_path):
    drawn(tmp_path / "f", "train", "Test")
    rows = hub_dataset([i % 2 for i in range(20)], datasets.ClassLabel(2))
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "h")
    drawn(tmp_path / "p", "train")
    assert open_source(DataConfig(path=str(tmp_path / "f")), "val").remarks.endswith(
        "held out; data.val_split=Test would measure on Test"
    )
    for name in ("h", "p"):
        for source in ("hub", "auto"):
            assert len(open_source(DataConfig(source=source, path=str(tmp_path / name)), "val")) == 2


def test_a_validation_split_that_is_there_or_asked_for_is_not_replaced(tmp_path):
    drawn(tmp_path / "f", "train", "valid", images=4)
    assert len(open_source(DataConfig(path=str(tmp_path / "f")), "val")) == 8
    with pytest.raises(ValueError, match=r"data\.val_split 'test' is not a folder"):
        open_source(DataConfig(path=str(tmp_path / "f"), val_split="test"), "val")
    with pytest.raises(ValueError, match=r"data\.val_share=0\.1 to hold out"):
        open_source(DataConfig(path=str(drawn(tmp_path / "t", "train")), val_share=0), "val")


def test_splits_of_a_set_go_by_their_other_names_too(tmp_path):
    made = {"training": hub_dataset([0, 1], datasets.ClassLabel(2)), "valid": hub_dataset([1], datasets.ClassLabel(2))}
    datasets.DatasetDict(made).save_to_disk(tmp_path)
    data = DataConfig(path=str(tmp_path))
    assert [len(open_source(data, split)) for split in ("train", "val")] == [2, 1]
