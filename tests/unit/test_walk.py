"""The walk through class folders: what it reads, what it leaves out, that one line says so; folder and hub alike."""

import os
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from trainer.config.data import DataConfig
from trainer.data import walk
from trainer.data.sources import FolderSource, HubSource, open_source
from trainer.plan.rehearsal import DryRun


def save(path, value: int = 9, **how) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path, **how)


@pytest.fixture
def root(tmp_path):
    """train and val of the classes cat (2 and 1 pictures) and dog (1 and 1)."""
    for name in ("train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "val/cat/2.png", "val/dog/3.png"):
        save(tmp_path / "data" / name)
    return tmp_path / "data"


def opened(root, split="train", **more):
    return open_source(DataConfig(**{"source": "folder", "path": str(root), "val_split": "val"} | more), split)


def names(source) -> list[str]:
    return [os.fsdecode(path).removeprefix(f"{source.origin}/") for path in source._paths]


IN_TRAIN = ["train/cat/0.png", "train/cat/1.png", "train/dog/0.png"]


def lay(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def test_an_ordinary_folder_is_worth_no_word(root, caplog):
    source = opened(root)
    assert (names(source), source.remarks, caplog.text) == (IN_TRAIN, "", "")


# what lies in folders that people bring, and how it is counted
HIDDEN = {
    "of Jupyter, as a class": (".ipynb_checkpoints/0-checkpoint.png", ".ipynb_checkpoints 1"),
    "of Jupyter, in a class": ("cat/.ipynb_checkpoints/0-checkpoint.png", ".ipynb_checkpoints 1"),
    "of git": (".git/objects/1.png", ".git 1"),
    "thumbnails of a Synology": ("cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "@eaDir 1"),
    "unpacked by macOS": ("__MACOSX/cat/0.png", "__MACOSX 1"),
    "beside a file that macOS copied": ("cat/._0.png", "._* 1"),
    "of the Finder": ("cat/.DS_Store", ".DS_Store 1"),
    "of the Explorer": ("dog/Thumbs.db", "Thumbs.db 1"),
    "of a mounted disk": ("lost+found/1.png", "lost+found 1"),
    "the recycle bin": ("$RECYCLE.BIN/1.png", "$RECYCLE.BIN 1"),
    "a picture that a file manager hid": ("dog/.hidden.png", ".hidden.png 1"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_hidden_names_are_neither_class_nor_picture(root, case, caplog):
    """Also in one split alone: it is no reason to say that the class folders differ."""
    name, counted = HIDDEN[case]
    lay(root / "train" / name)
    source = opened(root)
    assert (source.labels, names(source)) == (["cat", "dog"], IN_TRAIN)
    assert source.remarks == f"left out: 1 hidden ({counted})"
    assert f"folder {root}/train: {source.remarks}" in caplog.text
    assert opened(root, "val").remarks == ""
    lay(root / "val" / name)
    val = opened(root, "val")
    assert (val.labels, names(val), val.remarks) == (["cat", "dog"], ["val/cat/2.png", "val/dog/3.png"], source.remarks)


OTHER = {
    "cat/0.heic": "left out: 1 with an extension that is not read (.heic 1)",
    "cat/0.AVIF": "left out: 1 with an extension that is not read (.avif 1)",
    "cat/drawing.svg": "left out: 1 with an extension that is not read (.svg 1)",
    "dog/features.npy": "left out: 1 with an extension that is not read (.npy 1)",
    "dog/0.png.part": "left out: 1 with an extension that is not read (.part 1)",
    "dog/0001": "left out: 1 with an extension that is not read (no extension 1)",
    "labels.txt": "left out: 1 beside the class folders (.txt 1)",
    "4.jpg": "left out: 1 beside the class folders (.jpg 1)",
}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_read_is_counted(root, name):
    lay(root / "train" / name)
    source = opened(root)
    assert (names(source), source.remarks) == (IN_TRAIN, OTHER[name])


def test_one_line_counts_all_of_it_the_most_frequent_first(root):
    train = root / "train"
    for number in range(3):
        lay(train / f"cat/{number}.heic")
        lay(train / f"dog/._{number}.png")
    for name in ("cat/a.txt", "cat/.DS_Store", "3.jpg"):
        lay(train / name)
    (train / "cat/gone.png").symlink_to("nowhere.png")
    save(train / "dog/more/7.png")
    (train / "fox").mkdir()
    (root / "val/fox").mkdir()
    source = opened(root)
    assert source.remarks == (
        "left out: 4 hidden (._* 3, .DS_Store 1), 4 with an extension that is not read (.heic 3, .txt 1), 1 as a link "
        "to nowhere (cat 1), 1 beside the class folders (.jpg 1); in folders inside of class folders, counted as the "
        "class's: 1 pictures; no picture in class folder fox"
    )
    assert names(source) == [*IN_TRAIN, "train/dog/more/7.png"]


def test_many_kinds_are_cut(root):
    for number in range(7):
        lay(root / f"train/cat/x.e{number}")
    assert opened(root).remarks.endswith("(.e0 1, .e1 1, .e2 1, .e3 1, .e4 1 and 2 more)")


def test_the_dry_run_shows_it(root):
    lay(root / "val/dog/0.heic")
    sources = opened(root), opened(root, "val")
    run = type("Run", (), {"sources": sources, "classifies": True})
    line = DryRun.data(type("OfARun", (), {"run": run}))
    assert line == (
        f"folder {root}/train, 3 training and 2 validation images, 2 classes; images per class (training + "
        "validation): cat 2 + 1, dog 1 + 1; validation: left out: 1 with an extension that is not read (.heic 1); "
        f"folder {root}/train: 2 of 2 classes have fewer than 3 training images, of which nothing general is learned: "
        "cat 2, dog 1"
    )


def test_every_extension_of_a_format_that_is_read(root):
    """Whatever its case: GIF and the relatives of JPEG and PPM too, which ImageFolder passes over."""
    shutil.rmtree(root / "train/cat")
    for name in ("a.gif", "b.GIF", "c.jpe", "d.JFIF", "e.pbm", "f.pnm", "g.TIF", "h.webp", "i.apng", "j.Jpg"):
        file_format = {"pnm": "PPM", "pbm": "PPM", "apng": "PNG", "jpe": "JPEG", "jfif": "JPEG"}
        save(root / "train/cat" / name, format=file_format.get(name.split(".")[1].lower()))
    source = opened(root)
    assert [os.path.basename(path)[0] for path in names(source)] == [*"abcdefghij", "0"]
    for index in range(10):
        assert abs(source.image(index).getpixel((4, 4))[0] - 9) <= 2  # lossy ones are a little off


def test_links_that_lead_nowhere_are_counted(root):
    (root / "train/cat/2.png").symlink_to("2.png")  # to itself
    (root / "train/cat/old").symlink_to(root / "unmounted")
    (root / "train/owl").symlink_to(root / "unmounted/owl")
    source = opened(root)
    assert (source.labels, names(source)) == (["cat", "dog"], IN_TRAIN)
    assert source.remarks == "left out: 3 as a link to nowhere (cat 2, owl 1)"


def test_one_folder_under_two_classes_is_refused(root):
    for split in ("train", "val"):
        (root / split / "hound").symlink_to("dog")
    with pytest.raises(ValueError, match="train/hound leads to a folder that was read already: remove the link"):
        opened(root)


def test_a_folder_that_this_user_may_not_read(root, monkeypatch):
    original = os.scandir

    def scandir(path):
        if str(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(walk.os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"train/dog cannot be read \(Permission denied\): give this user access"):
        opened(root)


def test_nothing_but_what_is_not_read(root):
    for path in root.glob("train/*/*.png"):
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"no images under .*train; expected \.jpg.*left out: 3 with .*\.heic 3"):
        opened(root)
    for name in ("cat", "dog"):
        shutil.rmtree(root / "train" / name)
    lay(root / "train/0.jpg")
    with pytest.raises(ValueError, match=r"no class folders in .*left out: 1 beside the class folders \(\.jpg 1\)"):
        opened(root)


@pytest.mark.parametrize("asked", ["validation", "valid", "dev"])
def test_the_one_folder_that_is_another_name_of_the_split(root, asked):
    source = opened(root, "val", val_split=asked)
    assert names(source) == ["val/cat/2.png", "val/dog/3.png"]
    assert source.remarks == f"it stands for data.val_split {asked!r}"
    (root / "train").rename(root / "training")
    assert opened(root, val_split=asked).remarks == "it stands for data.train_split 'train'"
    assert names(opened(root, "val", val_split=asked)) == names(source)
    (root / "val").rename(root / "Valid")
    assert len(opened(root, "val", val_split=asked)) == 2


def test_several_other_names_or_none_are_refused(root):
    with pytest.raises(ValueError, match=r"data.val_split 'test' is not a folder in .*data; folders there: train, val"):
        opened(root, "val", val_split="test")
    shutil.copytree(root / "val", root / "valid")
    assert names(opened(root, "val"))[0] == "val/cat/2.png"  # the name that was asked for
    with pytest.raises(ValueError, match=r"'validation' is not a folder in .*, val and valid could each be meant"):
        opened(root, "val", val_split="validation")


# the same folder by data.source=hub


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def both(root, split, **more):
    return (opened(root, split, source=source, **more) for source in ("folder", "hub"))


def odd_classes(root) -> None:
    for split in ("train", "val"):
        save(root / split / "Zebra/8.png", 8)  # capitals sort first
        save(root / split / "9/9.png", 90)


def oddities(root) -> None:
    """What `datasets` would take for classes, pictures and labels of its own, or refuse."""
    save(root / "train/.ipynb_checkpoints/0.png")
    save(root / "train/__MACOSX/0.png")
    save(root / "train/cat/kitten/1.gif", 55)
    save(root / "train/owl/0.webp", 5)
    (root / "val/owl").mkdir()
    lay(root / "labels.csv")
    lay(root / "train/cat/notes.txt")
    lay(root / "test/unknown/0.png")


@pytest.mark.parametrize("change", [lambda root: None, odd_classes, oddities], ids=["plain", "capitals", "oddities"])
@pytest.mark.parametrize("val_split", ["val", "validation"])
def test_hub_reads_a_folder_of_pictures_as_folder_does(root, change, val_split):
    change(root)
    for split in ("train", "val"):
        folder, hub = both(root, split, val_split=val_split)
        assert isinstance(hub, FolderSource)
        assert (hub.labels, hub.targets.tolist(), names(hub)) == (folder.labels, folder.targets.tolist(), names(folder))
        assert (hub.remarks, hub.origin) == (folder.remarks, folder.origin)
        for index in range(len(folder)):
            assert np.array_equal(hub.image(index), folder.image(index))


def test_hub_refuses_class_names_that_differ_between_splits(root):
    (root / "val/dog").rename(root / "val/Dog")
    for source in ("folder", "hub"):
        with pytest.raises(ValueError, match="only in train: dog; only in val: Dog"):
            opened(root, "val", source=source, val_split="validation")


def metadata(root) -> None:
    for split in ("train", "val"):
        rows = [f"{path.relative_to(root / split)},{path.parent.name}-ish" for path in (root / split).glob("*/*.png")]
        (root / split / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))


def card(root) -> None:
    files = [f"  - split: {name}\n    path: {folder}/**\n" for name, folder in (("train", "train"), ("val", "val"))]
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{''.join(files)}---\n")


def test_hub_leaves_what_has_metadata_to_datasets(root):
    metadata(root)
    source = opened(root, source="hub", val_split="validation")
    assert isinstance(source, HubSource)
    assert source.labels == ["cat-ish", "dog-ish"]


def test_hub_leaves_a_folder_with_a_card_to_datasets(root):
    card(root)
    source = opened(root, source="hub", val_split="val")
    assert isinstance(source, HubSource)
    assert (source.labels, len(source)) == (["cat", "dog"], 3)


def test_hub_leaves_parquet_in_folders_of_classes_to_datasets(tmp_path):
    rows = {"image": [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (3, 4)], "label": [0, 1]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(2))
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / split / "part=0/0.parquet")
    source = opened(tmp_path, source="hub", val_split="validation")
    assert isinstance(source, HubSource) and len(source) == 2


def test_hub_has_no_columns_in_a_folder_of_pictures(root):
    for key in ("image_key", "label_key"):
        with pytest.raises(ValueError, match=rf"data.{key} 'x' is not a column of .*; columns there: image, label"):
            opened(root, source="hub", **{key: "x"})
