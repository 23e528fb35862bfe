"""What a start and a dry run say of few images, and of an image size that nobody chose."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from vit_families import save_timm, tiny

from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe
from trainer.context import Run
from trainer.distributed.ranks import Dist
from trainer.plan import image_size, preflight
from trainer.plan.rehearsal import DryRun
from trainer.teaching.estimate import few_steps

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """464 pixels in patches of 29: 16 x 16 of them, 7 x 7 at 203 pixels."""
    folder = tmp_path_factory.mktemp("teacher")
    save_timm(folder, tiny("vit", depth=3, img_size=464, patch_size=29, num_classes=3), input_size=(3, 464, 464))
    return folder


def drawn(root, images: int, side: int) -> Path:
    for label in CLASSES:
        (root / label).mkdir(parents=True)
        for number in range(images):
            Image.new("RGB", (side, 2 * side), (number, 0, 0)).save(root / label / f"{number}.png")
    return root


def request(pictures, teacher, *overrides):
    """Recipe and DeepSpeed JSON of the shortest command on these pictures."""
    recipe = load_recipe(
        ROOT / "recipes/own_images.yaml", [f"data.path={pictures}", f"teacher.source={teacher}", *overrides]
    )
    return recipe, read_ds_config(ROOT / "ds_configs/one_machine.json")


def run_with(out, *arguments):
    recipe, ds_values = request(*arguments)
    return Run(recipe, ds_values, out, Dist(0, 1, 0, 1, torch.device("cpu")), "a command")


@pytest.mark.parametrize(
    "images, batch, expected",
    [
        (640, 64, ""),
        (
            143,
            64,
            "2 steps an epoch of 143 images, which is little: t.global_batch=8 makes 17, or raise t.epochs",
        ),
        (9, 8, "1 step an epoch of 9 images, which is little: t.global_batch=1 makes 9, or raise t.epochs"),
    ],
)
def test_few_steps_name_a_batch_that_makes_more(images, batch, expected):
    assert few_steps("t", images, batch) == expected


def test_a_start_on_few_and_small_pictures_at_a_dear_size_says_so(tmp_path, teacher, caplog):
    preflight.check(run_with(tmp_path, drawn(tmp_path / "d", 20, 40), teacher), ["meta", "distill", "refine", "train"])
    said = caplog.text
    assert "phase refine: 1 step an epoch of 54 images" in said and "phase train: 1 step an epoch" in said
    assert "phase meta" not in said and "phase distill" not in said  # nothing is trained in them
    assert (
        "the teacher's own image size of 464 pixels makes 257 tokens of every image: set teacher.image_size=203 for 50"
    )
    assert "teacher.image_size=203 for 50, or teacher.image_size=464 to keep it" in said
    assert "the pictures are small, 40 pixels at their shorter side" in said and "blown up to 464" in said


def test_a_size_that_was_chosen_and_pictures_as_large_are_worth_no_word(tmp_path, teacher):
    run = run_with(tmp_path, drawn(tmp_path / "d", 20, 300), teacher, "teacher.image_size=464")
    assert image_size.doubts(run) == []


def test_the_dry_run_says_what_a_size_costs(tmp_path, teacher):
    recipe, ds_values = request(drawn(tmp_path / "d", 20, 300), teacher)
    layout = dict.fromkeys(("meta", "distill", "refine", "train"), (1, 1))
    dry = DryRun(recipe, ds_values, tmp_path, layout, str(tmp_path / "scratch"))
    said = dry.teacher()
    assert "464 px, 257 tokens" in said and "MB of activations kept in training a model of this size" in said
    assert "with teacher.image_size=203 50 tokens" in said and "set teacher.image_size=203 for 50" in said


def test_classes_of_one_or_two_images_are_named(tmp_path, teacher):
    pictures = drawn(tmp_path / "d", 20, 300)
    for number in range(2, 20):
        (pictures / "bee" / f"{number}.png").unlink()
    recipe, ds_values = request(pictures, teacher)
    said = DryRun(recipe, ds_values, tmp_path, {"meta": (1, 1)}, str(tmp_path / "scratch")).data()
    assert "1 of 3 classes have fewer than 3 training images, of which nothing general is learned: bee 1" in said


@pytest.mark.parametrize("key, given", [("data.path", ["teacher.source=x"]), ("teacher.source", ["data.path=x"])])
def test_what_the_recipe_leaves_open_has_to_be_given(key, given):
    with pytest.raises(ValueError, match=rf"^{key} is left open by the recipe: set it, as in {key}=\.\.\.$"):
        load_recipe(ROOT / "recipes/own_images.yaml", given)
