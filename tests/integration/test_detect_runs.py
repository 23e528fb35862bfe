"""Phase detect on warm ranks: killed anywhere and started again it ends the same; what it leaves can be used."""

import json

import pytest
import torch

from models.detection import load_detector
from models.preprocessing import Preprocessing
from models.vmoe import VMoE, VMoEConfig
from tests.hub_server import WRITER, HubServer
from tests.integration import test_push
from tests.integration.test_resume import TIMING, latest
from tests.launch import ROOT
from trainer.config.load import load_recipe
from trainer.data.boxes.sources import open_boxes
from trainer.tracking.metrics import read_metrics

MOE = {"num_experts": 4, "k": 2, "noise_std": 1.0, "capacity_factor": 1.0, "importance_weight": 0.01}
RECIPE = """
detect:
  epochs: 2
  global_batch: 4
  masks: true
  drop_path: 0.1
  dropout: 0.1
  layer_decay: 0.8
  data: {train_pictures: 12, val_pictures: 5, size: 48}
  shorter_side: 32
  longest_side: 48
  width: 16
  queries: 8
  groups: 2
  layers: 2
  heads: 2
  mlp_dim: 16
  maps: 2
  lr: 0.5
run: {log_every: 2, save_every: 2}
"""


@pytest.fixture(scope="module")
def detect(tmp_path_factory):
    """Arguments of the phase on a new V-MoE, but for --out."""
    folder = tmp_path_factory.mktemp("detect")
    sizes = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "mlp_dim": 16}
    vit = VMoE(VMoEConfig(**sizes, num_classes=0, moe_blocks="all", moe=MOE))
    vit.save_pretrained(folder / "student", preprocessing=Preprocessing(32, (0.5,) * 3, (0.25,) * 3))
    (folder / "recipe.yaml").write_text(RECIPE)
    recipe = ["--recipe", folder / "recipe.yaml", "--ds_config", ROOT / "ds_configs/cpu_debug.json"]
    return folder, [*recipe, "--phase", "detect", f"detect.backbone={folder / 'student'}"]


def run(warm, arguments, out, *overrides, **options):
    head, backbone = arguments[:-1], arguments[-1]
    return warm.run([*head, "--out", out, backbone, *overrides], ranks=2, **options)


def rows(out):
    found = []
    for row in read_metrics(out / "detect/metrics.jsonl"):
        found.append({key: value for key, value in row.items() if key not in TIMING})
    return found


def test_killed_and_gone_on_ends_the_same_and_finds_the_same(warm, detect, tmp_path):
    folder, arguments = detect
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished = run(warm, arguments, whole)
    assert finished.code == 0, finished.output

    ended = run(warm, arguments, killed, kill_when=lambda: latest(killed / "detect") == "step_00000002")
    assert ended.code == -9 and not (killed / "detect/result.json").exists()
    gone_on = run(warm, arguments, killed)
    assert gone_on.code == 0, gone_on.output
    assert "[detect] resumed after step" in gone_on.output
    weights = [(out / "detect/model.safetensors").read_bytes() for out in (whole, killed)]
    assert weights[0] == weights[1]
    assert rows(whole) == rows(killed)

    result = json.loads((whole / "detect/result.json").read_text())
    assert {"ap", "ap50", "ap75", "ap/disc", "mask_ap"} <= result["metrics"].keys()
    assert result["metrics"]["images"] == 5 and result["steps"] == 6 and result["images_seen"] == 24
    assert result["data"] == "6 shapes in pictures of 48 pixels, seed 0"
    assert result["backbone"]["source"] == str(folder / "student")

    detector = load_detector(whole / "detect")
    recipe = load_recipe(folder / "recipe.yaml")
    _, val = open_boxes(recipe.detect, 10_000)
    found = detector.detect([val.image(0), val.image(1)])
    (alone,) = detector.detect([val.image(1)])
    assert torch.equal(found[1].box_N4, alone.box_N4) and torch.equal(found[1].mask_NHW, alone.mask_NHW)

    made_of = result["made_of"]
    assert made_of["boxes"]["train"]["images"] == 12 and made_of["backbone"] == result["backbone"]

    other = run(warm, arguments, whole, "detect.data.seed=1")
    assert other.code == 2 and "detect.data.seed" in other.output


def test_a_frozen_backbone_stays_as_it_is(warm, detect, tmp_path):
    folder, arguments = detect
    finished = run(warm, arguments, tmp_path, "detect.freeze=true", "detect.epochs=1", "detect.masks=false")
    assert finished.code == 0, finished.output
    before = VMoE.from_pretrained(folder / "student").state_dict()
    after = load_detector(tmp_path / "detect").backbone.vit.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_pushed_by_its_phase(warm, detect, tmp_path, monkeypatch):
    _, arguments = detect
    small = ["detect.epochs=1", "detect.masks=false", "hub.repo=alice/shapes", "hub.stages=detector"]
    finished = run(warm, arguments, tmp_path, *small)
    assert finished.code == 0, finished.output
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path / "home")
        words = [str(word) for word in [*arguments, *small, "--out", tmp_path]]
        words[words.index("--phase") + 1] = "push"
        done = warm.call(f"{test_push.__name__}:main_with_hub", server.url, str(tmp_path / "home"), WRITER, words)
        assert done.code == 0, done.output
        pushed, left = load_detector("alice/shapes"), load_detector(tmp_path / "detect")
    assert all(torch.equal(value, left.state_dict()[name]) for name, value in pushed.state_dict().items())
    assert json.loads((tmp_path / "push/result.json").read_text())["repo"] == "alice/shapes"


def test_refused_before_anything_is_made(warm, detect, tmp_path):
    _, arguments = detect
    off = run(warm, arguments, tmp_path / "off", "detect.epochs=0")
    assert off.code == 2 and "detect.epochs is 0, so there is no detector to train" in off.output
    lost = run(warm, arguments, tmp_path / "lost", f"detect.data.path={tmp_path}")
    assert lost.code == 2 and "train2017 does not exist" in lost.output
    assert not (tmp_path / "off").exists() and not (tmp_path / "lost/detect").exists()
