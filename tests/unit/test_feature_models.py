"""A V-MoE without classes: its features by every route, its feature head, and feature maps for timm's features_only."""

from dataclasses import replace

import pytest
import timm
import torch
from test_vmoe_files import IMAGES
from transformers import AutoModel, AutoModelForImageClassification

import models.auto
import models.registry
from models.modules.stages import split
from models.modules.stitch import build_student_modules
from models.moe.layer import MoEConfig
from models.vmoe import VMoE, VMoEConfig

CONFIG = VMoEConfig(
    image_size=16,
    patch_size=4,
    width=8,
    depth=4,
    heads=2,
    mlp_dim=16,
    num_classes=0,
    reg_tokens=2,
    feature_width=12,
    moe=MoEConfig(num_experts=4, k=2),
)
TOKENS = 16 + 3


def student(**changes) -> VMoE:
    model = VMoE(replace(CONFIG, **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def test_its_own_features_are_pooled_and_those_of_the_teacher_go_through_the_feature_head():
    model = student()
    tokens = model.forward_features(pictures())
    assert tokens.shape == (2, TOKENS, 8)
    assert torch.equal(model(pictures()), tokens[:, 0])  # the class token
    as_teacher = model(pictures(), as_teacher=True)
    assert as_teacher.shape == (2, TOKENS, 12)
    assert torch.equal(as_teacher, model.feature_head(tokens))
    # where the widths agree the tokens are the teacher's as they are
    same_width = student(feature_width=0)
    assert torch.equal(same_width(pictures(), as_teacher=True), same_width.forward_features(pictures()))
    assert not any("feature_head" in name for name in same_width.state_dict())


@torch.no_grad()
def test_modules_in_a_chain_are_the_whole_student_beside_the_teacher():
    model = student()
    whole = split(model, [4])[0]
    assert torch.equal(whole(pictures()), model.forward_features(pictures()))
    first, last = build_student_modules(model, [2, 2], teacher_width=12)
    assert last.post is None
    assert last(first(pictures())).shape == (2, TOKENS, 12)
    assert "stage.feature_head.weight" in last.state_dict()
    assert not any("feature_head" in name for name in first.state_dict())
    h = torch.randn(2, TOKENS, 12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(last(h), model.feature_head(last.stage(last.pre(h))))


@torch.no_grad()
def test_saved_and_loaded_by_every_route(tmp_path):
    model = student()
    model.save_pretrained(tmp_path, preprocessing=IMAGES)
    expected = model(pictures())
    tokens = model.forward_features(pictures())
    loaded = VMoE.from_pretrained(tmp_path)
    assert torch.equal(loaded(pictures()), expected)
    assert torch.equal(loaded(pictures(), as_teacher=True), model(pictures(), as_teacher=True))
    by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(by_timm(pictures()), expected)
    auto = AutoModel.from_pretrained(tmp_path)
    assert type(auto) is models.auto.VMoEModel
    output = auto(pixel_values=pictures())
    assert torch.equal(output.last_hidden_state, tokens)
    assert torch.equal(output.pooler_output, expected)
    auto.save_pretrained(tmp_path / "again")
    assert torch.equal(VMoE.from_pretrained(tmp_path / "again")(pictures()), expected)


@torch.no_grad()
def test_a_head_of_its_own_takes_the_place_of_the_feature_head(tmp_path):
    model = student()
    model.save_pretrained(tmp_path, preprocessing=IMAGES)
    tuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5).eval()
    assert tuned(pictures()).shape == (2, 5)
    assert tuned.config.feature_width == 0
    assert torch.equal(tuned.forward_features(pictures()), model.forward_features(pictures()))
    auto = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5)
    assert auto(pixel_values=pictures()).logits.shape == (2, 5)
    assert torch.equal(auto.vmoe.forward_features(pictures()), model.forward_features(pictures()))
    auto.save_pretrained(tmp_path / "tuned")
    assert VMoE.from_pretrained(tmp_path / "tuned").num_classes == 5
    with pytest.raises(ValueError, match="has no classes: take AutoModel"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


@torch.no_grad()
def test_the_features_of_a_classifier_by_auto_model(tmp_path):
    model = student(num_classes=3, feature_width=0)
    model.save_pretrained(tmp_path, preprocessing=IMAGES, labels=["a", "b", "c"])
    output = AutoModel.from_pretrained(tmp_path)(pixel_values=pictures())
    assert torch.equal(output.pooler_output, model.forward_features(pictures())[:, 0])


@pytest.mark.parametrize("classes", [0, 3])
@torch.no_grad()
def test_features_only_serves_maps_at_the_patch_stride_also_with_stitches(tmp_path, classes):
    width = 0 if classes else 12
    model = student(num_classes=classes, feature_width=width, stitch_blocks={"2": 12})
    model.save_pretrained(tmp_path, preprocessing=IMAGES)
    source = f"local-dir:{tmp_path}"
    maps = timm.create_model(source, pretrained=True, features_only=True, out_indices=[0, 2, 3]).eval()
    assert maps.feature_info.channels() == [8, 8, 8]
    assert maps.feature_info.reduction() == [4, 4, 4]
    out = {}
    model.forward_features(pictures(), out, states=(0, 2, 3))
    for number, feature_map in zip((0, 2, 3), maps(pictures())):
        state = out["blocks"][str(number)]["state"][:, 3:]  # block 2 begins with the stitch; without prefix tokens
        assert torch.equal(feature_map, state.transpose(1, 2).reshape(2, 8, 4, 4))
