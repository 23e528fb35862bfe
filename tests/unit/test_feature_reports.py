"""Reports, status and studies of runs without classes: relative error where accuracy stands, and never both as one."""

import json

import pytest

from tests.report_folder import complete_run, put
from tests.run_folder import new_recipe
from trainer.chain.following import progress
from trainer.report import write
from trainer.report.compare import comparison_page
from trainer.report.data import read_phases, run_measure
from trainer.study.figures import measure
from trainer.study.plan import Cell, Step
from trainer.tracking.measures import ACCURACY, RELATIVE_ERROR


def put_features(folder, error, errors=None, **more):
    """A phase whose final tokens came to a relative error, over its epochs {epoch: error}."""
    put(folder, {"relative_error": error, "cosine": 0.9} | more.pop("metrics", {}), **more)
    if errors:
        lines = []
        for epoch, value in errors.items():
            lines.append({"kind": "eval", "phase": "train", "epoch": epoch, "step": 5 * epoch, "relative_error": value})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path):
    """Two modules, taught and from scratch; the teacher was trained here, on labels."""
    folder = tmp_path / "features"
    put(folder / "teacher", {"accuracy": 0.97, "loss": 0.1})
    put_features(folder / "meta", 0.1, metrics={"hybrid_relative_error/0": 0.05, "hybrid_relative_error/1": 1.2})
    for module, error in enumerate((0.2, 0.3)):
        put_features(folder / f"distill_{module}", error, metrics={"hybrid_relative_error": error})
    put_features(folder / "train", 0.125, {1: 0.5, 2: 0.125}, epochs=2, flops=1e9, seconds=1.0)
    put_features(folder / "train_scratch", 0.25, {1: 0.75, 2: 0.25}, epochs=2, flops=1e9, seconds=1.0)
    told = {"knn_accuracy": 0.8, "probe_accuracy": 0.9, "teacher_knn_accuracy": 0.85, "teacher_probe_accuracy": 0.95}
    put_features(folder / "evaluate", 0.124, metrics=told)
    return folder


def cells(text, start):
    """The cells of the line of a table that starts with `start`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_tables_have_relative_errors(run):
    assert run_measure(read_phases(run)) is RELATIVE_ERROR
    text = write.write_report(run)
    assert cells(text, "meta model") == ["0.1"]
    assert cells(text, "student (phase evaluate)") == ["0.124"]
    assert cells(text, "student, k-NN accuracy in %") == ["80.0"]
    assert cells(text, "teacher, linear-probe accuracy in %") == ["95.0"]
    assert cells(text, "teacher module in the meta model") == ["0.05", "1.2"]
    assert cells(text, "student module in the meta model") == ["0.2", "0.3"]
    assert cells(text, "m2mKD")[:4] == ["-", "0.5", "0.125", "2"]
    assert "accuracy in % after" not in text


def test_the_page_says_what_it_is_and_warns_of_a_broken_hybrid(run):
    write.write_report(run)
    page = (run / "report.html").read_text()
    assert "without classes, comes to a relative error of <b>0.124</b>" in page
    # 0.124 - 0.25
    assert "0.126 below the same student trained from scratch" in page
    assert "accuracy on the student's features; 85.0% on the teacher's" in page
    assert "Relative error by epochs of end-to-end training" in page
    assert "With teacher module 1 in the meta model the final tokens have a relative error of 1.2" in page
    assert "Lower and further left is better" in page


def test_runs_are_ranked_by_less_error_and_not_against_accuracies(run, tmp_path):
    other = tmp_path / "worse"
    put_features(other / "train", 0.5, {1: 0.5}, epochs=1)
    page = comparison_page([run, other])
    assert "<b>features</b> with 0.124 relative error, 0.376 below the next" in page
    labelled = complete_run(tmp_path / "labelled")
    assert run_measure(read_phases(labelled)) is ACCURACY
    assert "no one measure says which is best" in comparison_page([run, labelled])


def test_the_status_of_a_chain_names_the_error(run):
    assert str(progress.read(run, "train")) == "relative error 0.125"
    (run / "train" / "result.json").unlink()
    assert "relative error 0.125" in str(progress.read(run, "train"))


def test_a_study_shows_the_explained_share(run):
    """1 - 0.125 at the end, 1 - 0.5 half-way; hybrids 1 - 0.05 and 1 - 1.2, the least of them -0.2."""
    recipe = new_recipe(teacher={"source": "owner/name", "head": "none"})
    names = ("meta", "distill_0", "distill_1", "train")
    cell = Cell("features", 0, recipe, tuple(map(Step, names)), run)
    found = measure(cell)
    assert found.measure is RELATIVE_ERROR
    assert found.figures["final"] == pytest.approx(0.875)
    assert found.figures["half"] == pytest.approx(0.5)
    assert found.figures["hybrid_teacher_min"] == pytest.approx(-0.2)
    assert found.figures["hybrid_student_mean"] == pytest.approx(0.75)
    assert found.figures["teacher"] is None
