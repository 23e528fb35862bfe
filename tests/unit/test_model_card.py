"""The model card: what the hub reads out of it, and what it tells for each kind of run."""

import base64
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from models.nac import family as nac_family
from tests.run_folder import finish_run, new_nac, new_recipe, new_student
from trainer import artifacts
from trainer.config.load import build
from trainer.config.recipe import Recipe
from trainer.hub.card import CIRCUIT, MAPS, PICTURE, trained_with, write_card
from trainer.hub.wording import hub_id
from trainer.report.circuit import DARK, GAP, SIDE
from trainer.report.classes import MAP_GAP, MAP_SIDE


@pytest.fixture(autouse=True)
def quick_commit(monkeypatch):
    monkeypatch.setattr(artifacts, "git_commit", lambda: "0123abc+changes")


@pytest.fixture(scope="module")
def student():
    return new_student()


def card_of(out: Path, student, license: str | None = None, stages: tuple[str, ...] = (), **sections) -> ModelCard:
    recipe = new_recipe(**sections)
    finish_run(out, recipe, student)
    return ModelCard(write_card(out, recipe, license, stages)["README.md"].decode())


def test_the_hub_finds_metrics_data_and_licence(tmp_path, student):
    sections = {
        "data": {"source": "hub", "path": "ILSVRC/imagenet-1k@v1", "val_split": "val"},
        "teacher": {"source": "hf-hub:timm/deit3@v2"},
        "hub": {"license": "mit"},
    }
    card = card_of(tmp_path, student, "apache-2.0", **sections)
    data = card.data
    assert (data.license, data.datasets, data.pipeline_tag) == ("mit", ["ILSVRC/imagenet-1k"], "image-classification")
    assert data.model_name == "model"
    found = [(r.metric_type, r.metric_value, r.dataset_type, r.dataset_split, r.dataset_revision)
             for r in data.eval_results]  # fmt: skip
    assert found == [("accuracy", 0.8, "ILSVRC/imagenet-1k", "val", "v1"),
                     ("loss", 0.625, "ILSVRC/imagenet-1k", "val", "v1")]  # fmt: skip
    assert "[timm/deit3](https://huggingface.co/timm/deit3), revision `v2`; licence apache-2.0." in card.text


def test_what_a_stranger_reads(tmp_path, student):
    card = card_of(tmp_path, student, stages=("meta", "distill_0"), hub={"revision": "v3"})
    for line in (
        "2 blocks of width 16, patches of 4 pixels, images of 8 pixels; experts in blocks `1`: 2 per block, 1 used",
        "| accuracy | 0.8 |",
        "Measured by phase evaluate, on the published weights, in bfloat16, on every image of split `validation`.",
        "normalised with mean [0.5, 0.5, 0.5] and std [0.25, 0.25, 0.25]",
        "A small vision transformer trained in the same run",
        "Its accuracy on the same images: 0.75.",
        "| 1 | 0.65 | 0.55 |",  # module 1: the teacher's, the student's
        "| distill_1 | 1e+09 | 10 | 100 |",
        "| total | 6e+09 | 60 | 600 |",  # four times 1e9, and 2e9
        "2 x CPU (expert parallel 2) for `train`",
        f"]({PICTURE})",
        'VMoE.from_pretrained("alice/model", revision="v3")',
        "Trained with commit `0123abc` of m2mkd",
        "(`meta/`, `distill_0/`): recipes can start from them with `meta.source=alice/model@v3`",
        "arxiv.org/abs/2402.16918",
        "@misc{m2mkd2024",
    ):
        assert line in card.text, line
    assert "None" not in card.content and "license" not in card.data.to_dict()


def test_the_card_of_a_nac(tmp_path):
    """Its circuit from analysis.json, its forms from the table of phase evaluate; nothing of experts."""
    recipe = new_recipe(modules=3, student={"kind": "nac", "nac": {"preset": "small"}})
    student = new_nac()
    finish_run(tmp_path, recipe, student)
    assert set(write_card(tmp_path, recipe, None, ())) == {"README.md"}
    analysis = nac_family.describe(student, torch.zeros(2, 3, 8, 8))
    (tmp_path / "evaluate/analysis.json").write_text(json.dumps(analysis))
    path = tmp_path / "evaluate/result.json"
    row = {"images_per_second": 99.0, "accuracy": 0.7, "flops": 2e6, "parameters": 12}
    rows = [row | {"name": name} for name in ("student, all mediators (trained)", "student, 10% of the mediators")]
    table = {"rows": rows, "batch": 32, "dtype": "float32", "repeats": 7, "where": "1 thread of a CPU"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inference": table}))
    files = write_card(tmp_path, recipe, None, ())
    text = files["README.md"].decode()
    assert files.keys() == {"README.md", CIRCUIT} and "## What the circuit looks like\n\n![" in text
    with Image.open(io.BytesIO(files[CIRCUIT])) as sheet:
        # the scale-free graph of 8 mediators: white where there is no edge, as on the diagonal, dark where there is one
        prior = student.config.adjacency()
        assert sheet.size == (5 * (SIDE + GAP) - GAP, SIDE)
        cell = SIDE // 8
        seen = [[sheet.getpixel((b * cell + cell // 2, a * cell + cell // 2)) for b in range(8)] for a in range(8)]
    assert seen == [[DARK if prior[a, b] else (255, 255, 255) for b in range(8)] for a in range(8)]
    for line in (
        "8 make up the circuit (started from a scale-free graph)",
        f"scale-free graph of {int(prior.sum()) // 2} edges",
        "| student, 10% of the mediators | 99.0 | 0.7 | 2e+06 | 12 |",
        "With fewer mediators, the best connected ones, the accuracy is that of the same weights",
        '`NAC.from_pretrained("alice/model").pruned(n)` keeps its n best connected mediators',
        "from m2mkd.nac import NAC",
    ):
        assert line in text, line
    assert "experts" not in text and "dense ViT" not in text


def test_what_the_model_comes_from_and_where_its_code_lies(tmp_path, student):
    """base_model is the teacher, or the weights that training began from; a folder is none."""
    taught = card_of(tmp_path / "taught", student, teacher={"source": "hf-hub:timm/deit3@v2"})
    assert (taught.data.base_model, taught.data.base_model_relation) == ("timm/deit3", "finetune")
    begun = card_of(tmp_path / "begun", student, train={"init": "someone/vmoe@v1"})
    assert begun.data.base_model == "someone/vmoe"
    for number, sections in enumerate(({}, {"teacher": {"source": "./vit"}}, {"train": {"start": "scratch"}})):
        assert "base_model" not in card_of(tmp_path / str(number), student, **sections).data.to_dict()
    recipe = new_recipe(hub={"revision": "v3"})
    address = "https://host.org/a/b"
    text = write_card(tmp_path / "taught", recipe, None, (), address)["README.md"].decode()
    assert '```bash\npip install "m2mkd @ git+https://host.org/a/b@0123abc"\n```' in text
    assert (
        f"Trained with commit `0123abc` of [{address}]({address}), with changes that this commit does not have." in text
    )
    assert 'timm.create_model("hf-hub:alice/model@v3", pretrained=True)' in text
    assert 'AutoImageProcessor.from_pretrained("alice/model", revision="v3")' in text
    assert "m2mkd export alice/model@v3 --out model.pt2" in text and "trust_remote_code" not in text


def test_what_the_experts_see_and_how_fast_it_is(tmp_path, student):
    """From what phase evaluate leaves: analysis.json, and the table in its result."""
    recipe = new_recipe()
    finish_run(tmp_path, recipe, student)
    assert MAPS not in write_card(tmp_path, recipe, None, ())
    with io.BytesIO() as file:
        Image.new("RGB", (8, 8), (255, 0, 0)).save(file, "PNG")
        photo = base64.b64encode(file.getvalue()).decode()
    analysis = {
        "layers": {"blocks.1.mlp": {"load": [0.5, 0.5]}},
        "grid": [2, 2],
        "pictures": [{"png": photo, "experts": {"blocks.1.mlp": [0, 1, -1, 0]}}],
    }
    (tmp_path / "evaluate/analysis.json").write_text(json.dumps(analysis))
    path = tmp_path / "evaluate/result.json"
    rows = [{"name": "student, k = 1", "images_per_second": 1234.56, "accuracy": 0.8, "flops": 2e6, "parameters": 4321}]
    rows += [
        {
            "name": "dense ViT of equal FLOPs",
            "images_per_second": 99.0,
            "accuracy": None,
            "flops": 2e6,
            "parameters": 12,
        }
    ]
    table = {"rows": rows, "batch": 32, "dtype": "float32", "repeats": 7, "where": "1 thread of a CPU"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inference": table}))
    files = write_card(tmp_path, recipe, None, ())
    text = files["README.md"].decode()
    assert f"]({MAPS})" in text and "| student, k = 1 | 1,234.6 | 0.8 | 2e+06 | 4,321 |" in text
    assert "| dense ViT of equal FLOPs | 99.0 | - |" in text and "1 thread of a CPU, batches of 32, float32" in text
    maps = Image.open(io.BytesIO(files[MAPS]))
    assert maps.size == (2 * MAP_SIDE + MAP_GAP, MAP_SIDE)
    # the photo itself, then its patches: experts 0 and 1 in other colours, the dropped one (row 1, column 0) darkest
    corner = MAP_SIDE + MAP_GAP
    assert maps.getpixel((5, 5)) == (255, 0, 0)
    first, second = maps.getpixel((corner + 5, 5)), maps.getpixel((corner + MAP_SIDE - 5, 5))
    dropped = maps.getpixel((corner + 5, MAP_SIDE - 5))
    assert len({first, second, dropped}) == 3 and sum(dropped) < min(sum(first), sum(second))


def test_without_a_current_evaluation_the_end_of_training_counts(tmp_path, student):
    recipe = new_recipe()
    finish_run(tmp_path, recipe, student)
    os.utime(tmp_path / "evaluate/result.json", (1, 1))  # measured before the student was trained anew
    text = write_card(tmp_path, recipe, None, ())["README.md"].decode()
    assert "| accuracy | 0.8125 |" in text and "Measured at the end of training" in text
    (tmp_path / "evaluate/result.json").unlink()
    assert write_card(tmp_path, recipe, None, ())["README.md"].decode() == text


def test_a_student_from_scratch_has_no_teacher(tmp_path, student):
    card = card_of(tmp_path, student, train={"start": "scratch"}, teacher={"source": "timm/deit3"})
    assert "trained from scratch" in card.text and "None in this run." in card.text
    assert "inside the meta model" not in card.text and "deit3" not in card.text
    assert "| total | 2e+09 | 20 | 200 |" in card.text


def test_what_others_trained_is_named(tmp_path, student):
    recipe = new_recipe(train={"init": "someone/vmoe@v1"})
    finish_run(tmp_path / "init", recipe, student)
    text = write_card(tmp_path / "init", recipe, None, ())["README.md"].decode()
    assert "began from the weights of [someone/vmoe](https://huggingface.co/someone/vmoe), revision `v1`." in text
    recipe = new_recipe(meta={"source": "someone/pair"})
    finish_run(tmp_path / "pair", recipe, student)
    path = tmp_path / "pair/meta/result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": "someone/pair@abc"}))
    text = write_card(tmp_path / "pair", recipe, None, ())["README.md"].decode()
    assert "| meta, from [someone/pair](https://huggingface.co/someone/pair), revision `abc` | 1e+09 |" in text


def test_images_that_were_held_out_are_said_to_be(tmp_path, student):
    recipe = new_recipe(data={"source": "hub", "path": "someone/pets"})
    finish_run(tmp_path, recipe, student)
    for name in ("train", "evaluate"):
        path = tmp_path / name / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"held_out": 0.1}))
    card = ModelCard(write_card(tmp_path, recipe, None, ())["README.md"].decode())
    assert "on every image of the 10% of split `train` that were held out." in card.text
    assert "trained on split `train`, measured on the 10% of split `train` that were held out." in card.text
    assert {result.dataset_split for result in card.data.eval_results} == {"train"}


def test_the_card_does_not_tell_paths_of_this_machine(tmp_path, student):
    images = tmp_path / "private" / "pets"
    card = card_of(tmp_path / "out", student, data={"source": "folder", "path": str(images)},
                   teacher={"source": str(tmp_path / "private" / "vit")})  # fmt: skip
    assert str(tmp_path) not in card.content
    assert "pets: trained on split" in card.text and "a local directory `vit`." in card.text
    assert card.data.eval_results[0].dataset_type == "imagefolder" and card.data.get("datasets") is None


def test_the_card_of_images_in_tar_files(tmp_path, student):
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "train.tar").touch()
    card = card_of(tmp_path / "out", student, data={"source": "auto", "path": str(tmp_path / "pets")})
    assert card.data.eval_results[0].dataset_type == "webdataset" and "pets: trained on split" in card.text


def test_the_same_run_gives_the_same_card_and_no_matplotlib_no_picture(tmp_path, student, monkeypatch):
    recipe = new_recipe()
    finish_run(tmp_path, recipe, student)
    first = write_card(tmp_path, recipe, None, ())
    assert first == write_card(tmp_path, recipe, None, ()) and first[PICTURE].startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith(("matplotlib.", "trainer.report.drawing"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("trainer.report.drawing", raising=False)
    assert set(write_card(tmp_path, recipe, None, ())) == {"README.md"}


@pytest.mark.parametrize(
    "source, found",
    [
        ("timm/vit", ("timm/vit", None)),
        ("hf-hub:timm/vit@v1", ("timm/vit", "v1")),
        ("./teacher", None),
        ("/data/vit", None),
        ("local-dir:vit", None),
        (str(Path(__file__).parent), None),
        ("", None),
    ],
)
def test_names_of_the_hub(source, found):
    assert hub_id(source) == found


def test_the_teachers_commit_is_the_one_of_training(tmp_path):
    recipe = build(Recipe, {"teacher": {"source": "timm/vit"}})
    assert trained_with(tmp_path, recipe) == "timm/vit"
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/result.json").write_text('{"teacher": {"source": "timm/vit@abc"}}')
    assert trained_with(tmp_path, recipe) == "timm/vit@abc"
