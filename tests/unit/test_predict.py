"""m2mkd predict, info and export by their entry, against a folder and the stand-in hub; and what they refuse."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_nac_files import IMAGES as NAC_IMAGES
from test_nac_files import new as new_nac
from test_vmoe_files import IMAGES, TINY, new

from models import cli
from models.moe.layer import MoEConfig
from models.predict import find_pictures, predict, to_batch
from models.vmoe.about import active_parameters
from models.vmoe.model import VMoE
from tests.hub_server import HubServer
from tests.launch import ROOT
from trainer.data.transforms import eval_transform

LABELS = ["ant", "bee", "cat"]


@pytest.fixture
def saved(tmp_path):
    """A saved model, and three pictures in a folder and one inside of it."""
    new().save_pretrained(tmp_path / "model", preprocessing=IMAGES, labels=LABELS)
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for index, name in enumerate(("b.png", "a.jpg", "more/c.png")):
        noise = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path


def answer(capsys, *words) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_pictures_of_folders_and_files_in_order(saved):
    pictures = saved / "pictures"
    assert find_pictures([pictures]) == [pictures / "a.jpg", pictures / "b.png", pictures / "more/c.png"]
    assert find_pictures([pictures / "b.png", pictures / "more"]) == [pictures / "b.png", pictures / "more/c.png"]


def test_probabilities_are_those_of_the_model_whatever_the_batch(saved):
    model = VMoE.from_pretrained(saved / "model")
    pictures = find_pictures([saved / "pictures"])
    images = torch.stack([eval_transform(IMAGES)(Image.open(path).convert("RGB")) for path in pictures])
    assert torch.equal(to_batch(pictures, IMAGES), images)  # the pixels of training
    expected_BC = model(images).softmax(-1)
    for batch in (1, 2, 32):
        done = predict(model, pictures, top=2, batch=batch)
        for prediction, row in zip(done.predictions, expected_BC, strict=True):
            best = row.argsort(descending=True)[:2].tolist()
            assert [score.index for score in prediction.classes] == best
            assert [score.label for score in prediction.classes] == [LABELS[index] for index in best]
            assert [score.probability for score in prediction.classes] == pytest.approx(row[best].tolist(), abs=1e-6)
    assert done.images_per_second > 3 / done.seconds


def test_predict_as_json_and_as_text(saved, capsys):
    words = ["predict", saved / "pictures", "--model", saved / "model", "--top", "5"]
    code, printed, _ = answer(capsys, *words, "--json", "--k", "1", "--bf16")
    told = json.loads(printed)
    assert code == 0 and (told["images"], told["experts_per_token"], told["dtype"]) == (3, 1, "bfloat16")
    assert [row["path"] for row in told["predictions"]] == [str(p) for p in find_pictures([saved / "pictures"])]
    for row in told["predictions"]:
        assert {score["label"] for score in row["classes"]} == set(LABELS)  # of three classes the best five
        assert sum(score["probability"] for score in row["classes"]) == pytest.approx(1, abs=1e-5)
    code, printed, speed = answer(capsys, *words)
    assert code == 0 and len(printed.splitlines()) == 3 and "images/s" in speed and "2 experts per token" in speed


def test_info_of_a_folder_and_of_the_hub(saved, capsys, monkeypatch):
    code, printed, _ = answer(capsys, "info", saved / "model", "--json")
    facts = json.loads(printed)
    assert code == 0 and (facts["experts"], facts["experts_per_token"], facts["labels"]) == (4, 2, LABELS)
    # an expert: 8 x 12 + 12 and 12 x 8 + 8 numbers, and two of the four are not used
    assert facts["parameters"] - facts["active_parameters"] == 2 * (8 * 12 + 12 + 12 * 8 + 8)
    assert active_parameters(new(moe=MoEConfig(num_experts=4, k=4))) == facts["parameters"]
    with HubServer() as hub:
        hub.connect(monkeypatch, saved / "home")
        commit = hub.seed("alice/model", saved / "model")
        code, printed, _ = answer(capsys, "info", "alice/model")
        assert code == 0 and f"alice/model@{commit}" in printed and "parameters" in printed


def test_a_nac_by_the_same_entry(saved, capsys):
    model = new_nac()
    model.save_pretrained(saved / "nac", preprocessing=NAC_IMAGES, labels=LABELS)
    code, printed, _ = answer(capsys, "info", saved / "nac", "--json")
    facts = json.loads(printed)
    assert code == 0 and (facts["kind"], facts["mediators"], facts["labels"]) == ("NAC", 8, LABELS)
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    words = ["predict", saved / "pictures", "--model", saved / "nac"]
    code, printed, _ = answer(capsys, *words, "--json")
    told = json.loads(printed)
    assert code == 0 and "experts_per_token" not in told
    with torch.no_grad():
        expected_BC = model(to_batch(find_pictures([saved / "pictures"]), NAC_IMAGES)).softmax(-1)
    for row, expected_C in zip(told["predictions"], expected_BC, strict=True):
        found = {score["label"]: score["probability"] for score in row["classes"]}
        assert [found[label] for label in LABELS] == pytest.approx(expected_C.tolist(), abs=1e-6)
    code, printed, speed = answer(capsys, *words)
    assert code == 0 and len(printed.splitlines()) == 3 and "experts" not in speed


def test_export_by_its_entry(saved, capsys):
    code, printed, _ = answer(capsys, "export", saved / "model", "--out", saved / "model.pt2")
    assert code == 0 and printed.strip() == str(saved / "model.pt2") and (saved / "model.pt2").is_file()


def test_help_needs_no_torch():
    code = "import sys; from models import cli; cli.parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_bad_input_is_one_line(saved, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/config.json").write_text('{"model_type": "vit"}')
    VMoE(replace(TINY, num_classes=0)).save_pretrained(tmp_path / "features", preprocessing=IMAGES)
    new().save_pretrained(tmp_path / "bare")
    new_nac().save_pretrained(tmp_path / "nac", preprocessing=IMAGES)
    model = saved / "model"
    picture = saved / "pictures/b.png"
    for words, message in (
        (["predict", tmp_path / "nowhere.png", "--model", model], "nowhere.png does not exist: name a picture"),
        (["predict", tmp_path / "empty", "--model", model], "empty holds no picture, expected files ending in .jpg"),
        (
            ["predict", tmp_path / "broken.png", "--model", model],
            "broken.png cannot be read: not a picture in a format",
        ),
        (
            ["predict", picture, "--model", tmp_path / "teacher"],
            "teacher is a 'vit', expected a student of this package: 'vmoe' or",
        ),
        (["info", tmp_path / "teacher"], "teacher is a 'vit', expected a student of this package: 'vmoe' or 'nac'."),
        (["info", tmp_path / "empty"], "has no config.json, so it is not a saved student"),
        (["predict", picture, "--model", tmp_path / "nac", "--k", "1"], "is a NAC, which has no experts: leave k out"),
        (["predict", picture, "--model", tmp_path / "features"], "features has no classes, it gives features"),
        (["predict", picture, "--model", tmp_path / "bare"], "was saved without preprocessing"),
        (["predict", picture, "--model", model, "--k", "9"], "k must be a whole number from 1 to the 4 experts"),
        (["predict", picture, "--model", model, "--top", "0"], "top must be at least 1, got 0"),
        (["predict", picture, "--model", model, "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["export", model, "--out", tmp_path / "model.pt"], "ends in none of .pt2, .onnx"),
    ):
        code, printed, error = answer(capsys, *words)
        assert code == 2 and not printed and message in error and error.count("\n") == 1, error
    with pytest.raises(SystemExit, match="2"):
        cli.main(["predict", "--model", str(model)])
    assert "the following arguments are required: IMAGE" in capsys.readouterr().err
