"""The report against run folders whose numbers are worked out by hand in the comments."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report_folder import analysed_run, complete_run, put
from trainer.report import __main__, write
from trainer.report.data import read_phases
from trainer.report.run_page import accuracy_charts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """A complete run of two modules."""
    return complete_run(tmp_path)


def cells(text, start):
    """The cells of the line of a table that starts with `start`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_table_of_a_complete_run(run):
    text = write.write_report(run)
    assert cells(text, "teacher") == ["96.2"]
    assert cells(text, "meta model") == ["80.0"]
    assert cells(text, "student (phase evaluate)") == ["87.5"]
    assert cells(text, "teacher module in the meta model") == ["91.0", "92.5"]
    assert cells(text, "student module in the meta model") == ["70.0", "62.5"]
    # FLOPs: 1 + 2 (meta) + 3 + 4 (distill) = 10e12, the teacher's 9e15 not; seconds: 10.4 + 20 + 30 + 40
    assert cells(text, "m2mKD") == ["50.0", "75.0", "87.5", "4", "1.00e+12", "1.00e+13", "10", "100"]
    assert cells(text, "scratch") == ["20.0", "40.0", "60.0", "10", "2.50e+12", "2.50e+12", "25", "25"]
    # 25% of 40 epochs is epoch 10, the first evaluation came at epoch 20
    assert cells(text, "scratch, equal total cost") == ["-", "65.0", "70.0", "40", "1.00e+13", "1.00e+13", "99", "99"]
    assert "scratch: at 25% of 10 epochs stands the accuracy after epoch 2." in text
    assert "scratch: at 50% of 10 epochs stands the accuracy after epoch 4." in text
    assert "m2mKD: at" not in text and "Missing" not in text and "Not finished" not in text


def test_report_file_names_pictures_commands_and_versions(run):
    (run / "train" / "config.yaml").write_text("phase: train\n")
    text = write.write_report(run)
    page = (run / "report.md").read_text()
    assert text in page
    for picture in ("learning_curves.png", "hybrid_accuracy.png", "expert_load.png"):
        assert f"]({picture})" in page
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert "    python trainer/run.py --recipe recipes/demo.yaml\n" in page
    assert page.endswith("Versions: torch 2.13.0.\n")
    origin = page[page.index("## How it was made") :]
    assert cells(origin, "train") == [
        "done",
        "10.4",
        "100",
        "1.00e+12",
        "2",
        "1",
        "abc1234",
        "train/config.yaml",
    ]


def test_missing_and_unfinished_phases(tmp_path):
    put(tmp_path / "meta", {"accuracy": 0.8, "teacher_accuracy": 0.95, "hybrid_accuracy/1": 0.9})
    put(tmp_path / "distill_0", {"hybrid_accuracy": 0.7, "teacher_hybrid_accuracy": 0.85}, flops=3e12, seconds=30.0)
    put(tmp_path / "train", None, {1: 0.5, 2: 0.55})
    put(tmp_path / "train_scratch")
    text = write.write_report(tmp_path)
    assert cells(text, "teacher") == ["95.0"]  # a hub teacher: measured by meta, without a phase of its own
    assert cells(text, "teacher module in the meta model") == ["85.0", "90.0"]
    assert cells(text, "student module in the meta model") == ["70.0", "-"]
    assert cells(text, "m2mKD") == ["-"] * 8
    assert "Missing phases: distill_1, train_scratch_equal_cost, evaluate." in text
    assert "Not finished: train, unfinished (step 10), last accuracy 55.0% after epoch 2." in text
    assert "Not finished: train_scratch, unfinished (nothing logged)." in text


def test_no_total_without_every_distill_phase(run):
    (run / "distill_0" / "result.json").unlink()
    row = cells(write.write_report(run), "m2mKD")
    assert row[4:] == ["1.00e+12", "-", "10", "-"]


def test_train_alone_has_a_report(tmp_path):
    put(tmp_path / "train", {"accuracy": 0.5}, {1: 0.5}, flops=1e9, seconds=1.0, epochs=1)
    text = write.write_report(tmp_path)
    assert cells(text, "m2mKD") == ["-", "-", "50.0", "1", "1.00e+09", "-", "1", "-"]
    assert not (tmp_path / "expert_load.png").exists() and not (tmp_path / "hybrid_accuracy.png").exists()


def test_an_upcycled_run_is_shown_where_there_is_one(run):
    assert "upcycled" not in write.write_report(run)
    put(run / "train_upcycled", {"accuracy": 0.75}, {1: 0.5, 2: 0.75}, flops=4e12, seconds=8.0, epochs=2)
    text = write.write_report(run)
    assert cells(text, "upcycled") == ["-", "50.0", "75.0", "2", "4.00e+12", "4.00e+12", "8", "8"]
    assert "upcycled" in (run / "report.html").read_text()


def test_a_run_of_no_epochs_has_a_report(tmp_path):
    put(tmp_path / "train_scratch", {"accuracy": 0.1}, {0: 0.1})  # assembled and evaluated only
    assert cells(write.write_report(tmp_path), "scratch")[:4] == ["10.0", "10.0", "10.0", "0"]


def test_learning_curves_start_after_the_preparation(run):
    by_epochs, by_cost = accuracy_charts(read_phases(run))
    # 9e12 of preparation, then 1e12 over 4 epochs; the rivals begin at 0: 2.5e12 over 10 epochs, 1e13 over 40
    assert by_cost.x_label == "TFLOP" and (by_cost.beginning.end, by_cost.beginning.colour) == (9.0, 0)
    assert [line.points[0] for line in by_cost.lines] == [(9.0, 0.1), (0.5, 0.2), (5.0, 0.65)]
    assert by_epochs.lines[1].points == [(2, 0.2), (4, 0.4), (6, 0.5), (10, 0.6)]  # the last one from the result
    assert by_epochs.levels == by_cost.levels == [("teacher", 0.9616)]


def test_loads_are_in_network_order_and_relative_to_uniform(run):
    record = read_phases(run)["train"]
    assert list(record.loads()) == ["9", "10"]
    assert record.loads()["10"] == [(1, [1.0, 1.0]), (2, [1.5, 0.5])]


def test_rows_with_non_finite_numbers_are_left_out(tmp_path):
    put(tmp_path / "train", {"accuracy": 0.5}, {1: None, 2: 0.5}, epochs=2, loads=[[None, 0.5], [0.25, 0.75]])
    record = read_phases(tmp_path)["train"]
    assert record.curve() == {2: 0.5}
    assert record.loads()["10"] == [(2, [0.5, 1.5])]
    write.write_report(tmp_path)


def test_needs_neither_torch_nor_matplotlib(run):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'torch', 'deepspeed']));"
        "from trainer.report.__main__ import main; main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout, "m2mKD")[2] == "87.5"
    assert "No pictures: matplotlib is not installed" in done.stdout
    assert "No pictures" in (run / "report.md").read_text() and "](" not in (run / "report.md").read_text()
    page = (run / "report.html").read_text()
    assert page.count("No pictures: matplotlib is not installed") == 1 and "<svg" not in page
    assert "Meta model with one module replaced" not in page and ">module replaced</th>" in page


def test_a_folder_that_is_no_run_is_an_error_for_people(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main([str(tmp_path)])
    assert stop.value.code == 2
    assert "holds no phase of a run: expected folders such as teacher, meta" in capsys.readouterr().err


def test_a_broken_result_is_named_and_the_rest_is_shown(run):
    (run / "meta" / "result.json").write_text('{"phase": ')
    text = write.write_report(run)
    assert "Damaged: meta/result.json cannot be read" in text
    assert cells(text, "meta model") == ["-"] and cells(text, "m2mKD")[2] == "87.5"


def test_only_phases_the_recipe_asks_for_are_missed(run):
    for name in ("train_scratch", "train_scratch_equal_cost", "evaluate"):
        shutil.rmtree(run / name)
    recipe = "recipe: {teacher: {source: ''}, train: {baselines: [scratch]}}\n"
    (run / "train" / "config.yaml").write_text(recipe)
    assert "Missing phases: train_scratch, evaluate." in write.write_report(run)


def test_routing_measures_and_collapsed_routers_are_in_both_reports(tmp_path):
    layers = {"blocks.1.mlp": {"load": [0.5, 0.5], "first": [0.95, 0.05], "kept": 1.0}}
    run = analysed_run(tmp_path, layers=layers)
    for name, measures in (("distill_0", {"routing_change": 0.125, "expert_similarity": 0.4567}),
                           ("distill_1", {"expert_similarity": 1.0})):  # fmt: skip
        path = run / name / "result.json"
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"metrics": result["metrics"] | measures}))
    warned = {
        "kind": "warning",
        "phase": "train",
        "epoch": 4,
        "step": 20,
        "message": "layer x: not one validation token",
    }
    with (run / "train" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(warned) + "\n")
    text = write.write_report(run)
    page = (run / "report.html").read_text()
    assert cells(text, "distill_0") == ["12.5", "0.457"] and cells(text, "distill_1") == ["-", "1.000"]
    assert all(cell in page for cell in (">12.5%</td>", ">0.457</td>", ">1.000</td>"))
    collapsed = "block 1: first choices go to experts 0, 1 of 2, 95% to one (entropy 0.29)"
    for shown in (text, page):
        assert f"Collapsed routers on the validation images: {collapsed}" in shown
        assert "Said during train: layer x: not one validation token." in shown
