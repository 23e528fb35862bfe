"""Teacher directories that are damaged, lie about themselves, or carry code."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hostile.driver import QUICK, cases
from tests.hostile.payloads import PICKLE
from tests.launch import TINY
from tests.unit.vit_families import save_timm, save_transformers, tiny


@pytest.fixture(scope="session")
def teachers(tmp_path_factory) -> Path:
    """Good teachers of ten classes, one per layout."""
    folder = tmp_path_factory.mktemp("teachers")
    save_transformers(folder / "transformers", "ViTForImageClassification", num_labels=10, num_hidden_layers=4)
    save_timm(folder / "timm", tiny("vit", num_classes=10))
    return folder


def weights(change):
    """Edit model.safetensors as tensors by name."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def content(change):
    """Edit model.safetensors as bytes."""

    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return edit


def settings(file: str = "config.json", **changes):
    """Edit the top level of a JSON file."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **changes}))

    return edit


def model_args(**changes):
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        settings(model_args={**values["model_args"], **changes})(folder)

    return edit


def written(name: str, text: bytes | str):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def both(first, second):
    return lambda folder: (first(folder), second(folder))


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def fill(name: str, value: float):
    return lambda tensors: tensors[next(key for key in tensors if name in key)].view(-1)[:1].fill_(value)


def sharded(*names: str):
    """An index in place of the one file; `names` are its shards."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = {key: names[i % len(names)] for i, key in enumerate(tensors)}
        written("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": index}))(folder)

    return edit


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(PICKLE)


def with_code(folder: Path) -> None:
    settings(
        model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    )(folder)
    written("evil.py", "raise SystemExit('ran')")(folder)


def linked_to_itself(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "config.json")


TENSOR = b'{"dtype":"F32","shape":[9],"data_offsets":[0,36]}'
SQUARE = {"height": 32, "width": 32}
ELSEWHERE = {"file": "/etc/passwd", "url": "http://127.0.0.1:9/x.pth", "custom_load": True, "source": "url"}
FROM_TRANSFORMERS = {
    "truncated weights": (content(lambda data: data[:-1000]), ["model.safetensors"]),
    "empty weights": (content(lambda data: b""), ["model.safetensors"]),
    "header of 2**63 bytes": (content(lambda data: b"\xff" * 7 + b"\x7f" + data[8:]), ["model.safetensors"]),
    "header of 100 MB": (content(lambda data: header(b" " * 100_000_001) + data), ["model.safetensors"]),
    "header nested too deeply": (content(lambda data: header(b'{"a":' * 50_000)), ["model.safetensors"]),
    "flipped bit in the header": (content(lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:]), ["safetensors"]),
    "tensors that overlap": (
        content(lambda data: header(b'{"a":%s,"b":%s}' % (TENSOR, TENSOR)) + b"\0" * 36),
        ["model.safetensors"],
    ),
    "pickle under the name of safetensors": (content(lambda data: PICKLE), ["model.safetensors"]),
    "pickle in place of safetensors": (only_pickle, ["has no model.safetensors", "pickle"]),
    "NaN": (weights(fill("layernorm_after.weight", float("nan"))), ["layernorm_after.weight", "NaN"]),
    "infinity": (weights(fill("classifier.bias", float("inf"))), ["classifier.bias", "infinite"]),
    "whole numbers as weights": (
        weights(lambda t: t.update({"classifier.weight": t["classifier.weight"].to(torch.int64)})),
        ["classifier.weight", "int64"],
    ),
    "wrong shape": (
        weights(lambda t: t.update({"classifier.weight": torch.zeros(10, 23)})),
        ["classifier.weight"],
    ),
    "missing tensor": (weights(lambda t: t.pop("vit.embeddings.cls_token")), ["cls_token"]),
    "tensor of no one": (weights(lambda t: t.update({"vit.backdoor": torch.zeros(1)})), ["vit.backdoor"]),
    "no weights in the file": (weights(lambda t: t.clear()), ["weights"]),
    "1e9 layers": (settings(num_hidden_layers=10**9), ["num_hidden_layers=1000000000", "4 blocks"]),
    "width of 1e9": (settings(hidden_size=10**9), ["hidden_size=1000000000"]),
    "MLP of 1e9": (settings(intermediate_size=10**9), ["weights there are"]),
    "1e9 classes": (settings(num_labels=10**9), ["num_labels=1000000000"]),
    "images of 1e9 pixels": (settings(image_size=10**9), ["image_size=1000000000"]),
    "1e9 channels": (settings(num_channels=10**9), ["num_channels=1000000000"]),
    "patches of no size": (settings(patch_size=0), ["patch_size=0", "at least 1"]),
    "negative width": (settings(hidden_size=-24), ["hidden_size=-24"]),
    "half a head": (settings(num_attention_heads=2.5), ["num_attention_heads=2.5"]),
    "width as text": (settings(hidden_size="24"), ["hidden_size='24'"]),
    "epsilon of NaN": (settings(layer_norm_eps=float("nan")), ["finite"]),
    "unknown activation": (settings(hidden_act="os.system"), ["os.system"]),
    "class names that are no names": (settings(id2label={str(i): {"a": 1} for i in range(10)}), ["expected text"]),
    "family that runs code": (with_code, ["evil"]),
    "config that is no text": (written("config.json", b"\xff\xfe\x00"), ["config.json", "utf-8"]),
    "config nested too deeply": (written("config.json", "[" * 200_000), ["config.json", "nested too deeply"]),
    "config that is a list": (written("config.json", "[1, 2]"), ["config.json", "holds a list"]),
    "config linked to itself": (linked_to_itself, ["config.json"]),
    "image mean of NaN": (settings("preprocessor_config.json", image_mean=[float("nan")] * 3), ["mean"]),
    "image std of zero": (settings("preprocessor_config.json", image_std=[0, 1, 1]), ["std"]),
    "resizing to 1e9 pixels": (
        settings("preprocessor_config.json", size={"shortest_edge": 10**9}, do_center_crop=True, crop_size=SQUARE),
        ["crop_pct"],
    ),
    "unknown resampling": (settings("preprocessor_config.json", resample=99), ["resample"]),
    "processor nested too deeply": (written("preprocessor_config.json", "[" * 200_000), ["preprocessor_config.json"]),
    "processor that is a list": (written("preprocessor_config.json", "[]"), ["preprocessor_config.json"]),
    "index that climbs out": (sharded("../outside.safetensors"), ["'../outside.safetensors'"]),
    "index of a pickle": (sharded("pytorch_model.bin"), ["'pytorch_model.bin'"]),
    "index of the system": (sharded("/etc/passwd"), ["'/etc/passwd'"]),
    "index nested too deeply": (
        both(sharded("x.safetensors"), written("model.safetensors.index.json", "[" * 200_000)),
        ["index"],
    ),
}  # fmt: skip
FROM_TIMM = {
    "1e9 layers": (model_args(depth=10**9), ["depth=1000000000"]),
    "1e9 classes": (settings(num_classes=10**9), ["num_classes"]),
    "unknown argument": (model_args(backdoor=1), ["backdoor"]),
    "arguments that are no arguments": (settings(model_args=[1]), ["model_args=[1]"]),
    "architecture that is no name": (settings(architecture={"a": 1}), ["architecture"]),
    "NaN": (weights(fill("blocks.2.mlp.fc1.weight", float("nan"))), ["blocks.2.mlp.fc1.weight", "NaN"]),
    "pickle in place of safetensors": (only_pickle, ["has no model.safetensors", "pickle"]),
    "config that asks for a pickle elsewhere": (
        both(settings(pretrained_cfg=ELSEWHERE), weights(lambda t: t.pop("norm.weight"))),
        ["norm.weight"],
    ),
    "mean of text": (settings(pretrained_cfg={"mean": ["a", "b", "c"], "std": [1, 1, 1]}), ["could not convert"]),
}  # fmt: skip
CASES = {("transformers", name): case for name, case in FROM_TRANSFORMERS.items()} | {
    ("timm", name): case for name, case in FROM_TIMM.items()
}

SLOW = [("transformers", name) for name in (
    "empty weights", "header of 100 MB", "header nested too deeply", "flipped bit in the header", "infinity",
    "missing tensor", "MLP of 1e9", "1e9 channels", "negative width", "half a head", "width as text",
    "unknown activation", "config that is a list", "image std of zero", "processor that is a list",
    "processor nested too deeply", "index of the system", "class names that are no names", "no weights in the file",
)] + [("timm", name) for name in (
    "1e9 classes", "unknown argument", "arguments that are no arguments", "mean of text",
    "architecture that is no name",
)]  # fmt: skip


@pytest.mark.parametrize("case", cases(CASES, SLOW))
def test_directory(hostile, tmp_path, teachers, case):
    layout, name = case
    change, expected = CASES[case]
    folder = tmp_path / "teacher"
    folder.mkdir()
    for file in (teachers / layout).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder)
    arguments = ["--phase", "meta", f"teacher.source={folder}", "student.patch_size=8"]
    hostile.refuse(f"teachers: {layout}, {name}", tmp_path, arguments, str(folder), *expected)


@pytest.mark.parametrize("name", ["teacher.pt", "pytorch_model.bin"])
def test_pickle_as_teacher(hostile, tmp_path, name):
    (tmp_path / name).write_bytes(PICKLE)
    arguments = ["--phase", "meta", f"teacher.source={tmp_path / name}"]
    hostile.refuse(f"teachers: {name}", tmp_path, arguments, str(tmp_path / name), "Pickle", "convert it")


@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_good_teachers_pass(hostile, tmp_path, teachers, layout):
    """So that the refusals above are about what was changed."""
    arguments = [*TINY, *QUICK, "--phase", "meta", f"teacher.source={teachers / layout}", "meta.epochs=1"]
    finished = hostile.warm.run([*arguments, "student.patch_size=8", "--out", tmp_path / "out"])
    assert finished.code == 0, finished.output
