"""Data sets for `datasets` whose labels, files or indexes are wrong or made to hurt."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hostile.driver import cases
from tests.hostile.payloads import CONTENTS, PICKLE, encoded

PIXELS = encoded("PNG", 8)
ROWS = 20


def parquet(root: Path, labels: list, images: list | None = None, kind: pa.DataType | None = None) -> None:
    """root/train.parquet; every image is embedded unless `images` says otherwise."""
    images = images or [{"bytes": PIXELS, "path": None}] * len(labels)
    shape = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    root.mkdir(exist_ok=True)
    pq.write_table(
        pa.table({"image": pa.array(images, shape), "label": pa.array(labels, kind)}), root / "train.parquet"
    )


def halves(*last: object) -> list:
    return [0, 1] * ((ROWS - len(last)) // 2) + list(last)


def image_of(file: str) -> list[dict]:
    return [{"bytes": PIXELS, "path": "x.png"}] * (ROWS - 1) + [{"bytes": None, "path": file}]


def picture_folder(root: Path, metadata: str) -> None:
    """An imagefolder with a metadata file; a secret picture lies beside it."""
    (root / "train").mkdir(parents=True)
    (root.parent / "secret.png").write_bytes(PIXELS)
    for i in range(ROWS):
        (root / "train" / f"{i}.png").write_bytes(PIXELS)
    (root / "train/metadata.jsonl").write_text(metadata)


def rows_of_metadata(last: str) -> str:
    rows = [{"file_name": f"{i}.png", "label": i % 2} for i in range(ROWS)]
    return "\n".join(json.dumps(row) for row in [*rows, {"file_name": last, "label": 1}])


def slip_zip(root: Path) -> None:
    root.mkdir()
    with zipfile.ZipFile(root / "train.zip", "w") as archive:
        for i in range(ROWS):
            archive.writestr(f"{'ab'[i % 2]}/{i}.png", PIXELS)
        archive.writestr("../../../../a/owned.png", b"")
        archive.writestr(f"{root}/a/owned.png", b"")


def slip_tar(root: Path) -> None:
    root.mkdir()
    with tarfile.open(root / "train.tar", "w") as archive:
        for name in ("../../owned.png", "/tmp/owned.png", "0.png"):
            member = tarfile.TarInfo(name)
            member.size = len(PIXELS)
            archive.addfile(member, io.BytesIO(PIXELS))


def on_disk(root: Path) -> None:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(2))
    rows = {"image": [{"bytes": PIXELS, "path": None}] * ROWS, "label": halves()}
    for name in ("data", "elsewhere"):
        split = datasets.Dataset.from_dict(rows, features)
        datasets.DatasetDict(train=split).save_to_disk(root.parent / name)


def edited(root: Path, file: str, change) -> None:
    on_disk(root)
    values = json.loads((root / file).read_text())
    change(values)
    (root / file).write_text(json.dumps(values))


def written(root: Path, **contents: bytes) -> None:
    root.mkdir()
    for name, content in contents.items():
        (root / name.replace("__", ".")).write_bytes(content)


def damaged(root: Path, position: float) -> None:
    on_disk(root)
    file = next(root.glob("train/*.arrow"))
    content = bytearray(file.read_bytes())
    content[int(len(content) * position) :] = b"\xff" * 40 if position else b""
    file.write_bytes(content)


def half_a_parquet(root: Path) -> None:
    parquet(root, halves())
    (root / "train.parquet").write_bytes((root / "train.parquet").read_bytes()[:300])


ELSEWHERE = "../../elsewhere/train/data-00000-of-00001.arrow"
OUTSIDE = "names a file outside of it"
CASES = {
    "label of 1e9": (lambda root: parquet(root, halves(0, 10**9)), ["1000000000", "from 0 to below"]),
    "label of 2**63": (lambda root: parquet(root, halves(0, 2**63), kind=pa.uint64()), ["from 0 to below"]),
    "negative label": (lambda root: parquet(root, halves(0, -1)), ["row 19 is labelled -1", "stands for no label"]),
    "label that is no number": (lambda root: parquet(root, [float("nan")] * ROWS), ["expected class labels"]),
    "missing label": (lambda root: parquet(root, halves(0, None)), ["expected class labels", "no gaps"]),
    "true and false": (lambda root: parquet(root, [True, False] * 10), ["expected class labels"]),
    "lists as labels": (lambda root: parquet(root, [[0, 1]] * ROWS), ["expected class labels"]),
    "no labels at all": (lambda root: parquet(root, [-1] * ROWS), ["a split without labels", "data.val_split"]),
    "numbers as text with a space": (lambda root: parquet(root, ["1", "1 "] * 10), ["'1' and '1 '", "white space"]),
    "name that writes a line": (lambda root: parquet(root, ["a", "b\nerror: no"] * 10), ["whose name is no text"]),
    "one class": (lambda root: parquet(root, [0] * ROWS), ["has one class (0)"]),
    "no rows": (lambda root: parquet(root, [], kind=pa.int64()), ["cannot be loaded"]),
    "smaller than the batch": (lambda root: parquet(root, [0, 1] * 4), ["8 training images are fewer"]),
    "row that is a bomb": (
        lambda root: parquet(root, halves(), [{"bytes": CONTENTS["PNG bomb of 3.6 Gpixel"], "path": "x"}] * ROWS),
        ["cannot be read", "data.max_pixels"],
    ),
    "row without content": (
        lambda root: parquet(root, halves(), [{"bytes": None, "path": None}] * ROWS),
        ["is empty"],
    ),
    "row that names a file of the system": (lambda root: parquet(root, halves(), image_of("/etc/passwd")), [OUTSIDE]),
    "row that climbs out": (
        lambda root: parquet(root, halves(), image_of(f"{root}/../secret.png")),
        [OUTSIDE, "secret.png"],
    ),
    "row that names an address": (
        lambda root: parquet(root, halves(), image_of("http://127.0.0.1:9/x.png")),
        [OUTSIDE, "127.0.0.1"],
    ),
    "metadata that climbs out": (lambda root: picture_folder(root, rows_of_metadata("../../secret.png")), ["secret"]),
    "metadata nested too deeply": (lambda root: picture_folder(root, "[" * 100_000), ["cannot be loaded"]),
    "zip that climbs out": (slip_zip, ["cannot be loaded"]),
    "tar that climbs out": (slip_tar, ["no labels in the tar files"]),
    "pickle": (lambda root: written(root, train__pkl=PICKLE), ["cannot be loaded"]),
    "script": (
        lambda root: written(root, data__py=b"raise SystemExit('ran')", train__txt=b"x"),
        ["cannot be loaded", "scripts are no longer supported"],
    ),
    "half a parquet file": (half_a_parquet, ["cannot be loaded"]),
    "half an arrow file": (lambda root: damaged(root, 0.0), ["cannot be loaded"]),
    "index that climbs out": (
        lambda root: edited(root, "train/state.json", lambda s: s["_data_files"][0].update(filename=ELSEWHERE)),
        ["cannot be loaded", "../../elsewhere", "not a plain name"],
    ),
    "splits that climb out": (
        lambda root: edited(root, "dataset_dict.json", lambda s: s["splits"].append("../elsewhere/train")),
        ["cannot be loaded", "'../elsewhere/train'", "not a plain name"],
    ),
    "index that is no index": (
        lambda root: (on_disk(root), (root / "train/state.json").write_text("[" * 100_000)),
        ["cannot be loaded"],
    ),
    "index that is no text": (
        lambda root: (on_disk(root), (root / "dataset_dict.json").write_bytes(b"\xff\xfe{")),
        ["cannot be loaded"],
    ),
}  # fmt: skip

SLOW = ("label of 2**63", "true and false", "lists as labels", "one class", "smaller than the batch", "script",
        "row without content", "row that names an address", "metadata nested too deeply", "index that is no text",
        "half an arrow file")  # fmt: skip


@pytest.mark.parametrize("name", cases(CASES, SLOW))
def test_data_set(hostile, tmp_path, name):
    make, expected = CASES[name]
    make(tmp_path / "data")
    arguments = ["--phase", "teacher", "data.source=hub", f"data.path={tmp_path / 'data'}", "data.val_split=train"]
    hostile.refuse(f"data sets: {name}", tmp_path, arguments, *expected)


def test_teacher_of_other_classes(hostile, finished_run, tmp_path):
    """As many classes, but other ones: nothing may be learnt from their rows."""
    parquet(tmp_path / "data", [f"class {i}" for i in range(10)] * 4)
    arguments = ["--phase", "meta", "teacher.head=own", f"teacher.source={finished_run / 'teacher'}", "data.source=hub",
                 f"data.path={tmp_path / 'data'}", "data.val_split=train"]  # fmt: skip
    expected = ["has other classes than the data", "only in its head: 0, 1, 2", "teacher.classes=numbers"]
    hostile.refuse("data sets: teacher of other classes", tmp_path, arguments, *expected)
