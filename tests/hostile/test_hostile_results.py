"""Results of earlier phases that were damaged, exchanged or made up."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.hostile.driver import cases
from tests.hostile.payloads import ALIASES, PICKLE
from trainer.disk import file_record


def signed(folder: Path) -> None:
    """Make result.json agree with its files again, as someone would who wants the change to pass."""
    result = json.loads((folder / "result.json").read_text())
    result["files"] = {name: file_record(folder / name) for name in result["files"]}
    (folder / "result.json").write_text(json.dumps(result))


def weights(phase: str, change):
    """Edit the tensors of an artifact and sign it."""

    def edit(out: Path) -> None:
        tensors = load_file(out / phase / "model.safetensors")
        change(tensors)
        save_file(tensors, out / phase / "model.safetensors")
        signed(out / phase)

    return edit


def exchanged(*names: str):
    """Exchange files of distill_0 and distill_1, or with no names the folders as a whole."""

    def edit(out: Path) -> None:
        for name in names or ("",):
            a, b, aside = out / "distill_0" / name, out / "distill_1" / name, out / "aside"
            a.rename(aside)
            b.rename(a)
            aside.rename(b)

    return edit


def config(change):
    def edit(out: Path) -> None:
        file = out / "distill_0/config.yaml"
        values = yaml.safe_load(file.read_text())
        change(values)
        file.write_text(yaml.safe_dump(values))
        signed(out / "distill_0")

    return edit


def written(file: str, text: str | bytes):
    return lambda out: (out / file).write_bytes(text if isinstance(text, bytes) else text.encode())


def listed(name: str):
    """A file that result.json claims for itself."""

    def edit(out: Path) -> None:
        result = json.loads((out / "distill_0/result.json").read_text())
        result["files"][name] = file_record(Path("/etc/passwd"))
        (out / "distill_0/result.json").write_text(json.dumps(result))

    return edit


def linked_to_itself(out: Path) -> None:
    shutil.rmtree(out / "distill_0")
    (out / "distill_0").symlink_to(out / "distill_0")


def first(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors[min(tensors)]


CASES = {
    "weights of the other module": (exchanged("model.safetensors"), ["distill_0/model.safetensors", "SHA-256"]),
    "weights and record of the other module": (
        exchanged("model.safetensors", "result.json", "config.yaml"),
        ["distill_0 holds the result of distill_1", "--phase distill --module 0"],
    ),
    "folder of the other module": (exchanged(), ["distill_0 holds the result of distill_1"]),
    "weights of the other module, signed": (
        lambda out: (exchanged("model.safetensors")(out), signed(out / "distill_0"), signed(out / "distill_1")),
        ["distill_0"],
    ),
    "NaN, signed": (weights("distill_1", lambda t: first(t).view(-1)[:1].fill_(float("nan"))), ["distill_1", "NaN"]),
    "shape, signed": (weights("distill_1", lambda t: t.update({min(t): torch.zeros(3, 3)})), ["distill_1", "shape"]),
    "missing tensor, signed": (weights("distill_0", lambda t: t.pop(min(t))), ["distill_0"]),
    "whole numbers, signed": (
        weights("distill_0", lambda t: t.update({name: value.long() for name, value in t.items()})),
        ["distill_0"],
    ),
    "truncated weights, signed": (
        lambda out: (
            written("distill_0/model.safetensors", (out / "distill_0/model.safetensors").read_bytes()[:500])(out),
            signed(out / "distill_0"),
        ),
        ["distill_0"],
    ),
    "result nested too deeply": (written("distill_0/result.json", "[" * 200_000), ["result.json", "truncated"]),
    "result that is a list": (written("distill_0/result.json", "[]"), ["result.json", "truncated or altered"]),
    "result that is no text": (written("distill_0/result.json", b"\xff{"), ["result.json", "truncated or altered"]),
    "result that names the system": (listed("/etc/passwd"), ["result.json names '/etc/passwd'"]),
    "result that climbs out": (listed("../../../etc/passwd"), ["result.json names '../../../etc/passwd'"]),
    "config with a tag": (
        written("distill_0/config.yaml", "recipe: !!python/object/apply:os.system [touch owned]\n"),
        ["config.yaml", "truncated or altered"],
    ),
    "config with a billion aliases": (
        written("distill_0/config.yaml", ALIASES + "recipe: *j\n"),
        ["config.yaml", "truncated or altered"],
    ),
    "config with a billion aliases in a value": (
        written("distill_0/config.yaml", ALIASES + "recipe: {teacher: {source: *j}}\n"),
        ["config.yaml", "truncated or altered"],
    ),
    "config nested too deeply": (written("distill_0/config.yaml", "[" * 200_000), ["config.yaml", "truncated"]),
    "config that is no text": (written("distill_0/config.yaml", b"\xff\xfe\x00"), ["config.yaml", "truncated"]),
    "config of another seed": (config(lambda c: c["recipe"].update(seed=7)), ["distill_0", "seed: 7 there, 0 here"]),
    "folder linked to itself": (linked_to_itself, ["distill_0"]),
}

SLOW = ("missing tensor, signed", "whole numbers, signed", "result that is a list", "result that is no text",
        "config with a billion aliases", "config that is no text")  # fmt: skip


@pytest.mark.parametrize("name", cases(CASES, SLOW))
def test_result(hostile, tmp_path, run_copy, name):
    change, expected = CASES[name]
    shutil.rmtree(run_copy / "train")
    change(run_copy)
    hostile.refuse(f"results: {name}", tmp_path, ["--phase", "train"], *expected)


META = {
    "NaN in the meta model, signed": (
        weights("meta", lambda t: first(t).view(-1)[:1].fill_(float("nan"))),
        ["meta", "NaN"],
    ),
    "shape in the meta model, signed": (
        weights("meta", lambda t: t.update({min(t): torch.zeros(3, 3)})),
        ["meta", "shape"],
    ),
    "NaN in the trained teacher, signed": (
        weights("teacher", lambda t: first(t).view(-1)[:1].fill_(float("nan"))),
        ["teacher", "NaN"],
    ),
}


@pytest.mark.parametrize("name", cases(META))
def test_meta_model(hostile, tmp_path, run_copy, name):
    change, expected = META[name]
    for phase in ("distill_0", "train"):
        shutil.rmtree(run_copy / phase)
    change(run_copy)
    hostile.refuse(f"results: {name}", tmp_path, ["--phase", "distill", "--module", "0"], *expected)


def student(**changes):
    """Edit config.json of the trained student and sign it."""

    def edit(out: Path) -> None:
        file = out / "train/config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        signed(out / "train")

    return edit


STUDENT = {
    "student of 1e9 blocks, signed": (student(depth=10**9), ["train", "depth"]),
    "student of 1e9 classes, signed": (student(num_classes=10**9), ["train", "1000000000"]),
    "student nested too deeply, signed": (
        lambda out: (written("train/config.json", "[" * 200_000)(out), signed(out / "train")),
        ["train"],
    ),
    "NaN in the student, signed": (weights("train", lambda t: first(t).view(-1)[:1].fill_(float("nan"))), ["NaN"]),
    "student of a pickle, signed": (
        lambda out: (written("train/model.safetensors", PICKLE)(out), signed(out / "train")),
        ["train", "model.safetensors"],
    ),
}


@pytest.mark.parametrize("name", cases(STUDENT))
def test_student(hostile, tmp_path, run_copy, name):
    change, expected = STUDENT[name]
    change(run_copy)
    hostile.refuse(f"results: {name}", tmp_path, ["--phase", "evaluate"], *expected)
