"""recipes/finetune*.yaml: from a student of ours, or any ViT, to a classifier of other classes on a folder."""

import json
import os

import pytest

from models.nac import NAC
from models.vmoe.model import VMoE
from tests import judging
from tests.launch import ROOT
from trainer.api import run_phase
from trainer.config.load import load_recipe

DS = str(ROOT / "ds_configs/cpu_debug.json")


@pytest.fixture(scope="module", autouse=True)
def environment():
    """A phase in this process leaves RANK and WORLD_SIZE behind, which later tests would hand to their launches."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes told by their colour, which no model here was trained on."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 24), ("validation", 12)):
        judging.folder_of(root / split, {"mint": count, "rose": count, "sand": count}, seed=3)
    return root


def tuned(recipe, out, phases):
    for phase in phases:
        result = run_phase(recipe, phase, out=out, ds_config=DS)
    return result["metrics"]["accuracy"]


def test_from_a_dense_vit(pictures, tmp_path):
    """A ViT of another repository, by its published form."""
    from timm.models import save_for_hf
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1, num_classes=5)
    config = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    model.pretrained_cfg = config | {"architecture": "vit_tiny_patch16_224", "classifier": "head"}
    model.default_cfg = model.pretrained_cfg
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1}
    save_for_hf(model, tmp_path / "vit", model_config=config, model_args=arguments, safe_serialization=True)
    changes = [f"data.path={pictures}", f"teacher.source={tmp_path / 'vit'}", "student.depth=2", "data.workers=0",
               "train.epochs=4", "train.lr=0.02", "train.global_batch=8"]  # fmt: skip
    recipe = load_recipe(ROOT / "recipes/finetune_vit.yaml", changes)
    out = tmp_path / "run"
    assert tuned(recipe, out, ("probe", "train", "evaluate")) > 0.55  # a third by chance, of 36 images
    student = VMoE.from_pretrained(out / "train_upcycled")
    assert student.labels == ["mint", "rose", "sand"]
    assert student.config.moe_blocks == "none"


@pytest.mark.parametrize("kind", ["vmoe", "nac"])
def test_from_a_student_of_ours(pictures, tmp_path, kind):
    """The NAC with 3 of its 8 mediators, which its graph of two rings could not be drawn for."""
    model = judging.student() if kind == "vmoe" else judging.nac().pruned(3)
    model.save_pretrained(tmp_path / "model")
    changes = [f"data.path={pictures}", f"train.init={tmp_path / 'model'}", "data.workers=0", f"student.kind={kind}",
               "train.epochs=5", "train.lr=0.3", "train.global_batch=8", "train.layer_decay=1.0"]  # fmt: skip
    recipe = load_recipe(ROOT / "recipes/finetune.yaml", changes)
    out = tmp_path / "run"
    assert tuned(recipe, out, ("train", "evaluate")) > 0.55  # a third by chance, of 36 images
    student = (VMoE if kind == "vmoe" else NAC).from_pretrained(out / "train")
    assert student.labels == ["mint", "rose", "sand"]
    result = json.loads((out / "train" / "result.json").read_text())
    assert result["init_classes"] == "a new head of the data's classes"
    if kind == "vmoe":
        assert student.config.moe.num_experts == 4  # the model's own, not the recipe's default
    else:
        analysis = json.loads((out / "evaluate" / "analysis.json").read_text())
        assert student.config.kept == model.config.kept and len(analysis["circuit"]["prior"]) == 3


def test_a_new_head_needs_a_student():
    with pytest.raises(ValueError, match=r"train.new_head is True, expected false without train.init"):
        load_recipe(ROOT / "recipes/demo.yaml", ["train.new_head=true"])
