"""Tar files as a data set: the images of a folder of the same pictures, and one error for what is wrong in them."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import tarfile

import pytest
from PIL import Image

from models.preprocessing import Preprocessing
from trainer.config.data import AugmentConfig, DataConfig
from trainer.data import tars
from trainer.data.fingerprint import fingerprint
from trainer.data.loader import train_batches
from trainer.data.shards import ShardSource
from trainer.data.sources import FolderSource, HubSource, open_source, source_of
from trainer.judge.images import measured_images

PRE = Preprocessing(8, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("M2MKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(value: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(content, "PNG")
    return content.getvalue()


def pack(path, members: dict[str, bytes | str]):
    """A tar of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def labelled(first: int, labels: list[int]) -> dict[str, bytes | str]:
    """Images of the grey values first, first + 1, ... under keys of the same number."""
    members = {}
    for number, label in enumerate(labels, start=first):
        members |= {f"{number:04}.png": png(number), f"{number:04}.cls": str(label)}
    return members


@pytest.fixture
def root(tmp_path):
    """Training: 10 (class 1), 11 (0) in one shard, 12 (1), 13 (0) in another; validation: 20 (0), 21 (1)."""
    pack(tmp_path / "data" / "set-train-0000.tar", labelled(10, [1, 0]))
    pack(tmp_path / "data" / "set-train-0001.tar", labelled(12, [1, 0]))
    pack(tmp_path / "data" / "set-val-0000.tar", labelled(20, [0, 1]))
    return tmp_path / "data"


def opened(root, split="train", *, labels_needed=True, **more):
    return open_source(DataConfig(path=str(root), **more), split, labels_needed=labels_needed)


def greys(source) -> list[int]:
    return [source.image(index).getpixel((0, 0))[0] for index in range(len(source))]


# the images of a folder


@pytest.fixture
def pictures(tmp_path):
    """A folder of two classes, with a folder inside of one and names that a tar sorts in another way than a folder."""
    names = ("train/cat/b.png", "train/cat/a.png", "train/cat-2/0.png", "train/cat/in/0.png", "train/cat-2/z.jpg")
    for number, name in enumerate((*names, "validation/cat/x.png", "validation/cat-2/y.png")):
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * number,) * 3).save(file)
    return tmp_path / "pictures"


@pytest.fixture
def packed(pictures, tmp_path):
    """The same as shards of two images each, in an order of their own, the class's name beside each."""
    for split in ("train", "validation"):
        files = sorted((pictures / split).rglob("*.*"), key=lambda file: file.read_bytes())
        for number in range(0, len(files), 2):
            members = {}
            for file in files[number : number + 2]:
                name = str(file.relative_to(pictures / split))
                members |= {name: file.read_bytes(), f"{os.path.splitext(name)[0]}.txt": name.split("/")[0]}
            pack(tmp_path / "packed" / split / f"{number:05}.tar", members)
    return tmp_path / "packed"


def test_shards_are_a_folder_of_the_same_pictures_in_order_labels_pixels_and_fingerprint(pictures, packed):
    for split in ("train", "val"):
        folder, shards = opened(pictures, split), opened(packed, split)
        assert isinstance(folder, FolderSource) and isinstance(shards, ShardSource)
        assert (shards.labels, shards.targets.tolist()) == (folder.labels, folder.targets.tolist())
        assert greys(shards) == greys(folder)
        assert fingerprint(shards) == fingerprint(folder)
    for more in ({"limit": 2}, {"val_share": 0.5, "val_split": ""}):
        for split in ("train", "val"):
            assert greys(opened(packed, split, **more)) == greys(opened(pictures, split, **more))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder_on_any_ranks_workers_and_after_a_resume(pictures, packed, workers):
    def images(root, **where):
        batches = train_batches(opened(root), PRE, AugmentConfig(), seed=3, epoch=1, epochs=2, **where)
        return [(batch.index.tolist(), batch.images.numpy().tobytes()) for batch in batches]

    wanted = images(pictures, micro_batch=2)
    assert images(packed, micro_batch=2, workers=workers) == wanted
    assert images(packed, micro_batch=2, workers=workers, start_step=1) == wanted[1:]
    ranks = [images(packed, micro_batch=1, world=2, rank=rank, workers=workers) for rank in (0, 1)]
    assert [[*first[0], *second[0]] for first, second in zip(*ranks, strict=True)] == [index for index, _ in wanted]
    assert [first[1] + second[1] for first, second in zip(*ranks, strict=True)] == [content for _, content in wanted]


def read_all(source, pipe):
    pipe.send(greys(source))


def test_a_process_that_is_forked_reads_a_source_that_is_open(root):
    source = opened(root)
    wanted = greys(source)  # opens the files here
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    reader = context.Process(target=read_all, args=(source, theirs))
    reader.start()
    assert ours.poll(60) and ours.recv() == wanted
    reader.join()
    assert greys(source) == wanted == greys(pickle.loads(pickle.dumps(source)))


def test_few_files_are_open_at_a_time_where_a_process_may_open_few(tmp_path, monkeypatch):
    for number in range(6):
        pack(tmp_path / "many" / f"train-{number}.tar", labelled(10 + 2 * number, [0, 1]))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
    source = opened(tmp_path / "many", val_split="")
    for _ in range(2):
        assert sorted(greys(source)) == [10 + number for number in range(12) if number in source.rows]
    descriptors = len(os.listdir("/proc/self/fd"))
    assert len(source._files._open) == 2
    del source
    assert len(os.listdir("/proc/self/fd")) == descriptors - 2


# which tar files


def test_splits_by_a_word_of_the_file_or_by_folder(root, tmp_path):
    assert source_of(DataConfig(path=str(root))) == source_of(DataConfig(source="hub", path=str(root))) == "shards"
    train, val = opened(root), opened(root, "val")
    assert (greys(train), train.targets.tolist(), train.labels) == ([11, 13, 10, 12], [0, 0, 1, 1], ["0", "1"])
    assert (greys(val), val.remarks, train.remarks) == ([20, 21], "it stands for data.val_split 'validation'", "")
    for name, split in (("a/training/0.tar", "training"), ("b/data/x-train-0.tar", "train"), ("c/00000.tar", "")):
        pack(tmp_path / name, labelled(1, [0, 1]))
        assert list(tars.shard_splits(tmp_path / name[0], DataConfig())) == [split]


def test_shards_without_a_split_are_for_training_and_a_tenth_is_held_out(tmp_path):
    for number in range(3):
        pack(tmp_path / "00" / f"{number:05}.tar", labelled(10 * number, [0, 1] * 5))
        (tmp_path / "00" / f"{number:05}.parquet").write_bytes(b"a table that img2dataset writes")
        (tmp_path / "00" / f"{number:05}_stats.json").write_text("{}")
    train, val = opened(tmp_path / "00"), opened(tmp_path / "00", "val")
    assert (len(train), len(val), val.held_out) == (26, 4, 0.1)
    assert sorted(greys(train) + greys(val)) == list(range(30))
    with pytest.raises(ValueError, match="splits there: tar files without a split in their names"):
        opened(tmp_path / "00", "val", val_split="test")
    assert len(measured_images(DataConfig(path=str(tmp_path / "00")))) == 30


def test_the_split_that_is_measured(root):
    assert greys(measured_images(DataConfig(path=str(root)))) == [20, 21]
    assert len(measured_images(DataConfig(path=str(root)), "train")) == 4
    with pytest.raises(ValueError, match="split 'tset' is not in"):
        measured_images(DataConfig(path=str(root)), "tset")
    with pytest.raises(ValueError, match=r"data\.val_share is 0\.1, but .* has a split 'val'"):
        opened(root, val_share=0.1, val_split="val")


def test_archives_beside_pictures_stay_unread(pictures, root):
    for tar in root.iterdir():
        shutil.copy(tar, pictures / tar.name)
        shutil.copy(tar, pictures / "train" / "cat")
    assert source_of(DataConfig(path=str(pictures))) == "folder"
    (root / "table.parquet").write_bytes(b"")
    assert source_of(DataConfig(path=str(root))) == "hub"


def test_a_name_with_words_for_two_splits(root):
    (root / "set-val-0000.tar").rename(root / "train-val-0000.tar")
    with pytest.raises(
        ValueError, match=r"train-val-0000\.tar has words for several splits \(train, val\): give it one"
    ):
        opened(root)


def test_a_link_to_a_shard_that_is_gone(root):
    (root / "set-train-0002.tar").symlink_to(root / "gone.tar")
    with pytest.raises(ValueError, match=r"set-train-0002\.tar cannot be read \(No such file or directory\), expected"):
        opened(root)


# sets of the hub


def test_a_snapshot_in_the_cache_of_the_hub_is_a_folder_of_shards(root, tmp_path):
    """As `hf download --repo-type dataset` leaves it there: links to files that are called by their content."""
    hub = tmp_path / "hub" / "datasets--timm--set"
    snapshot = hub / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for number, file in enumerate(root.iterdir()):
        file.rename(hub / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "README.md").write_text("---\ndataset_info:\n  config_name: default\n---\n")
    assert greys(opened(snapshot)) == [11, 13, 10, 12]
    assert fingerprint(opened(snapshot, "val"))["images"] == 2


def test_datasets_reads_such_a_set_too_and_copies_it(root, tmp_path, monkeypatch):
    """What data.source=hub makes of an id on the hub: the builder that this folder is given to is the same."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    data = DataConfig(source="hub", path=str(root), image_key="png", label_key="cls")
    source = HubSource(data, "train")
    assert (greys(source), source.targets.tolist()) == ([10, 11, 12, 13], [1, 0, 1, 0])
    assert list((tmp_path / "arrow").rglob("*.arrow"))


# labels


def test_names_of_numbered_classes(root):
    (root / "classes.txt").write_text("dog\ncat\nfox\n")
    source = opened(root)
    assert (source.labels, source.targets.tolist(), source.counts.tolist()) == (
        ["dog", "cat", "fox"],
        [0, 0, 1, 1],
        [2, 2, 0],
    )
    (root / "classes.txt").unlink()
    described = {"features": {"jpg": {"_type": "Image"}, "cls": {"names": ["a", "b"], "_type": "ClassLabel"}}}
    (root / "dataset_info.json").write_text(json.dumps(described))
    assert opened(root).labels == ["a", "b"]
    (root / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset_info\.json is no JSON .*: write it again, or remove it"):
        opened(root)


def test_labels_of_json_text_and_numbers_with_gaps(tmp_path):
    samples = {
        "a.jpg": png(1),
        "a.json": '{"label": "dog", "id": 7, "x": null}',
        "b.png": png(2),
        "b.json": '{"label": "cat", "id": 3}',
    }
    pack(tmp_path / "json" / "train.tar", samples)
    pack(tmp_path / "json" / "val.tar", samples)
    source = opened(tmp_path / "json", "val")
    assert (source.labels, greys(source), source.named) == (["cat", "dog"], [2, 1], True)
    source = opened(tmp_path / "json", "val", label_key="id")
    assert (source.labels, greys(source)) == (["3", "7"], [2, 1])
    assert "label numbers 3, 7 are the classes 0 to 1" in source.remarks
    with pytest.raises(ValueError, match=r"data\.label_key 'y' is neither an extension of a label"):
        opened(tmp_path / "json", label_key="y")


def test_images_of_an_extension_that_is_named_and_what_is_passed_over(tmp_path):
    members = {
        "./k.jpg": png(1),
        "./k.seg.png": png(2),
        "./k.cls": "1",
        "l.jpg": png(3),
        "l.seg.png": png(4),
        "l.cls": "0",
    }
    pack(tmp_path / "s" / "train.tar", members | {"._k.jpg": b"x", "__MACOSX/k.jpg": b"x", "k.npy": b"x"})
    source = opened(tmp_path / "s", val_share=0, val_split="train")
    assert greys(source) == [3, 1]
    assert source.remarks == (
        "left out: 2 hidden (._* 1, __MACOSX 1), 3 with an extension that is not read (.seg.png 2, .npy 1)"
    )
    assert greys(opened(tmp_path / "s", val_split="train", image_key="seg.png")) == [4, 2]


def test_images_without_labels(tmp_path):
    pack(tmp_path / "s" / "train.tar", {"b.jpg": png(1), "a.jpg": png(2)})
    pack(tmp_path / "s" / "val.tar", {"c.jpg": png(3)})
    assert [
        (greys(s), s.labels) for s in (opened(tmp_path / "s", split, labels_needed=False) for split in ("train", "val"))
    ] == [([2, 1], []), ([3], [])]
    with pytest.raises(ValueError, match=r"no labels in the tar files of .*, expected KEY\.cls .* teacher\.head=none"):
        opened(tmp_path / "s")
    pack(tmp_path / "s" / "val.tar", {"c.jpg": png(3), "c.cls": "0"})
    with pytest.raises(ValueError, match="one has labels and the other has none"):
        opened(tmp_path / "s", "val", labels_needed=False)


def test_captions_are_no_classes_where_no_labels_are_needed(tmp_path):
    pack(tmp_path / "s" / "train.tar", {"a.jpg": png(1), "a.txt": "a dog", "b.jpg": png(2), "b.txt": "a cat on a mat"})
    source = opened(tmp_path / "s", val_split="train", labels_needed=False)
    assert (source.labels, source.remarks) == ([], "of 2 texts 2 differ: captions, not classes")
    assert opened(tmp_path / "s", val_split="train").labels == ["a cat on a mat", "a dog"]


# what is wrong

A = {"a.jpg": png(1), "a.cls": "0", "b.jpg": png(2), "b.cls": "1"}
ONE = {"a.jpg": png(1)}
TWO = ONE | {"b.jpg": png(2)}
WRONG = {
    "no number": (A | {"b.cls": "cat"}, r"train\.tar: 'b\.cls' holds 'cat', expected a whole number: number the"),
    "an empty label": (A | {"b.cls": ""}, r"'b\.cls' holds '', expected a whole number"),
    "a negative label": (A | {"b.cls": "-1"}, r"'b\.cls' holds label -1, expected a number from 0 .* for no label"),
    "a huge label": (A | {"b.cls": "99999999"}, r"holds label 99999999, expected a number from 0 to below 1000000"),
    "a label of no text": (A | {"b.cls": b"\xff\xfe"}, r"'b\.cls' is no text in UTF-8, expected a label"),
    "a label of many bytes": (A | {"b.cls": "0" * 2**21}, r"'b\.cls' has 2,097,152 bytes, expected a label of at most"),
    "an image without label": (A | {"c.jpg": png(3)}, r"'c' has an image and no label, expected KEY\.cls"),
    "a label without image": (A | {"c.cls": "1"}, r"'c' has a label \(\.cls\) and no image, expected KEY\.jpg"),
    "two images of a key": (A | {"b.png": png(3)}, r"'b\.png' is the second image of its key \(jpg, png\).* set data"),
    "a member twice": (A | {"./b.jpg": png(3)}, r"'\./b\.jpg' stands twice in it, expected one member of each name"),
    "one class": (ONE | {"a.cls": "0"}, r"has one class \(0\)"),
    "no image": ({"a.heic": b"x", "n01.tar": b"x"}, r"no image in 1 tar files .*, expected members KEY\.jpg .*heic 1"),
    "a missing field": (TWO | {"a.json": '{"label": 1}', "b.json": "{}"}, r"'b\.json' has no field 'label', expected"),
    "no JSON": (ONE | {"a.json": "{"}, r"'a\.json' is no JSON"),
    "several labels": (ONE | {"a.json": '{"label": [1, 2]}'}, r"'a\.json' holds \[1, 2\] as label, expected a whole"),
    "a truth value": (ONE | {"a.json": '{"label": true}'}, r"'a\.json' holds True as label"),
    "numbers and texts": (
        TWO | {"a.json": '{"label": 1}', "b.json": '{"label": "x"}'},
        r"labels are numbers \(1 of 'a\.jpg' .* and texts \('x' of 'b\.jpg'",
    ),
}


@pytest.mark.parametrize(("members", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_in_a_shard_is_one_error_that_names_it(tmp_path, members, message):
    pack(tmp_path / "s" / "train.tar", members)
    for _ in range(2):  # nothing of it is kept
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / "s", val_split="train")
    if "one class" not in message and "no image in" not in message:
        assert not (tmp_path / "cache").exists()


def test_a_link_in_a_shard(tmp_path):
    with tarfile.open(pack(tmp_path / "s" / "train.tar", A), "a") as tar:
        header = tarfile.TarInfo("c.jpg")
        header.type, header.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(header)
    with pytest.raises(ValueError, match=r"'c\.jpg' is a link or no plain file, .*: pack it with tar --dereference"):
        opened(tmp_path / "s")


@pytest.mark.parametrize("cut", [100, 512, 700, 1024, 2000, -10240, -9000, -11000])
def test_a_shard_that_is_cut_anywhere_is_refused(tmp_path, cut):
    """In the first header, after it, in data, between members, before the zeros of the end."""
    file = pack(tmp_path / "s" / "train.tar", labelled(1, [0, 1] * 10))
    content = file.read_bytes().rstrip(b"\0")
    whole = content + bytes(-len(content) % 512)
    file.write_bytes(whole[:cut] if cut > 0 else whole[: len(whole) + cut + 9000])
    with pytest.raises(ValueError, match=r"train\.tar \([\d,]+ bytes\) (is cut, damaged or no tar|has no end at byte)"):
        opened(tmp_path / "s")


def test_what_is_no_tar_or_damaged(tmp_path):
    file = pack(tmp_path / "s" / "train.tar", A)
    content = bytearray(file.read_bytes())
    content[1024:1032] = b"\xff" * 8  # the second header
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"has no end at byte 1,?\d+, expected a block of zeros"):
        opened(tmp_path / "s")
    file.write_bytes(b"not a tar" * 300)
    with pytest.raises(ValueError, match="is cut, damaged or no tar"):
        opened(tmp_path / "s")


@pytest.mark.parametrize("name", ["train.tar.gz", "train.tgz", "train.tar"])
def test_compressed_shards_are_refused_with_the_next_step(tmp_path, name):
    file = pack(tmp_path / "s" / "train.tar", A)
    content = file.read_bytes()
    file.unlink()
    (tmp_path / "s" / name).write_bytes(gzip.compress(content))
    with pytest.raises(
        ValueError, match=rf"{name} is compressed, so no place in it can be read alone.*: uncompress it"
    ):
        opened(tmp_path / "s")


def test_a_key_in_two_shards(root):
    shutil.copy(root / "set-train-0000.tar", root / "set-train-0002.tar")
    with pytest.raises(
        ValueError, match=r"key '0011' stands in .*train-0000\.tar and in .*train-0002\.tar, expected every key once"
    ):
        opened(root)


def test_validation_of_other_classes(root):
    pack(root / "set-val-0000.tar", labelled(20, [0, 7]))
    with pytest.raises(
        ValueError, match=r"set-val-0000\.tar: '0021\.png' is labelled 7, expected one of the 2 labels of training"
    ):
        opened(root, "val")
    (root / "classes.txt").write_text("cat\n")
    with pytest.raises(
        ValueError, match=r"'0010\.png' is labelled 1, expected a number below 1, the class names listed"
    ):
        opened(root)
    (root / "classes.txt").unlink()
    pack(root / "set-val-0000.tar", {"a.png": png(1), "a.txt": "cat", "b.png": png(1), "b.txt": "dog"})
    with pytest.raises(
        ValueError, match=r"labels in .* are 0, \.\.\. in training and 'cat', \.\.\. in the other split"
    ):
        opened(root, "val")


def test_an_image_that_cannot_be_read_is_named_by_shard_and_member(root):
    pack(root / "set-train-0001.tar", labelled(12, [1, 0]) | {"0012.png": b"not an image"})
    source = opened(root)
    with pytest.raises(ValueError, match=r"image .*set-train-0001\.tar: 0012\.png cannot be read: not a picture"):
        greys(source)
    lenient = opened(root, skip_unreadable=True)
    assert lenient.image_or_next(3)[1] == 0 and lenient.skipped == {3}


def test_a_shard_that_shrinks_or_is_exchanged_during_a_run(root):
    source = opened(root)
    assert source.image(0).size == (8, 8)
    file = root / "set-train-0000.tar"
    os.truncate(file, 600)  # the file that is open
    with pytest.raises(
        ValueError, match=r"set-train-0000\.tar: 0011\.png cannot be read: the shard ends [\d,]+ bytes too"
    ):
        source.image(0)
    with pytest.raises(ValueError, match=r"set-train-0000\.tar was changed since its index was made: start again"):
        pickle.loads(pickle.dumps(source)).image(0)


# the index


def test_the_index_is_made_once_and_again_when_a_shard_changes(root, cache, monkeypatch):
    made = []
    real = tars._made
    monkeypatch.setattr(tars, "_made", lambda shards, data: made.append(len(shards)) or real(shards, data))
    opened(root), opened(root, "val"), opened(root)
    assert made == [2, 1]
    assert len(list(cache.iterdir())) == 2
    pack(root / "set-train-0001.tar", labelled(12, [1, 1]))
    assert opened(root).targets.tolist() == [0, 1, 1, 1]
    assert made == [2, 1, 2]
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:200])  # cut by a full disk
    assert opened(root).targets.tolist() == [0, 1, 1, 1]
    assert made == [2, 1, 2, 2]


def test_a_cache_that_cannot_be_written(root, cache, caplog):
    cache.write_text("a file")
    assert len(opened(root)) == 4
    assert "the index of the shards cannot be kept in" in caplog.text and "M2MKD_CACHE" in caplog.text


def test_headers_alone_are_read_to_make_the_index(root, monkeypatch):
    read = []
    real = os.pread
    monkeypatch.setattr(tars.os, "pread", lambda file, size, offset: read.append(size) or real(file, size, offset))
    tars._made(tars.shard_splits(root, DataConfig())["train"], DataConfig())
    assert sorted(set(read)) == [1, 6, tars.BLOCK]  # a label, the first bytes of a shard, the last block


def test_names_that_are_long_or_no_ascii(tmp_path):
    long = "классы/" + "x" * 200 + "/" + "é" * 60
    pack(tmp_path / "s" / "train.tar", {f"{long}.png": png(5), f"{long}.cls": "0"} | labelled(1, [1]))
    source = opened(tmp_path / "s", val_split="train")
    assert greys(source) == [5, 1]
    assert source.name_of(0).decode() == f"/{long}.png"
