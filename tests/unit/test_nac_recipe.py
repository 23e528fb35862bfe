"""What a recipe may ask of a NAC student, and how its modules are cut."""

import pytest

from tests.launch import ROOT
from trainer.config.load import load_recipe
from trainer.config.student import KINDS
from trainer.teaching.families import FAMILIES
from trainer.teaching.students import student_depths

RECIPE = ROOT / "recipes/nac_demo.yaml"


def test_the_kinds_of_the_schema_are_the_rows_of_the_table():
    assert list(FAMILIES) == KINDS[:2] == ["vmoe", "nac"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modules=2"], "modules is 2, expected 3 or more with student.kind=nac"),
        (["student.kind=nacc"], "student.kind is 'nacc', expected one of vmoe, nac"),
        (["student.init=teacher"], "starts from no ViT's layers"),
        (["distill.stitches=tied"], "distill.stitches is 'tied', expected 'linear' with student.kind=nac$"),
        (["distill.border=mse"], "expected 'none' with student.kind=nac and student.nac.read_in=one"),
        (["refine.epochs=1"], "read_in=one, set tokens there"),
        (["train.layer_decay=0.9"], "train.layer_decay is 0.9, expected 1.0 with student.kind=nac"),
        (["teacher.head=none", "meta.objective=theseus"], "it tells classes"),
        (["student.nac.graph=star"], "student.nac.graph is 'star'"),
    ],
)
def test_what_a_nac_cannot_do_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(RECIPE, words)


def test_the_read_in_and_the_read_out_are_modules_of_their_own():
    # 4 propagators over the modules between, the longer shares first
    assert student_depths(load_recipe(RECIPE), 6) == (1, 2, 2, 1)
    assert student_depths(load_recipe(RECIPE, ["modules=3"]), 6) == (1, 4, 1)
    assert student_depths(load_recipe(RECIPE, ["modules=5"]), 6) == (1, 2, 1, 1, 1)
    with pytest.raises(ValueError, match="has 4 blocks, too few for 5 modules"):
        student_depths(load_recipe(RECIPE, ["modules=7"]), 6)
    borders = load_recipe(RECIPE, ["student.nac.read_in=tokens", "distill.border=mse", "refine.epochs=1"])
    assert borders.distill.border == "mse"
