"""Recipe files that are broken, hostile or absurd; the words for types; the origin of each value."""

import typing

import pytest

from tests.unit.test_config import write
from trainer.config.load import build, describe, load_recipe, origins, read_yaml
from trainer.config.recipe import Recipe


@pytest.mark.parametrize(
    "text, message",
    [
        ("train: {lr: 1}\nseed: 1\ntrain: {epochs: 3}", "the key train is given twice"),
        ("train: {lr: 1, lr: 2}", "the key lr is given twice"),
        ("data: !!python/object/apply:os.system [true]", "not valid YAML: could not determine a constructor for the t"),
        ("seed: 2020-13-45", "not valid YAML: month must be in 1..12"),
        ("seed: " + 5000 * "9", "not valid YAML: Exceeds the limit"),
        ("seed: " + 3000 * "[", "not valid YAML: nested too deeply"),
        ("train: {lr: " + 400 * "9" + "}", r"train.lr is 9+\.\.\.9+, expected a number"),
    ],
)
def test_hostile_files_give_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(write(tmp_path, broken=text))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(ValueError, match="is not text"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize("values", ["seed: *a9", "train: *a9", "data: {source: *a9}", "train: {betas: [*a9, 1]}"])
def test_a_value_of_a_billion_parts_gives_a_short_message(values):
    """Ten lines of YAML with aliases; the plain repr of it would fill the memory."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join(8 * [f'*a{i - 1}'])}]" for i in range(1, 10)]
    bomb = read_yaml("\n".join([*lines, values]), "bomb")
    with pytest.raises(ValueError, match=r"expected|must be a section") as error:
        build(Recipe, {key: value for key, value in bomb.items() if not key.startswith("a")})
    assert len(str(error.value)) < 300


def test_absurd_sizes_are_fine():
    assert build(Recipe, {"train": {"epochs": 10**9}, "modules": 1000}).train.epochs == 10**9


def test_origins_follow_the_extends_chain(tmp_path):
    path = write(
        tmp_path, top="extends: base.yaml\ntrain: {epochs: 7}\nmeta:", base="train: {lr: 1, epochs: 3}\nseed: 1"
    )
    found = origins(path, ["data.workers=2", "train.lr=3"])
    named = {key: origin for key, origin in found.items() if origin != "default"}
    assert named == {"train.epochs": "top.yaml", "train.lr": "command line", "data.workers": "command line",
                     "seed": "base.yaml"}  # fmt: skip
    assert len(found) == len(origins(path)) > 100


def test_types_in_words():
    hints = {bool: "true or false", int | None: "a whole number or null", tuple[float, float]: "list of 2 numbers",
             tuple[str, ...]: "list of texts", typing.Literal["a", "b"]: "one of a, b"}  # fmt: skip
    assert {hint: describe(hint) for hint in hints} == hints
