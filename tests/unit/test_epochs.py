"""`epochs: n` beside the sections: one number for every phase that trains."""

import pytest

from trainer.config.load import load_recipe, origins


def epochs_of(recipe) -> dict[str, int]:
    return {name: getattr(recipe, name).epochs for name in ("teacher", "meta", "distill", "refine", "train")}


@pytest.fixture
def written(tmp_path):
    (tmp_path / "base.yaml").write_text("epochs: 7\ndistill: {epochs: 0}\nrefine: {epochs: 3}\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\ntrain: {epochs: 9}\n")
    return tmp_path


def test_one_number_stands_in_every_section_but_those_that_the_file_sets_or_has_turned_off(written):
    recipe = load_recipe(written / "base.yaml")
    assert epochs_of(recipe) == {"teacher": 7, "meta": 7, "distill": 0, "refine": 3, "train": 7}
    assert epochs_of(load_recipe(written / "top.yaml"))["train"] == 9


def test_on_the_command_line_it_beats_the_files_and_a_section_beats_it_in_any_order(written):
    everywhere = {"teacher": 2, "meta": 2, "distill": 0, "refine": 2, "train": 2}
    assert epochs_of(load_recipe(written / "top.yaml", ["epochs=2"])) == everywhere
    for overrides in (["epochs=2", "train.epochs=5"], ["train.epochs=5", "epochs=2"]):
        assert epochs_of(load_recipe(written / "top.yaml", overrides)) == everywhere | {"train": 5}
    overrides = ["refine.epochs=0", "distill.epochs=1", "epochs=2"]
    off = {"distill": 1, "refine": 0}
    assert epochs_of(load_recipe(written / "top.yaml", overrides)) == everywhere | off
    assert epochs_of(load_recipe(written / "top.yaml", epochs=2)) == everywhere


def test_a_phase_that_is_off_by_default_stays_off(tmp_path):
    (tmp_path / "plain.yaml").write_text("seed: 1\n")
    recipe = load_recipe(tmp_path / "plain.yaml", ["epochs=2"])
    assert epochs_of(recipe) == {"teacher": 2, "meta": 2, "distill": 2, "refine": 0, "train": 2}
    assert (recipe.expert.epochs, recipe.incubate.epochs, recipe.assemble.epochs) == (2, 100, 100)


def test_where_the_epochs_are_from(written):
    origin = origins(written / "top.yaml")
    assert [origin[f"{name}.epochs"] for name in ("meta", "refine", "train")] == ["base.yaml", "base.yaml", "top.yaml"]
    origin = origins(written / "top.yaml", ["epochs=2"])
    assert {origin["train.epochs"], origin["refine.epochs"]} == {"command line"}
    assert origin["distill.epochs"] == "base.yaml"


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "true", "", "[1]"])
def test_what_is_no_number_of_epochs_is_refused(written, value):
    with pytest.raises(ValueError, match=r"^epochs is .*, expected a whole number from 1, the epochs of every phase"):
        load_recipe(written / "top.yaml", [f"epochs={value}"])
