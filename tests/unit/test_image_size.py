"""teacher.image_size: any teacher at another size than its own, and sizes that no teacher can have."""

import copy

import pytest
import torch
from vit_families import save_timm, save_transformers, tiny

from models.teacher.load import fingerprint, load_teacher
from trainer.config.load import load_recipe
from trainer.config.phases import TeacherConfig

MODEL = tiny("vit")


@pytest.fixture
def saved(tmp_path):
    """A ViT of 32 pixels and patches of 8."""
    save_timm(tmp_path, MODEL, crop_pct=0.875)
    return tmp_path


def test_at_another_size_tokens_and_preprocessing_follow_and_the_weights_are_those_of_the_checkpoint(saved):
    own, larger = load_teacher(str(saved)), load_teacher(str(saved), image_size=48)
    assert (own.preprocessing.image_size, larger.preprocessing.image_size) == (32, 48)
    assert larger.preprocessing.crop_pct == own.preprocessing.crop_pct
    assert larger.model.patch_embed.grid_size == (6, 6)
    assert larger.model(torch.zeros(1, 3, 48, 48)).shape == (1, 5)
    assert fingerprint(larger)["sha256"] == fingerprint(own)["sha256"]
    by_timm = copy.deepcopy(MODEL)
    by_timm.set_input_size(img_size=(48, 48))
    pictures = torch.randn(2, 3, 48, 48)
    assert torch.equal(larger.model(pictures), by_timm(pictures))


def test_at_its_own_size_nothing_changes(saved):
    own, same = load_teacher(str(saved)), load_teacher(str(saved), image_size=32)
    pictures = torch.randn(2, 3, 32, 32)
    assert torch.equal(own.model(pictures), same.model(pictures)) and own.preprocessing == same.preprocessing


def test_a_checkpoint_of_transformers_at_another_size(tmp_path):
    save_transformers(tmp_path, "ViTForImageClassification")
    assert load_teacher(str(tmp_path), image_size=16).model.patch_embed.grid_size == (2, 2)


@pytest.mark.parametrize("size, nearest", [(33, "32 and 40"), (225, "224 and 232"), (7, "8"), (1, "8")])
def test_a_size_that_is_no_multiple_of_the_patch_names_the_nearest(saved, size, nearest):
    with pytest.raises(
        ValueError, match=rf"image_size {size} is no multiple .* patch size 8: the nearest are {nearest}"
    ):
        load_teacher(str(saved), image_size=size)


@pytest.mark.parametrize("size", [0, -224, 4097, 100_000])
def test_a_size_that_no_teacher_has_is_refused_by_the_recipe(size):
    with pytest.raises(ValueError, match=rf"teacher\.image_size is {size}, expected 1 to 4,096"):
        TeacherConfig(source="owner/name", image_size=size)
    with pytest.raises(ValueError, match=r"teacher\.image_size is '224px', expected a whole number"):
        load_recipe("recipes/demo.yaml", ["teacher.image_size=224px"])


def test_a_teacher_that_is_trained_here_has_32_pixels_where_nothing_is_said():
    assert TeacherConfig().trained_size == 32 and TeacherConfig(image_size=64).trained_size == 64
    with pytest.raises(ValueError, match=r"teacher\.patch_size is 5, expected a divisor of teacher\.image_size=32"):
        TeacherConfig(patch_size=5)
