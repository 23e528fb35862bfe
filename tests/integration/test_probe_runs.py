"""A teacher of other classes than the data's, on real ranks: its probe is killed, goes on, and teaches."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.launch import TINY
from tests.unit.vit_families import save_timm, tiny

ONE_EPOCH = ["meta.epochs=1", "distill.epochs=1", "train.epochs=1", "train.baselines=[]"]
LENGTHS = [f"{section}.warmup_epochs=0" for section in ("teacher", "meta", "distill", "train")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A ViT of 1000 classes with random weights."""
    folder = tmp_path_factory.mktemp("teacher") / "vit"
    save_timm(folder, tiny("vit", num_classes=1000))
    return folder


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_killed_among_its_features_it_computes_the_rest_on_other_ranks(warm, teacher, tmp_path):
    base = [*TINY, *ONE_EPOCH, *LENGTHS, "--out", tmp_path, f"teacher.source={teacher}", "data.limit=320"]
    kept = tmp_path / "probe/features"
    probe = [*base, "--phase", "probe"]
    warm.run(probe, ranks=2, kill_when=lambda: len(list(kept.glob("train/*.safetensors"))) > 2)
    before = {path: path.stat().st_mtime_ns for path in kept.glob("*/*.safetensors")}
    finished = warm.run(probe, ranks=3)  # which do not divide the batch of anything that is trained
    assert finished.code == 0, finished.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    computed = int(re.search(r"features of 640 images, ([\d,]+) of them", finished.output)[1].replace(",", ""))
    assert 0 < computed <= 640 - 3 * 32
    assert result(tmp_path / "probe")["metrics"]["accuracy"] > 0.5


def test_a_probed_teacher_is_tuned_and_goes_on_after_a_kill(warm, teacher, tmp_path):
    base = [*TINY, *ONE_EPOCH, *LENGTHS, f"teacher.source={teacher}", "teacher.finetune_epochs=2"]
    probe = [*base, "--phase", "probe", "--out"]
    finished = warm.run([*probe, tmp_path / "whole"], ranks=2)
    assert finished.code == 0, finished.output
    killed = tmp_path / "killed"
    warm.run([*probe, killed], ranks=2, kill_when=lambda: (killed / "probe/checkpoints/latest.json").is_file())
    finished = warm.run([*probe, killed], ranks=2)
    assert finished.code == 0 and "resumed after step" in finished.output
    assert "0 of them computed now" in finished.output
    whole, again = (load_file(out / "probe/model.safetensors") for out in (tmp_path / "whole", killed))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    made = result(killed / "probe")
    assert made["epochs"] == 2 and made["metrics"]["accuracy"] != made["metrics"]["probe_accuracy"]
    finished = warm.run([*base, "--phase", "meta", "--out", killed], ranks=2)
    assert finished.code == 0, finished.output
    assert result(killed / "meta")["metrics"]["teacher_accuracy"] == pytest.approx(made["metrics"]["accuracy"])


@pytest.mark.slow
@pytest.mark.parametrize("classes", [0, 1000])
def test_a_whole_run_on_a_folder_of_seven_classes(warm, tmp_path, classes):
    draws = np.random.RandomState(0)
    of_class = draws.randint(0, 255, (7, 4, 4, 3))
    for split, images in (("train", 20), ("validation", 8)):
        for label, colours in enumerate(of_class):
            folder = tmp_path / "images" / split / f"class {label}"
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = np.kron(colours, np.ones((8, 8, 1))) + draws.randint(-100, 100, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / f"{number}.png")
    save_timm(tmp_path / "vit", tiny("vit", num_classes=classes))
    given = [
        f"data.path={tmp_path / 'images'}",
        "data.source=folder",
        "data.limit=0",
        f"teacher.source={tmp_path / 'vit'}",
    ]
    out = tmp_path / "out"
    finished = warm.run([*TINY, *ONE_EPOCH, *LENGTHS, "--phase", "all", "--out", out, *given], ranks=2)
    assert finished.code == 0, finished.output
    why = "has 1000 classes and the data" if classes else "has no head"
    assert f"the teacher's head is a probe: teacher {tmp_path / 'vit'} {why}" in finished.output
    probe, meta = result(out / "probe"), result(out / "meta")
    assert probe["metrics"]["accuracy"] > 0.5
    assert meta["metrics"]["teacher_accuracy"] == pytest.approx(probe["metrics"]["accuracy"])
    assert meta["teacher"] == probe["teacher"]
    assert "Head of the teacher: a probe of its features" in (out / "report.md").read_text()
    assert result(out / "evaluate")["classes"] == [f"class {label}" for label in range(7)]
    again = warm.run([*TINY, *ONE_EPOCH, *LENGTHS, "--phase", "probe", "--out", out, *given])
    assert again.code == 0 and "nothing to do" in again.output
