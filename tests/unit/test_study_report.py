"""The arithmetic of a study's tables, worked by hand, and its report."""

import json
import math

import pytest

from tests.unit.test_study import plan, result
from trainer.study.figures import FIGURES, collect, measure
from trainer.study.plan import read_study
from trainer.study.report import write_report
from trainer.study.statistics import at, difference, mean_curve, race, summary


def evaluations(*accuracies: float) -> list[dict]:
    """Rows after 0, 1, 2, ... epochs of 5 steps."""
    return [{"kind": "eval", "epoch": n, "step": 5 * n, "accuracy": a} for n, a in enumerate(accuracies)]


# the arithmetic of the tables


def test_mean_and_standard_deviation():
    # 1, 2, 6: mean 3, squares of what is left over 4 + 1 + 9 = 14, variance 14 / 2 = 7, error sqrt(7 / 3)
    found = summary([1.0, None, 2.0, 6.0])
    assert (found.n, found.mean) == (3, 3.0)
    assert found.std == pytest.approx(math.sqrt(7)) and found.error == pytest.approx(math.sqrt(7 / 3))
    assert (summary([4.0]).std, summary([4.0]).error) == (None, None)
    assert (summary([None]).n, summary([]).mean) == (0, None)


def test_differences_go_seed_by_seed():
    # far apart from seed to seed, but always 1 or 3 better: 1, 3 -> mean 2, variance 2, error sqrt(2 / 2) = 1
    found = difference({0: 11.0, 1: 53.0, 2: 7.0}, {0: 10.0, 1: 50.0, 2: None})
    assert (found.n, found.mean, found.error) == (2, 2.0, pytest.approx(1.0))


def test_interpolation():
    curve = [(2.0, 0.1), (4.0, 0.5), (8.0, 0.6)]
    assert [at(curve, x) for x in (2.0, 3.0, 4.0, 6.0, 8.0)] == pytest.approx([0.1, 0.3, 0.5, 0.55, 0.6])
    assert at(curve, 1.9) is None and at(curve, 8.1) is None and at([], 1.0) is None
    assert at([(2.0, 0.1)], 2.0) == 0.1


def test_a_mean_curve_has_the_seeds_that_reach_a_point():
    points = mean_curve([[(0.0, 0.2), (1.0, 0.4)], [(0.0, 0.4)]])
    assert [(x, p.n, p.mean) for x, p in points] == [(0.0, 2, pytest.approx(0.3)), (1.0, 1, 0.4)]


def test_a_race_with_a_crossing():
    # prepared at cost 2; common end 10, second half from 5. Differences of seed 0: at 2 -.2, at 4 0, at 10 +.1
    slow = [(0.0, 0.0), (10.0, 0.5)]
    ours = {0: [(2.0, -0.1), (4.0, 0.2), (10.0, 0.6)], 1: [(2.0, -0.1), (4.0, 0.2), (12.0, 0.7)]}
    found = race(ours, {0: slow, 1: slow})
    assert found.end == 10.0
    assert [x for x, _ in found.points] == [2.0, 4.0, 5.0, 10.0]
    # at 10: .6 - .5 and .2 + .5 * 6/8 - .5 = .075; mean .0875, std .0125 * sqrt 2, error .0125
    last = found.points[-1][1]
    assert (last.mean, last.error) == (pytest.approx(0.0875), pytest.approx(0.0125))
    # at 5: .2 + .4/6 - .25 = .016667 and .2 + .5/8 - .25 = .0125: mean .014583, error .002083
    assert found.ahead is True
    assert found.crossings == [pytest.approx(4.0)]


def test_a_race_is_not_won_within_two_standard_errors():
    level = {seed: [(0.0, 0.5), (10.0, 0.5)] for seed in (0, 1)}
    # ahead by .04 and .16: mean .1, error .06; then by .06 and .14: mean .1, error .04
    assert race({0: [(5.0, 0.54), (10.0, 0.54)], 1: [(5.0, 0.66), (10.0, 0.66)]}, level).ahead is False
    assert race({0: [(5.0, 0.56), (10.0, 0.56)], 1: [(5.0, 0.64), (10.0, 0.64)]}, level).ahead is True
    assert race({0: [(5.0, 0.56), (10.0, 0.56)]}, level).ahead is None  # one seed says nothing
    assert race({0: []}, level) is None


def test_a_race_is_not_won_while_it_is_prepared():
    other = {seed: [(0.0, 0.1), (10.0, 0.2)] for seed in (0, 1)}
    late, early = ({0: [(x, 0.8), (12.0, 0.9)], 1: [(x, 0.8), (12.0, 0.9)]} for x in (6.0, 5.0))
    found = race(late, other)
    assert [x for x, _ in found.points] == [6.0, 10.0]  # the common end is 10
    assert found.ahead is False
    assert race(early, other).ahead is True


# reading cells and writing the report


def test_the_figures_of_a_cell(tmp_path):
    cell = next(c for c in plan(tmp_path, seeds="[0]") if c.variant == "m2mkd")
    result(cell.folder / "teacher", {"accuracy": 0.9}, flops=7e9)
    result(cell.folder / "meta", {"accuracy": 0.8, "hybrid_accuracy/0": 0.7, "hybrid_accuracy/1": 0.5}, flops=1e9)
    result(cell.folder / "distill_0", {"hybrid_accuracy": 0.6}, flops=2e9)
    result(cell.folder / "distill_1", {"hybrid_accuracy": 0.4}, flops=3e9)
    metrics = {"accuracy": 0.85, "start_accuracy": 0.3, "start_accuracy/drop": 0.3}
    rows = evaluations(0.3, 0.5, 0.7, 0.85)
    result(cell.folder / "train", metrics, rows, flops=30e9, steps=15, epochs=3)
    found = measure(cell)
    expected = {
        "teacher": 0.9, "meta": 0.8, "hybrid_teacher_min": 0.5, "hybrid_teacher_mean": 0.6, "hybrid_student_min": 0.4,
        "hybrid_student_mean": 0.5, "start": 0.3, "start_drop": 0.3, "half": 0.6, "final": 0.85,
        "preparation_flops": 6e9, "train_flops": 30e9, "total_flops": 36e9, "ratio": 0.2, "images": 40, "seconds": 8,
    }  # fmt: skip
    assert found.figures == dict.fromkeys(FIGURES) | {key: pytest.approx(value) for key, value in expected.items()}
    # preparation, then 2 GFLOP a step
    assert found.curve == [(6e9, 0.3), (16e9, 0.5), (26e9, 0.7), (36e9, 0.85)]
    (cell.folder / "distill_1/result.json").unlink()
    found = measure(cell)
    assert [found.figures[key] for key in ("hybrid_student_min", "preparation_flops", "total_flops")] == [None] * 3
    assert found.figures["hybrid_teacher_min"] == 0.5 and found.curve == []


def test_the_report_of_a_half_finished_study(tmp_path):
    grid = plan(tmp_path)
    for cell in grid:
        seed = cell.seed
        if cell.variant == "scratch":
            rows = evaluations(0.0, 0.1, 0.2 + 0.1 * seed)
            result(cell.folder / "train_scratch", {"accuracy": 0.2 + 0.1 * seed}, rows, flops=4e9, steps=10, epochs=2)
        if cell.variant == "m2mkd":
            for name in ("meta", "distill_0", "distill_1"):
                result(cell.folder / name, {}, flops=0.5e9)
            accuracy = 0.4 + 0.2 * seed
            rows = evaluations(0.1, 0.3, accuracy)
            result(cell.folder / "train", {"accuracy": accuracy}, rows, flops=4e9, steps=10, epochs=2)
    out = tmp_path / "out"
    written = write_report(collect(read_study(tmp_path / "study_x.yaml"), grid), out)
    assert [path.name for path in written][:3] == ["study.json", "study.md", "study.html"]
    text = (out / "study.md").read_text()
    assert "| from scratch | 2 |  |  |  |  |  |  |  | 10.0 ± 0.0 | 25.0 ± 7.1 |" in text
    assert "| from scratch | 2 | 0 | 4 GFLOP | 4 GFLOP | 0.00 | 10 | 2.0 s |" in text
    assert "| m2mkd | 2 | 1.5 GFLOP | 4 GFLOP | 5.5 GFLOP | 0.38 | 40 | 8.0 s |" in text
    # at the end .4 - .2 and .6 - .3: mean 25, error 5. At cost 4: .3 + .5/2 * .1 - .2 and .3 + .5/2 * .3 - .3
    assert "| m2mkd against from scratch | 2 | +20.0 ± 0.0 | +25.0 ± 5.0 | +10.0 ± 2.5 | 4 GFLOP | yes |  |" in text
    assert "keep against m2mkd | 0 of 2 |  |  |  |  |  |  |" in text
    numbers = json.loads((out / "study.json").read_text())
    named = ", ".join(numbers["missing"][:5])
    assert numbers["missing"][0] == "scratch/seed0" and len(numbers["missing"]) == 6
    assert f"Not complete: {named} and 1 more, which study.json lists." in text
    assert numbers["variants"]["keep"]["figures"]["final"] == {"n": 0, "mean": None, "std": None, "error": None}
    page = (out / "study.html").read_text()
    assert page.count("opacity: 0.15") == 2 and "total cost, GFLOP" in page and "m2mkd (n = 2)" in page  # two bands
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")
