"""What benchmarks keep of a run, and the page of what was kept."""

import json
import sys

import pytest

from benchmarks import history, timing

MACHINE = {
    "device": "a machine",
    "threads": 1,
    "torch": "2.13.0",
    "matmul_float32": 1e11,
    "matmul_bfloat16": 2e11,
    "copy": 1e10,
}


def test_the_page_is_up_to_date():
    assert history.PAGE.read_text() == history.page(), "run: python benchmarks/history.py"


def test_a_page_has_a_column_for_every_run(monkeypatch, tmp_path):
    path = tmp_path / "history/second.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/step.py", "--rounds", "3", "--json", str(path)])
    timing.write(path, {"a / b": 1.25, "c / d": 0.5}, machine=MACHINE, steps=[{"seconds": 2.0}])
    kept = json.loads(path.read_text())
    assert kept["steps"] == [{"seconds": 2.0}] and kept["benchmark"] == "step"
    path.with_name("first.json").write_text(json.dumps(kept | {"date": "2026-01-01 10:00", "ratios": {"a / b": 1.0}}))

    text = history.page(path.parent)
    assert text.count("## benchmarks/step.py") == 1
    assert "`python benchmarks/step.py --rounds 3`" in text and str(path) not in text
    assert "| a / b | 1.25 | 1.00 |" in text and "| c / d | 0.50 |  |" in text
    assert text.index("1. " + kept["date"]) < text.index("2. 2026-01-01 10:00 UTC")


def test_without_a_file_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    timing.write(None, {"a / b": 1.0}, machine=MACHINE)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_something_else_is_no_run(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(KeyError, match="benchmark"):
        history.page(tmp_path)
