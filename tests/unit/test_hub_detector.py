"""A detector pushed to the stand-in of the hub and loaded from there: the same is found; its card works as it is."""

import re
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import models.detection
from models.detection.backbone import Made
from models.detection.config import DetectorConfig
from models.detection.detector import Detector
from models.detection.files import load_detector, save_detector
from models.preprocessing import Preprocessing
from models.vmoe import VMoE, VMoEConfig
from tests.hub_server import HubServer
from tests.run_folder import finish_run, new_recipe, new_student
from trainer import artifacts
from trainer.config.load import build
from trainer.config.recipe import Recipe
from trainer.hub import push

REPO = "alice/finder"
CATEGORIES = ("cup", "spoon")
METRICS = {"ap": 0.25, "ap50": 0.5, "ap75": 0.125, "ar": 0.375, "ap/cup": 0.5, "ap/spoon": 0.0, "images": 1234.0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No processes of git, and no real pauses."""
    monkeypatch.setattr(artifacts, "git_commit", lambda: "0123abc+changes")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path / "home")
        yield server


def recipe_of(**detect) -> Recipe:
    sections = {"epochs": 3, "backbone": "someone/vit@v1", "data": {"path": "/data/kitchen"}} | detect
    return build(Recipe, {"detect": sections, "hub": {"repo": REPO, "stages": "detector"}})


def finish_detector(out: Path, recipe: Recipe, seed: int = 0) -> Detector:
    """Leave OUT/detect, complete."""
    torch.manual_seed(seed)
    sizes = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 16, "num_classes": 0}
    config = VMoEConfig(**sizes, moe_blocks="1", moe={"num_experts": 2, "k": 1, "images_per_group": 1}, seed=seed)
    pre = Preprocessing(16, (0.5,) * 3, (0.25,) * 3)
    heads = {"shorter_side": 32, "longest_side": 48, "width": 16, "queries": 6, "groups": 2, "layers": 2, "heads": 2}
    heads |= {"mlp_dim": 16, "maps": 2, "masks": recipe.detect.masks}
    detector = Detector(DetectorConfig(CATEGORIES, (1, 2), pre, **heads), VMoE(config), Made("vmoe", asdict(config)))
    about = {"phase": "detect", "module": None, "command": "trainer/run.py ...", "ds_config": {"x": 1}}
    folder, _ = artifacts.open_folder(out, "detect", recipe, about)
    save_detector(detector, folder)
    result = {"metrics": METRICS | ({"mask_ap": 0.0625} if recipe.detect.masks else {}), "epochs": 3, "world_size": 2}
    result |= {"ep_size": 1, "device": "cpu", "dtype": "float32", "flops": 2e12, "seconds": 60.0, "images_seen": 900}
    result |= {"backbone": {"source": "someone/vit@0123456789", "width": 16, "blocks": 2}, "git_commit": "0123abc"}
    artifacts.write_result(folder, about | result)
    return detector.eval()


def test_pushed_loaded_and_the_same_is_found(server, tmp_path):
    recipe = recipe_of(masks=True)
    detector = finish_detector(tmp_path / "out", recipe)
    push.push(push.plan(tmp_path / "out", recipe), recipe.hub)
    sent = {"README.md", "config.json", "ds_config.json", "model.safetensors", "recipe.yaml"}
    assert set(server.files(REPO)) == sent | {".gitattributes"}

    loaded = load_detector(REPO)
    assert loaded.config == detector.config and not loaded.training
    pictures = [Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20).convert("RGB"), Image.new("RGB", (24, 32), "red")]
    for before, after in zip(detector.detect(pictures), load_detector(REPO).detect(pictures)):
        assert torch.equal(before.score_N, after.score_N) and torch.equal(before.category_N, after.category_N)
        assert torch.equal(before.box_N4, after.box_N4) and torch.equal(before.mask_NHW, after.mask_NHW)
        assert len(before.score_N) == 12  # 6 queries of 2 categories
    other = finish_detector(tmp_path / "other", recipe, seed=1).detect(pictures)[0]
    assert not torch.equal(other.score_N, detector.detect(pictures)[0].score_N)


def test_the_card(server, tmp_path, monkeypatch, capsys):
    recipe = recipe_of()
    finish_detector(tmp_path / "out", recipe)
    plan = push.plan(tmp_path / "out", recipe)
    push.push(plan, recipe.hub)
    card = ModelCard(plan.card)
    assert card.data.pipeline_tag == "object-detection" and card.data.base_model == "someone/vit"
    assert [(each.metric_type, each.metric_value) for each in card.data.eval_results] == [("ap", 0.25)]
    for line in (
        "2 categories (cup, spoon): a box for each",
        "| boxes: AP | 0.25 |",
        "| boxes: AP50 | 0.5 |",
        "| boxes: AP of spoon | 0 |",
        "on all 1,234 validation images",
        "2 blocks of width 16, from [someone/vit](https://huggingface.co/someone/vit), revision `0123456789`; trained",
        "kitchen: trained on `annotations/instances_train2017.json`",
        "| detect | 2e+12 | 60 | 900 |",
        "2 x CPU (expert parallel 1)",
    ):
        assert line in card.text, line
    assert "/data/kitchen" not in plan.card  # where it lay here is nobody's business

    # the block for readers, as it stands but for the name of the package
    (block,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "blue").save("picture.png")
    exec(block.replace("m2mkd.detection", models.detection.__name__), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and all(re.fullmatch(r"0\.\d\d (cup|spoon) \[.*\]", line) for line in lines)


def test_what_cannot_be_pushed(tmp_path):
    with pytest.raises(ValueError, match=r"hub.stages is 'detector', but detect.epochs is 0"):
        recipe_of(epochs=0)
    with pytest.raises(ValueError, match="detect"):
        push.plan(tmp_path, recipe_of())


def test_over_a_student_nothing_of_it_stays(server, tmp_path, caplog):
    student = new_recipe(hub={"repo": REPO})
    finish_run(tmp_path / "student", student, new_student(), max_shard_size="4KB")
    push.push(push.plan(tmp_path / "student", student), student.hub)
    assert "model.safetensors.index.json" in server.files(REPO)
    recipe = recipe_of()
    finish_detector(tmp_path / "out", recipe)
    push.push(push.plan(tmp_path / "out", recipe), recipe.hub)
    assert [name for name in server.files(REPO) if ".safetensors" in name] == ["model.safetensors"]
    assert load_detector(REPO).config.categories == CATEGORIES
