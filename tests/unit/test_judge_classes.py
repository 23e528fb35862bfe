"""Accuracy on images whose classes are a subset or a relabelling of the model's, and maps that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data import ImageNetInfo

from models.labels import known_rows
from tests.judging import bench, folder_of, student, subject
from trainer.config.tasks import parse_task
from trainer.data.loader import eval_batches
from trainer.judge.accuracy import judged, prepare
from trainer.judge.classes import Placed, place_classes
from trainer.judge.images import measured_images
from trainer.judge.outputs import Outputs

INSECTS = ["zebra fly", "ant", "bee", "wasp", "moth", "gnat", "tick", "flea", "lice", "mite"]  # in no order


def accuracy_of(text, model):
    return prepare(subject(model), parse_task(text), bench())()


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """Four of the model's classes, which a folder has in the order of the alphabet."""
    return folder_of(tmp_path_factory.mktemp("some"), {"moth": 9, "ant": 5, "tick": 7, "Zebra_fly": 6})


def by_hand(folder, model, row_of):
    """Top-1 over the logits of some classes, without any of the code under test but the loader."""
    source = measured_images(parse_task(f"accuracy:data={folder}").data(bench().data))
    batch = next(eval_batches(source, model.preprocessing, batch=len(source)))
    with torch.no_grad():
        logits = model(batch.images)
    right = 0
    for row, label in zip(logits, batch.labels.tolist()):
        rows = list(row_of.values())
        told = rows[int(row[rows].argmax())]
        right += told == row_of[source.labels[label]]
    return right / len(source)


def test_a_subset_in_another_order_is_relabelled(some):
    model = student(INSECTS)
    row_of = {"Zebra_fly": 0, "ant": 1, "moth": 4, "tick": 6}  # worked out from INSECTS
    measured = accuracy_of(f"accuracy:data={some}", model)
    assert measured.figures["top-1"].value == by_hand(some, model, row_of)
    assert 0 < measured.figures["top-1"].value < 1
    assert measured.images == 27
    assert measured.details["over"] == "the logits of the 4 classes of the data, of 10"
    assert "'Zebra_fly' is 'zebra fly'" in measured.details["note"]
    names = {row["name"]: row["images"] for row in measured.details["classes"]}
    assert names == {"Zebra_fly": 6, "ant": 5, "moth": 9, "tick": 7}
    assert sum(row["images"] for row in measured.details["reliability"]) == 27


@pytest.mark.parametrize("form", ["csv", "tsv", "json"])
def test_a_table_says_which_is_which(some, tmp_path, form):
    model = student(INSECTS)
    pairs = {"Zebra_fly": "flea", "ant": "bee", "moth": "ant", "tick": "mite"}
    text = {
        "csv": "\n".join(f"{a},{b}" for a, b in pairs.items()),
        "tsv": "\n".join(f"{a}\t{b}" for a, b in pairs.items()) + "\n",
        "json": json.dumps(pairs),
    }[form]
    table = tmp_path / f"map.{form}"
    table.write_text(text)
    row_of = {"Zebra_fly": 7, "ant": 2, "moth": 1, "tick": 9}
    measured = accuracy_of(f"accuracy:data={some},map={table}", model)
    assert measured.figures["top-1"].value == by_hand(some, model, row_of)
    assert measured.figures["top-1"].value != accuracy_of(f"accuracy:data={some}", model).figures["top-1"].value


SEVERAL = {"Zebra_fly": ["flea", "lice"], "ant": ["bee"], "moth": ["ant", "moth", "gnat"], "tick": ["mite", "tick"]}


@pytest.mark.parametrize("form", ["csv", "tsv", "json"])
def test_several_classes_of_the_model_for_one_of_the_data(some, tmp_path, form):
    """As ObjectNet: any of the classes that stand for the true one is right. By hand: every answer is relabelled."""
    model = student(INSECTS)
    rows = [[own, *of_model] for own, of_model in SEVERAL.items()]
    text = {
        "csv": "\n".join(",".join(row) for row in rows) + "\n",
        "tsv": "\n".join("\t".join([*row, "", ""]) for row in rows),  # a spreadsheet fills its rows up
        "json": json.dumps(SEVERAL | {"ant": "bee"}),
    }[form]
    table = tmp_path / f"map.{form}"
    table.write_text(text)
    measured = accuracy_of(f"accuracy:data={some},map={table}", model)
    # worked out from INSECTS: what each number of the model is called in the data; wasp (3) stands for nothing
    called = {7: "Zebra_fly", 8: "Zebra_fly", 2: "ant", 1: "moth", 4: "moth", 5: "moth", 9: "tick", 6: "tick"}
    source = measured_images(parse_task(f"accuracy:data={some}").data(bench().data))
    batch = next(eval_batches(source, model.preprocessing, batch=len(source)))
    with torch.no_grad():
        logits = model(batch.images)
    among, of_all, in_five = 0, 0, 0
    for row, label in zip(logits, batch.labels.tolist()):
        true = source.labels[label]
        order = row.argsort(descending=True).tolist()
        surest = [number for number in order if number in called]
        among += called[surest[0]] == true
        of_all += called.get(order[0]) == true
        in_five += true in [called[number] for number in surest[:5]]
    figures = {name: figure.value for name, figure in measured.figures.items()}
    assert figures["top-1"] == among / len(source) and 0 < among < len(source)
    assert figures["top-1 of all classes"] == of_all / len(source)
    assert figures["top-5"] == in_five / len(source)
    assert measured.details["over"].startswith("the logits of 8 classes, of 10, that stand for the 4 of the data")
    one = tmp_path / "one.csv"
    one.write_text("\n".join(f"{own},{of_model[0]}" for own, of_model in SEVERAL.items()))
    assert accuracy_of(f"accuracy:data={some},map={one}", model).figures["top-1"].value != figures["top-1"]


def test_several_classes_by_synsets(tmp_path):
    """A table of wnids against a model in words: they are found as any other name."""
    info = ImageNetInfo("imagenet-1k")
    synsets = info.label_names()
    words = [info.label_name_to_description(name) for name in synsets]
    model = student(words, num_classes=1000)
    folder = folder_of(tmp_path / "images", {"chair": 1, "clock": 1})
    table = tmp_path / "map.csv"
    table.write_text(f"clock,{synsets[409]},{synsets[530]}\nchair,{synsets[423]},{synsets[559]},{synsets[765]}\n")
    spec = parse_task(f"accuracy:data={folder},map={table}")
    placed = place_classes(subject(model), measured_images(spec.data(bench().data)), spec.settings)
    assert placed.rows.tolist() == [423, 559, 765, 409, 530] and placed.class_of.tolist() == [0, 0, 0, 1, 1]


def test_of_several_classes_the_unknown_ones_are_left_out_on_wish(some, tmp_path):
    table = tmp_path / "map.csv"
    table.write_text("ant,bee,lorry\nmoth,moth\ntick,tractor,train\nZebra_fly,flea\n")
    model = student(INSECTS)
    with pytest.raises(ValueError, match=r"lorry.*unknown=drop leaves"):
        accuracy_of(f"accuracy:data={some},map={table}", model)
    measured = accuracy_of(f"accuracy:data={some},map={table},unknown=drop", model)
    assert measured.images == 9 + 5 + 6 and measured.details["images_of_other_classes"] == 7  # of tick nothing is known


def test_figures_of_several_classes_worked_by_hand():
    # classes of the model: a b c d; of the data: x = a or b, y = c. Logits are logs, so that softmax gives them back
    shares = [[0.30, 0.05, 0.35, 0.30], [0.10, 0.40, 0.40 - 1e-6, 0.10], [0.25, 0.25, 0.20, 0.30]]
    outputs = Outputs(np.log(np.array(shares, dtype=np.float32)), np.array([0, 0, 1]), np.arange(3))
    placed = Placed(np.array([0, 1, 2]), np.array([0, 0, 1]), np.array([0, 1]), ["x", "y"], "")
    figures = {name: each.value for name, each in judged(outputs, placed, bench(), "here").figures.items()}
    # the largest logit of a, b and c: c (wrong, though a and b together are as sure), b (right), a (wrong)
    assert figures["top-1"] == pytest.approx(1 / 3)
    assert figures["top-1 of all classes"] == pytest.approx(1 / 3)  # the third is taken for d
    # how sure of what is told: y 0.35 / 0.7; of x in the third 0.5 / 0.7
    assert figures["confidence of wrong answers"] == pytest.approx((0.35 / 0.7 + 0.5 / 0.7) / 2, rel=1e-5)


def test_classes_called_by_numbers(tmp_path):
    """As ImageNet-V2 has its folders: 10 stands before 2 in the order of text."""
    folder = folder_of(tmp_path, {"1": 4, "2": 5, "10": 6})
    model = student([*INSECTS, "wasp2", "wasp3"], num_classes=12)
    measured = accuracy_of(f"accuracy:data={folder},map=numbers", model)
    assert measured.figures["top-1"].value == by_hand(folder, model, {"1": 1, "10": 10, "2": 2})
    with pytest.raises(ValueError, match="has a class '10', expected a number from 0 to 9"):
        accuracy_of(f"accuracy:data={folder},map=numbers", student(INSECTS))


def test_images_of_unknown_classes_are_left_out_on_wish(tmp_path):
    folder = folder_of(tmp_path, {"ant": 4, "bee": 4, "tractor": 5})
    model = student(INSECTS)
    with pytest.raises(ValueError, match=r"only in the data: tractor.*2 of them are known: unknown=drop leaves"):
        accuracy_of(f"accuracy:data={folder}", model)
    measured = accuracy_of(f"accuracy:data={folder},unknown=drop", model)
    assert measured.images == 8
    assert measured.details["images_of_other_classes"] == 5
    assert "does not know 1 classes, whose images are left out: tractor" in measured.details["note"]


def test_imagenet_r_among_the_thousand_classes():
    """The 200 synsets that timm lists for ImageNet-R, against a model in words and one without names."""
    info = ImageNetInfo("imagenet-1k")
    synsets = info.label_names()
    of_r = Path(timm.data.__file__).with_name("_info").joinpath("imagenet_r_synsets.txt").read_text().split()
    assert len(of_r) == 200
    expected = [synsets.index(name) for name in of_r]
    words = [info.label_name_to_description(name) for name in synsets]
    assert known_rows(of_r, words, 1000) == expected
    assert known_rows(of_r, None, 1000) == expected
    assert known_rows([*of_r[:3], "n99999999"], synsets, 1000) == [*expected[:3], None]


BAD_TABLES = {
    "unknown": (
        "ant,ant\nmoht,moth\nmoth,bee\ntick,tick\nZebra_fly,flea\n",
        "names 1 classes that .* does not have: moht",
    ),
    "a close one": ("ant,ant\nmoht,bee\nmoth,moth\ntick,tick\nZebra_fly,flea\n", "Did you mean moth"),
    "missing": ("ant,ant\nmoth,moth\n", "lacks 2 classes of .*: Zebra_fly, tick. Add them, or set unknown=drop"),
    "twice here": ("ant,ant\nant,bee\n", "has class 'ant' of the data twice, in rows 1 and 2"),
    "twice there": ("ant,bee\nmoth,bee\n", "has class 'bee' of the model twice, in rows 1 and 2"),
    "not the model's": ("ant,antt\nmoth,moth\ntick,tick\nZebra_fly,flea\n", "'antt' is close to 'ant'"),
    "columns": ("ant\n", r"row 1 has 1 columns, expected two or more: \['ant'\]"),
    "no class of the data": ("ant,ant\n,moth\n", "row 2 has 1 columns, expected two or more"),
    "twice in a row": ("ant,bee,bee\n", "has class 'bee' of the model twice, in rows 1 and 1"),
    "one of several is not the model's": (
        "ant,ant,bea\nmoth,moth\ntick,tick\nZebra_fly,flea\n",
        "'bea' is close to 'bee'",
    ),
    "empty": ("", "is empty"),
}


@pytest.mark.parametrize("mistake", BAD_TABLES)
def test_a_table_that_does_not_fit(some, tmp_path, mistake):
    text, message = BAD_TABLES[mistake]
    table = tmp_path / "map.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        accuracy_of(f"accuracy:data={some},map={table}", student(INSECTS))


def test_models_that_fit_no_classes(some):
    with pytest.raises(ValueError, match=r"model has 7 classes and the data .* has 4"):  # nobody named them
        accuracy_of(f"accuracy:data={some}", student(None, num_classes=7))
    with pytest.raises(
        ValueError, match=r"only in the data: Zebra_fly, ant, moth, tick; only in its head: 0, 1.*map=FILE"
    ):
        accuracy_of(f"accuracy:data={some},unknown=drop", student())
    with pytest.raises(ValueError, match="it gives features: judge it by knn, probe or fewshot"):
        accuracy_of(f"accuracy:data={some}", student(None, num_classes=0))
    with pytest.raises(ValueError, match=r"map .*nowhere.csv is not a file"):
        accuracy_of(f"accuracy:data={some},map=nowhere.csv", student(INSECTS))


def test_one_known_class_is_nothing_to_tell_apart(tmp_path):
    folder = folder_of(tmp_path, {"ant": 4, "lorry": 4})
    with pytest.raises(ValueError, match=r"model knows 1 of the 2 classes of .* expected two or more"):
        accuracy_of(f"accuracy:data={folder},unknown=drop", student(INSECTS))


def test_figures_worked_by_hand():
    # classes of the model: a b c; of the data: c (row 2), a (row 0). Logits are logs, so that softmax gives them back
    logits = np.log(np.array([[0.1, 0.5, 0.4], [0.45, 0.15, 0.4], [0.8, 0.1, 0.1]], dtype=np.float32))
    outputs = Outputs(logits, np.array([0, 0, 1]), np.arange(3))
    placed = Placed(np.array([2, 0]), np.arange(2), np.array([0, 1]), ["c", "a"], "")
    measured = judged(outputs, placed, bench(), "here")
    figures = {name: figure.value for name, figure in measured.figures.items()}
    # over c and a alone: 0.8 for c (right), 0.4 / 0.85 for c (wrong), 8 / 9 for a (right)
    assert figures["top-1"] == pytest.approx(2 / 3)
    assert figures["top-1 of all classes"] == pytest.approx(1 / 3)  # the first is taken for b, the second for a
    assert figures["mean of classes"] == pytest.approx((0.5 + 1) / 2)
    wrong = 0.45 / 0.85
    assert figures["confidence of wrong answers"] == pytest.approx(wrong, rel=1e-5)
    # bins of a fifteenth: 12, 7 and 13, one image each
    assert figures["error of calibration"] == pytest.approx((0.2 + wrong + 1 / 9) / 3, rel=1e-5)
    assert measured.details["cross_entropy"] == pytest.approx(-np.log([0.8, 1 - wrong, 8 / 9]).mean(), rel=1e-5)
    assert "top-5" not in figures
