"""Sizes that a student takes from its teacher, and patches that do not meet."""

from pathlib import Path

import pytest
import timm
import torch
from vit_families import save_timm, tiny

from models.vmoe.model import VMoEConfig
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe
from trainer.config.student import StudentConfig
from trainer.context import Run
from trainer.distributed.ranks import Dist
from trainer.plan import preflight
from trainer.teaching.sizes import like_saved, like_teacher
from trainer.teaching.students import new_student, student_config, student_modules

ROOT = Path(__file__).resolve().parents[2]
NO_SIZES = [f"student.{name}=null" for name in ("patch_size", "width", "depth", "heads", "mlp_dim")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """56 pixels in patches of 14, 5 blocks of width 24 with 3 heads, for the digits."""
    folder = tmp_path_factory.mktemp("teacher")
    model = tiny("vit", depth=5, img_size=56, patch_size=14, num_classes=10, mlp_ratio=2)
    save_timm(folder, model, input_size=(3, 56, 56))
    return folder


def run_with(out, teacher, *overrides):
    changes = (f"teacher.source={teacher}", "teacher.image_size=null", "modules=2", *NO_SIZES, *overrides)
    recipe = load_recipe(ROOT / "tests/fixtures/tiny.yaml", changes)
    ds_values = read_ds_config(ROOT / "ds_configs/cpu_debug.json")
    return Run(recipe, ds_values, out, Dist(0, 1, 0, 1, torch.device("cpu")), "a command")


def sizes_of(config) -> tuple[int, ...]:
    return config.image_size, config.patch_size, config.width, config.depth, config.heads, config.mlp_dim


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["student.variant=teacher"], (56, 14, 24, 3, 3, 48)),
        (["student.variant=teacher", "teacher.image_size=28"], (28, 14, 24, 3, 3, 48)),
        (["student.variant=teacher", "student.depth=5", "student.mlp_dim=96"], (56, 14, 24, 5, 3, 96)),
        (["student.variant=teacher", "modules=4"], (56, 14, 24, 4, 3, 48)),
        (["student.variant=S"], (56, 14, 512, 8, 8, 2048)),
        (["student.variant=m2mkd-B"], (56, 14, 768, 12, 12, 3072)),
        (["student.variant=S/14"], (56, 14, 512, 8, 8, 2048)),
        (["student.width=16", "student.depth=2", "student.heads=2", "student.mlp_dim=32"], (56, 14, 16, 2, 2, 32)),
    ],
)
def test_what_is_left_open_is_the_teachers(tmp_path, teacher, overrides, expected):
    run = run_with(tmp_path, teacher, *overrides)
    assert sizes_of(student_config(run)) == expected
    with torch.device("meta"):
        assert len(student_modules(run)) == run.recipe.modules


def test_a_student_of_the_teachers_sizes_starts_from_its_layers(tmp_path, teacher):
    run = run_with(
        tmp_path,
        teacher,
        "student.variant=teacher",
        "student.init=teacher",
        "student.start=copy",
        "distill.stitches=tied",
        "meta.blocks_per_module=0",
        "teacher.image_size=28",
    )
    student = new_student(run)
    assert torch.equal(student.patch_embed.proj.weight, run.teacher.model.patch_embed.proj.weight)
    assert torch.equal(student.pos_embed, run.teacher.model.pos_embed)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vit_tiny_patch16_224", (False, "erf", "token")),
        ("vit_base_patch16_siglip_224 gelu_tanh", (False, "tanh", "token")),  # attention pooling, which no V-MoE has
        ("eva02_tiny_patch14_224", (True, "erf", "mean")),
        ("vit_small_patch16_dinov3", (False, "erf", "mean")),
        ("beit_base_patch16_224", (False, "erf", "mean")),
    ],
)
def test_a_student_of_the_teachers_sizes_has_its_kind_of_mlp_and_pooling(name, expected):
    architecture, _, activation = name.partition(" ")
    changes = {"act_layer": activation} if activation else {}
    model = timm.create_model(architecture, img_size=112, depth=4, embed_dim=48, num_heads=4, **changes)
    taken = like_teacher(StudentConfig(variant="teacher"), model, 2)
    assert (taken.swiglu, taken.gelu, taken.pool) == expected


@pytest.mark.parametrize(
    "overrides, patch", [(["student.variant=S/16"], 16), (["student.variant=S", "student.patch_size=8"], 8)]
)
def test_patches_that_cannot_meet_are_refused_with_what_fits(tmp_path, teacher, overrides, patch):
    for size, grid in ((None, "56 pixels into 4 x 4"), (112, "112 pixels into 8 x 8")):
        given = [f"teacher.image_size={size}"] if size else []
        with pytest.raises(ValueError) as caught:
            preflight.check(run_with(tmp_path, teacher, *overrides, *given), ["meta", "distill"])
        message = str(caught.value)
        assert f"student.patch_size is {patch}, but the teacher" in message and f"cuts images of {grid}" in message
        assert "set student.patch_size=14, or leave it null" in message and "\n" not in message


def test_sizes_that_contradict_each_other_are_refused(tmp_path, teacher):
    with pytest.raises(ValueError, match=r"student\.heads is 3, expected a divisor of student\.width=100"):
        student_config(run_with(tmp_path, teacher, "student.variant=teacher", "student.width=100"))
    with pytest.raises(ValueError, match="variant 'XL/14' is not known"):
        student_config(run_with(tmp_path, teacher, "student.variant=XL"))
    with pytest.raises(ValueError, match=r"student\.variant is empty and student\.width is not set"):
        run_with(tmp_path, teacher)


def test_blocks_that_tell_no_heads_are_named(tmp_path, teacher):
    run = run_with(tmp_path, teacher, "student.variant=teacher")
    run.teacher.model.blocks[0] = torch.nn.Identity()
    with pytest.raises(
        ValueError, match=r"blocks of kind Identity have no heads and MLP to follow: set student\.variant"
    ):
        student_config(run)


def test_a_student_that_is_given_keeps_its_own_sizes():
    saved = VMoEConfig(image_size=32, patch_size=8, width=24, depth=6, heads=3, mlp_dim=48, num_classes=2)
    taken = like_saved(StudentConfig(variant="teacher"), saved)
    assert (taken.patch_size, taken.width, taken.depth, taken.heads, taken.mlp_dim) == (8, 24, 6, 3, 48)
    assert like_saved(StudentConfig(variant="S"), saved).variant == "S/8"
