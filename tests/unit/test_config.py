"""Recipes: extends, overrides, types, ranges, and errors that name the key and what to write instead."""

import dataclasses
import typing

import pytest
import yaml

import models.moe
from tests.launch import ROOT
from trainer.config import phases, student
from trainer.config.load import build, first_difference, load_recipe, parse_override, split_evenly, to_dict
from trainer.config.recipe import Recipe

FITTED = {"distill": {"stitches": "tied"}, "refine": {"order": "fit"}, "student": {"variant": "S/16"}}


def write(folder, **texts):
    """Files NAME.yaml with the given texts; returns the path of the first."""
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(texts))}.yaml"


def sections(cls=Recipe, where=""):
    """Every dataclass of a recipe with its dotted name."""
    found = [(where, cls)]
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found += sections(hint, f"{where}{name}.")
    return found


def test_extends_merges_key_by_key_over_two_levels(tmp_path):
    path = write(
        tmp_path,
        top="extends: middle.yaml\ntrain: {epochs: 7}\nteacher: {depths: [1, 2, 3, 4]}",
        middle="extends: base.yaml\ntrain: {lr: 0.5, betas: [0.1, 0.2]}\nmodules: 4",
        base="seed: 9\nmodules: 2\ntrain: {lr: 0.25, epochs: 3, clip: 1.5}\nteacher: {depths: [8, 8]}",
    )
    recipe = load_recipe(path)
    assert (recipe.seed, recipe.modules) == (9, 4)
    assert (recipe.train.epochs, recipe.train.lr, recipe.train.clip) == (7, 0.5, 1.5)
    assert recipe.train.betas == (0.1, 0.2)
    assert recipe.teacher.depths == (1, 2, 3, 4)  # a list is replaced, not joined
    assert recipe.meta == phases.MetaConfig()


def test_extends_is_relative_to_the_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("seed: 3")
    (tmp_path / "sub" / "top.yaml").write_text("extends: ../base.yaml")
    assert load_recipe(tmp_path / "sub" / "top.yaml").seed == 3


def test_an_empty_section_keeps_what_it_extends(tmp_path):
    path = write(tmp_path, top="extends: base.yaml\ntrain:\n", base="train: {epochs: 3}")
    assert load_recipe(path).train.epochs == 3
    assert load_recipe(path, ["train.lr=0.5"]).train.lr == 0.5
    assert load_recipe(write(tmp_path, alone="train:\n"), ["train.lr=0.5"]).train.lr == 0.5


@pytest.mark.parametrize("texts", [{"a": "extends: a.yaml"}, {"a": "extends: b.yaml", "b": "extends: a.yaml"}])
def test_a_cycle_of_extends_is_refused(tmp_path, texts):
    with pytest.raises(ValueError, match=r"a\.yaml extends itself through a\.yaml"):
        load_recipe(write(tmp_path, **texts))


def test_a_missing_parent_or_recipe_lists_the_ones_there(tmp_path):
    path = write(tmp_path, top="extends: bse.yaml", base="seed: 1")
    with pytest.raises(ValueError, match=r"no recipe at .*bse\.yaml\. Recipes there: base\.yaml, top\.yaml"):
        load_recipe(path)
    with pytest.raises(ValueError, match="Recipes there: none"):
        load_recipe(tmp_path / "nowhere" / "x.yaml")


@pytest.mark.parametrize(
    "text, message",
    [
        ("train: [1", "not valid YAML"),
        ("- a\n- b", "must hold sections of keys, got list"),
        ("train: 3", "train must be a section of keys, got 3"),
        ("run: {log_every: .nan}", "run.log_every is nan, expected a whole number"),
    ],
)
def test_broken_files(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(write(tmp_path, broken=text))
    assert "\n" not in str(error.value)


def test_overrides_are_read_as_yaml_and_win(tmp_path):
    path = write(tmp_path, top="train: {epochs: 3}\nstudent: {width: 48, variant: S/16}")
    overrides = ["train.epochs=5", "data.workers=2", "student.moe.k=1", "student.width=null", "train.betas=[0.5, 0.6]",
                 "data.path=a=b", "train.lr=1e-3", "data.skip_unreadable=true", "train.epochs=6"]  # fmt: skip
    recipe = load_recipe(path, overrides)
    assert recipe.train.epochs == 6  # the last one wins
    assert recipe.train.lr == 1e-3
    assert recipe.data.path == "a=b"
    assert (recipe.data.workers, recipe.student.moe.k, recipe.student.width) == (2, 1, None)
    assert recipe.train.betas == (0.5, 0.6)
    assert recipe.data.skip_unreadable is True


@pytest.mark.parametrize(
    "text, message",
    [
        ("train.epochs", "cannot read the override 'train.epochs': expected section.key=value"),
        ("=3", "cannot read the override '=3'"),
        (
            "train.epochs=[1",
            "^the value of the override 'train.epochs=.* is not valid YAML: while parsing a flow sequence",
        ),
        ("seed.x=3", "override 'seed.x=3': seed is a value, not a section"),
        ("train.epoch=3", r"unknown key train\.epoch\. Did you mean train\.epochs"),
        ("warmup_epochs=3", r"unknown key warmup_epochs\. Did you mean teacher\.warmup_epochs, meta\.warmup_epochs"),
        ("moe.k=1", r"unknown key moe\. Did you mean modules, student\.moe\?"),
        ("student.moe.expert=4", r"unknown key student\.moe\.expert\. Did you mean student\.moe\.num_experts"),
        ("tran.epochs=3", r"unknown key tran\. Did you mean train"),
        ("data.zzz=3", r"unknown key data\.zzz\. Known here: source, path, image_key"),
    ],
)
def test_bad_overrides_name_the_close_keys(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(write(tmp_path, top="seed: 1"), [text])
    assert "\n" not in str(error.value)


def test_close_keys_of_the_own_section_come_first():
    with pytest.raises(ValueError) as error:
        build(Recipe, {"distill": {"clipp": 1, "alpha": 0.5}})
    assert str(error.value) == "unknown key distill.clipp. Did you mean distill.clip?"
    with pytest.raises(ValueError, match=r"unknown key train\.alpha\..*distill\.alpha"):
        build(Recipe, {"train": {"alpha": 0.5}})


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"train": {"lr": "1e-3"}}, 1e-3),  # YAML 1.1 reads 1e-3 as text
        ({"train": {"lr": 1}}, 1.0),
        ({"train": {"lr": 0.5}}, 0.5),
    ],
)
def test_numbers(values, expected):
    lr = build(Recipe, values).train.lr
    assert lr == expected and type(lr) is float


@pytest.mark.parametrize(
    "values, message",
    [
        ({"train": {"lr": "fast"}}, "train.lr is 'fast', expected a number"),
        ({"train": {"lr": True}}, "train.lr is True, expected a number"),
        ({"train": {"lr": float("nan")}}, "train.lr is nan, expected a number"),
        ({"train": {"lr": "inf"}}, "train.lr is inf, expected a number"),
        ({"train": {"lr": None}}, "train.lr is None, expected a number"),
        ({"train": {"epochs": True}}, "train.epochs is True, expected a whole number"),
        ({"train": {"epochs": 2.0}}, "train.epochs is 2.0, expected a whole number"),
        ({"train": {"epochs": "3"}}, "train.epochs is '3', expected a whole number"),
        ({"data": {"skip_unreadable": 1}}, "data.skip_unreadable is 1, expected true or false"),
        ({"data": {"path": 3}}, "data.path is 3, expected text"),
        (
            {"data": {"source": "digit"}},
            "data.source is 'digit', expected one of auto, digits, fractals, textures, folder, hub",
        ),
        ({"teacher": {"depths": 6}}, r"teacher.depths is 6, expected a list such as \[1, 2\]"),
        ({"teacher": {"depths": "6,6"}}, "teacher.depths is '6,6', expected a list"),
        ({"teacher": {"depths": [6, 6, 6, True]}}, r"teacher.depths\[3\] is True, expected a whole number"),
        ({"train": {"betas": [0.9]}}, "train.betas is .*, expected a list of 2 values"),
        ({"train": {"clip": "none"}}, "train.clip is 'none', expected a number"),
        ({"student": {"moe": 3}}, "student.moe must be a section of keys, got 3"),
    ],
)
def test_wrong_types_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        build(Recipe, values)


def test_null_is_a_value_only_where_the_type_says_so():
    assert build(Recipe, {"student": {"variant": "S/16", "moe": {"capacity_factor": None}}}).student.width is None
    assert build(Recipe, {"train": {"clip": None}}).train.clip is None
    with pytest.raises(ValueError, match="modules is None, expected a whole number"):
        build(Recipe, {"modules": None})


OUT_OF_RANGE = {
    "modules": 0,
    "data.workers": -1,
    "data.limit": -1,
    "augment.hflip": 1.5,
    "augment.random_erasing": -0.1,
    "augment.switch_prob": 2,
    "augment.label_smoothing": 1.1,
    "augment.mixup": -0.1,
    "augment.cutmix": -1,
    "augment.repeats": 0,
    "teacher.epochs": 0,
    "meta.lr": 0,
    "meta.blocks_per_module": -1,
    "distill.warmup_epochs": 101,
    "distill.alpha": 1.01,
    "distill.tau": 0,
    "train.drop_path": 1,
    "train.global_batch": 0,
    "train.clip": -1,
    "train.weight_decay": -0.1,
    "train.baselines": ["distilled"],
    "student.moe.num_experts": 0,
    "student.moe.k": 9,
    "student.moe.noise_std": -1,
    "student.moe.capacity_factor": 0,
    "student.moe.eval_capacity_factor": -1,
    "student.moe.capacity_multiple": 0,
    "student.moe.images_per_group": -1,
    "student.moe.dropout": 1,
    "run.log_every": 0,
    "run.eval_every": 0,
    "run.save_every": 0,
    "run.save_epochs": 0,
    "run.keep": 0,
    "run.eval_batch": -1,
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_values_out_of_range_are_refused_by_name(name):
    *path, key = name.split(".")
    values = {key: OUT_OF_RANGE[name]}
    for part in reversed(path):
        values = {part: values}
    if path and path[0] == "student":
        values["student"]["variant"] = "S/16"
    value = values
    for part in (*path, key):
        value = value[part]
    with pytest.raises(ValueError, match=f"^{name} is .*expected "):
        build(Recipe, values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"data": {"source": "folder"}}, "data.source is 'folder' but data.path is empty: set data.path"),
        ({"modules": 3, "teacher": {"depths": [2, 2]}}, r"teacher.depths has 2 entries \(2, 2\) but modules is 3"),
        ({"student": {"variant": "S/16", "depths": [2, 2]}}, r"student.depths has 2 entries \(2, 2\) but modules is 4"),
        ({"student": {"width": 8}}, "student.variant is empty and student.depth is not set"),
        ({"refine": {"fit_images": 9}}, "refine.fit_images is 9, expected null but for order fit"),
        (FITTED | {"refine": {"order": "fit", "epochs": 1}}, "refine.epochs is 1, expected 0 with refine.order=fit"),
        (FITTED | {"distill": {"stitches": "pca"}}, "distill.stitches is 'pca', expected tied with refine.order=fit"),
        (FITTED | {"distill": {"stitches": "tied", "epochs": 0}}, "distill.epochs is 0, expected 1 or more"),
        (FITTED | {"student": {"kind": "nac", "variant": "S/16"}}, "refine.order is 'fit', expected parallel,"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_together(values, message):
    with pytest.raises(ValueError, match=message):
        build(Recipe, values)


def test_a_recipe_survives_yaml(tmp_path):
    values = {
        "train": {"eps": 1e-8, "betas": [0.8, 0.95], "clip": None, "baselines": ["scratch"]},
        "teacher": {"depths": [6, 6, 6, 6]},
        "student": {"variant": "S/16", "moe": {"capacity_factor": 1.05}},
    }
    recipe = build(Recipe, values)
    plain = yaml.safe_load(yaml.safe_dump(to_dict(recipe)))
    assert plain["teacher"]["depths"] == [6, 6, 6, 6]
    assert plain["student"]["moe"]["capacity_factor"] == 1.05
    assert build(Recipe, plain) == recipe
    assert first_difference(plain, to_dict(recipe)) is None
    assert build(Recipe, to_dict(Recipe())) == Recipe()


def test_first_difference_names_the_key_and_both_values():
    there, here = to_dict(Recipe()), to_dict(build(Recipe, {"train": {"lr": 0.5}}))
    assert first_difference(there, here) == "train.lr: 0.0005 there, 0.5 here"
    assert first_difference({"a": 1}, {}) == "a: 1 there, (absent) here"
    assert first_difference({"b": {"y": 1, "x": 2}}, {"b": {"y": 0, "x": 1}}) == "b.x: 2 there, 1 here"


def test_split_evenly():
    assert split_evenly(14, 4, "x") == (4, 4, 3, 3)
    assert split_evenly(32, 10, "x") == (4, 4, 3, 3, 3, 3, 3, 3, 3, 3)
    assert split_evenly(4, 4, "x") == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="the teacher has 3 blocks, too few for 4 modules"):
        split_evenly(3, 4, "the teacher")


def test_an_unset_variable_of_the_shell_empties_nothing():
    with pytest.raises(ValueError, match=r"teacher\.source is null, expected text; .* write 'teacher\.source=\"\"'"):
        load_recipe(ROOT / "recipes/demo.yaml", ["teacher.source="])
    assert load_recipe(ROOT / "recipes/demo.yaml", ['teacher.source=""']).teacher.source == ""


def test_parse_override():
    assert parse_override("a.b.c=[1, x]") == (["a", "b", "c"], [1, "x"])
    assert parse_override("a=") == (["a"], None)


def test_every_knob_says_what_it_is():
    lacking = [
        where + item.name
        for where, cls in sections()
        for item in dataclasses.fields(cls)
        if not dataclasses.is_dataclass(typing.get_type_hints(cls)[item.name]) and not item.metadata.get("help")
    ]
    assert lacking == []
    assert all(cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "(") for _, cls in sections())


def test_the_schema_and_the_model_agree_on_routing():
    """The schema may not import torch, so these fields and defaults stand in two places; this keeps them one fact."""
    ours = {item.name: (item.default, item.type) for item in dataclasses.fields(student.MoEConfig)}
    theirs = {item.name: item.default for item in dataclasses.fields(models.moe.MoEConfig)}
    assert {name: default for name, (default, _) in ours.items()} == theirs
    assert typing.get_type_hints(student.MoEConfig) == typing.get_type_hints(models.moe.MoEConfig)
