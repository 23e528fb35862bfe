"""teacher.head=none through the phases: a headless teacher on pictures without labels, and on labelled ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import models.registry  # noqa: F401  the name vmoe among timm's
from models.vmoe.model import VMoE
from tests.hub_server import WRITER, HubServer
from tests.launch import TINY

REPO = "alice/features"
SIZES = ["student.width=16", "student.depth=4", "student.patch_size=4"]
QUICK = ["run.save_every=1000", "meta.epochs=1", "distill.epochs=1", "train.epochs=1", "train.baselines=[]"]
WIDTH = 32  # of the teacher


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """teacher: DINOv2-like, without head, with registers and LayerScale; flat and classes: the same pictures."""
    folder = tmp_path_factory.mktemp("given")
    generator = torch.Generator().manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": WIDTH, "depth": 4, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    save_for_hf(model, folder / "teacher", safe_serialization=True, data_config={"input_size": (3, 16, 16)})
    colours = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 21)):
        for number in range(count):
            kind = number % 3
            tint = np.array([60 * kind, 120 - 60 * kind, 0])
            pixels = (colours.integers(0, 100, (20, 20, 3)) + tint).astype(np.uint8)
            for place in (folder / "flat" / split, folder / "classes" / split / f"kind{kind}"):
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(place / f"{number:02}.png")
    return folder


def arguments(given: Path, pictures: str, *more: str) -> list[str]:
    data = ["data.source=folder", f"data.path={given / pictures}", "data.val_split=val", "data.limit=0"]
    return [*TINY, f"teacher.source={given / 'teacher'}", *data, *SIZES, *QUICK, *more]


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "result.json").read_text())["metrics"]


def test_pictures_without_labels_from_the_dry_run_to_the_pulled_features(warm, given, tmp_path, monkeypatch):
    """Two ranks, every phase, a push to the stand-in; head auto: there is nothing a probe could be fitted on."""
    out = tmp_path / "out"
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path / "home")
        line = [*arguments(given, "flat"), "teacher.head=none", f"hub.repo={REPO}", "--phase", "all", "--out", str(out)]
        call = ("tests.integration.test_push:main_with_hub", server.url, str(tmp_path / "home"), WRITER)
        planned = warm.call(*call, [*line, "--dry-run"])
        assert planned.code == 0, planned.output
        assert "48 training and 21 validation images, without labels" in planned.output
        assert "distill.border=none is read as mse" in planned.output
        finished = warm.call(*call, line, ranks=2)
        assert finished.code == 0, finished.output
        pulled = VMoE.from_pretrained(REPO)
        card = server.files(REPO)["README.md"].decode()
    # every border is measured against the teacher's, each phase by the measure it was taught by
    for i in range(2):
        assert metrics(out / f"distill_{i}").keys() >= {f"relative_error/{i}", f"cosine/{i}", "hybrid_relative_error"}
        assert metrics(out / "meta")[f"hybrid_relative_error/{i}"] < 1
    trained, evaluated = metrics(out / "train"), metrics(out / "evaluate")
    assert evaluated["images"] == 21
    # what was trained is what was saved and loaded; other batches, the same images
    for name in ("relative_error", "cosine"):
        assert evaluated[name] == pytest.approx(trained[name], rel=1e-4)
    assert trained["relative_error"] < trained["start_relative_error"]
    assert not any("accuracy" in name for name in (*trained, *evaluated))
    # the pushed student gives features of its own, and through its feature head the teacher's
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert (pulled.num_classes, pulled.labels, pulled.config.feature_width) == (0, None, WIDTH)
    assert pulled(images).shape == (2, 16)
    assert pulled(images, as_teacher=True).shape == (2, 16 + 5, WIDTH)
    maps = timm.create_model(f"local-dir:{out / 'train'}", pretrained=True, features_only=True, out_indices=(1, 3))
    assert [tuple(each.shape) for each in maps.eval()(images)] == [(2, 16, 4, 4)] * 2
    assert "pipeline_tag: image-feature-extraction" in card
    assert "type: relative_error" in card
    assert "features = model(images)" in card
    report = (out / "report.md").read_text()
    assert "relative error" in report
    assert "accuracy" not in report.replace("hybrid_accuracy.png", "")
    assert "Damaged" not in report


def test_labelled_pictures_tell_what_the_features_are_worth(warm, given, tmp_path):
    """All modules together, tied borders, an average of the weights, an upcycled rival, and two ranks that evaluate."""
    settings = ["refine.epochs=1", "refine.order=together", "distill.epochs=0", "refine.global_batch=16"]
    settings += ["distill.stitches=tied", "train.border_weight=1", "train.ema=0.5", "meta.objective=matching"]
    line = [*arguments(given, "classes", *settings), "teacher.head=none", "--out", str(tmp_path)]
    finished = warm.run([*line, "--phase", "all"])
    assert finished.code == 0, finished.output
    found = metrics(tmp_path / "evaluate")
    names = {"knn_accuracy", "probe_accuracy", "teacher_knn_accuracy", "teacher_probe_accuracy"}
    assert found.keys() >= names | {f"relative_error/{i}" for i in range(2)}
    # three tints that nobody could mix up
    assert found["teacher_knn_accuracy"] > 0.9
    assert found["knn_accuracy"] > 0.5
    assert {"relative_error_raw", "cosine_raw", "relative_error/0"} <= metrics(tmp_path / "train").keys()
    again = warm.run([*line, "--phase", "evaluate"], ranks=2)
    assert again.code == 0, again.output
    on_two_ranks = metrics(tmp_path / "evaluate")
    assert on_two_ranks == pytest.approx(found, rel=1e-5)


def test_a_copy_of_the_teacher_starts_as_the_teacher(warm, given, tmp_path):
    """Upcycled at the teacher's sizes: no error before training, and no feature head in between."""
    start = ["student.init=teacher", f"student.width={WIDTH}", "student.mlp_dim=128", "student.depth=4"]
    start += ["student.moe.capacity_factor=null", "student.expert_noise=0", "train.start=upcycled"]
    line = [*arguments(given, "flat", *start), "--out", str(tmp_path), "--phase", "train"]  # head auto becomes none
    finished = warm.run(line)
    assert finished.code == 0, finished.output
    assert metrics(tmp_path / "train_upcycled")["start_relative_error"] < 1e-6
    assert VMoE.from_pretrained(tmp_path / "train_upcycled").config.feature_width == 0


@pytest.mark.parametrize("setting", ["teacher.head=own", "teacher.head=probe", "meta.objective=labels"])
def test_pictures_without_labels_where_labels_are_needed(warm, given, tmp_path, setting):
    finished = warm.run([*arguments(given, "flat"), setting, "--phase", "all", "--out", str(tmp_path)])
    assert finished.code == 2
    errors = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "no class folders" in errors[0]
    assert "teacher.head=none" in errors[0]


def test_a_teacher_whose_features_are_no_numbers(warm, given, tmp_path):
    """Weights of 3e38 are finite; what comes of them is not."""
    model = timm.create_model(f"local-dir:{given / 'teacher'}", pretrained=True)
    with torch.no_grad():
        model.norm.weight.fill_(3e38)
    save_for_hf(model, tmp_path / "teacher", safe_serialization=True, data_config={"input_size": (3, 16, 16)})
    line = arguments(given, "flat", f"teacher.source={tmp_path / 'teacher'}", "teacher.head=none")
    finished = warm.run([*line, "--phase", "meta", "--out", str(tmp_path / "out")])
    assert finished.code == 2, finished.output
    errors = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "are not finite on all of the validation images (in float32)" in errors[0]
