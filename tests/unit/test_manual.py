"""What the command line says about itself: help by section, the resolved recipe, the reference."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from trainer.cli import flags, manual, reference
from trainer.config.load import all_keys, load_recipe, to_dict
from trainer.config.student import MoEConfig

ROOT = Path(__file__).resolve().parents[2]
IMAGEFOLDER = ROOT / "recipes/vmoe_base_imagefolder.yaml"
DS_CONFIG = ROOT / "ds_configs/node8_zero1_ep8.json"


def answer(*arguments):
    return flags.answer(flags.parse([str(a) for a in arguments]))


def refused(*arguments):
    with pytest.raises(ValueError) as error:
        answer(*arguments)
    return str(error.value)


def test_help_is_short_and_lists_every_section():
    shown = answer("--help")
    assert len(shown.splitlines()) < 60
    listed = [line for line in shown.splitlines() if line.strip().startswith("recipe, data, ")]
    assert listed == ["  " + ", ".join([*manual.sections(), "ds", "all"])]


def test_help_of_a_section_has_type_default_and_meaning_of_every_key():
    shown = answer("--help", "student.moe").splitlines()
    assert shown[0].startswith("student.moe: Routing of the student's MoE blocks")
    names = [item.name for item in dataclasses.fields(MoEConfig)]
    assert [line.split("=")[0] for line in shown[1:]] == [f"  student.moe.{name}" for name in names]
    row = next(line for line in shown if "capacity_factor=null" in line)
    assert "a number or null" in row and "slots per expert in training" in row
    assert "  student.variant=m2mkd-B/16  " in answer(
        "--help", "student"
    )  # the default of a recipe, not of the section
    assert answer("--help", "distill.alpha").split("  ")[1:] == [
        "distill.alpha=0.5",
        "a number, 0 to 1",
        "weight of the distillation term; the label loss gets 1 - alpha",
    ]


def test_help_all_has_every_key():
    rows = answer("--help", "all").splitlines()
    names = [row.split("=")[0].strip() for row in rows if row.startswith("  ") and not row.startswith("  ds.")]
    assert sorted(names) == sorted(all_keys())
    assert any(row.startswith("  ds.trainer.ep_size ") for row in rows)


def test_help_of_what_does_not_exist():
    assert refused("--help", "trian").startswith("there is no section trian. Did you mean train")
    assert refused("--help", "zzz").startswith(
        "there is no section zzz. Sections: recipe, data, data.fractals, data.textures, augment"
    )
    assert refused("--help", "distill.alhpa").startswith(
        "there is no section distill.alhpa. Did you mean distill.alpha"
    )


def test_the_printed_recipe_is_a_recipe_and_names_the_origin_of_each_value(tmp_path):
    words = ["data.path='a b: #c'", "train.lr=1e-6", "run.trackers=[]", "distill.clip=1"]
    shown = answer("--print-recipe", "--recipe", IMAGEFOLDER, *words)
    (tmp_path / "printed.yaml").write_text(shown)
    assert load_recipe(tmp_path / "printed.yaml") == load_recipe(IMAGEFOLDER, words)
    lines = shown.splitlines()
    for line in (
        "  source: folder  # vmoe_base_imagefolder.yaml",  # changed by the file itself
        "  workers: 12  # vmoe_base_imagenet.yaml",  # by the one it extends
        "  limit: 0  # default",
        "  lr: 1.0e-06  # command line",
        "    num_experts: 8  # vmoe_base_imagenet.yaml",
        "    dropout: 0.0  # default",
        "  trackers: []  # command line",
    ):
        assert line in lines
    assert all("  # " in line or line.endswith(":") for line in lines)


def test_the_printed_deepspeed_json_stands_in_comments():
    shown = answer("--print-recipe", "--recipe", IMAGEFOLDER, "--ds_config", DS_CONFIG, "ds.trainer.ep_size=4")
    start = shown.index("# DeepSpeed JSON")
    lines = shown[start:].splitlines()[1:]
    values = yaml.safe_load("\n".join(line.removeprefix("#   ") for line in lines))
    assert values["trainer"] == {"ep_size": 4, "activation_checkpointing": False} and values["bf16"] == {
        "enabled": True
    }
    assert "#     ep_size: 4  # command line" in lines
    assert "#     activation_checkpointing: false  # node8_zero1_ep8.json" in lines
    assert yaml.safe_load(shown) == to_dict(load_recipe(IMAGEFOLDER))


def test_the_recipe_of_a_saved_run_can_be_printed(tmp_path):
    recipe = load_recipe(ROOT / "recipes/demo.yaml", ["seed=7"])
    saved = {"phase": "meta", "module": None, "ds_config": {"bf16": {"enabled": True}}, "recipe": to_dict(recipe)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    shown = answer("--print-recipe", "--config", tmp_path / "config.yaml")
    assert yaml.safe_load(shown) == to_dict(recipe)
    assert "seed: 7  # config.yaml" in shown and "#     enabled: true  # config.yaml" in shown


def test_recipes_that_cannot_be_printed():
    assert refused("--print-recipe") == "--print-recipe needs --recipe (or --config)"
    assert "but --ds_config is missing" in refused("--print-recipe", "--recipe", IMAGEFOLDER, "ds.x=1")
    assert "Did you mean train.epochs" in refused("--print-recipe", "--recipe", IMAGEFOLDER, "train.epoch=1")


def test_the_reference_is_up_to_date():
    there = (ROOT / "docs/reference.md").read_text()
    assert there == reference.text(), "run: python -m trainer.cli.reference"
