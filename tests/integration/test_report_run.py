"""The report of a real run, and its analysis on another number of ranks."""

import itertools
import json
import shutil

from tests.launch import TINY
from trainer.tracking.metrics import read_metrics


def test_a_finished_run_has_its_page(chain):
    out, _ = chain
    page = (out / "report.html").read_text()
    assert "7 of 7 phases complete" in page  # teacher, meta, two modules, train, scratch, evaluate
    for head in ("Learning curves", "Modules", "Training loss", "Load of the experts", "Routing", "Classes"):
        assert f">{head}</h2>" in page
    memory = [row["memory"] for row in read_metrics(out / "train/metrics.jsonl") if row["kind"] == "train"]
    assert min(memory) > 1e8
    # the most there ever was never falls, but for a few pages: Linux sums up its threads' counts from time to time
    assert all(later > earlier - 2**20 for earlier, later in itertools.pairwise(memory)), memory


def test_the_analysis_is_the_same_on_any_number_of_ranks(warm, chain, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(chain[0] / "train", out / "train")
    done = warm.run([*TINY, "--phase", "evaluate", "--out", out])  # one rank, expert parallel size 1
    assert done.code == 0, done.output
    alone, together = (json.loads((path / "evaluate/analysis.json").read_text()) for path in (out, chain[0]))
    result = json.loads((chain[0] / "evaluate/result.json").read_text())
    assert together["images"] == 100 and together["skipped"] == 0
    assert sum(together["classes"]["correct"]) == round(100 * result["metrics"]["accuracy"])
    assert len(together["pictures"]) == 8
    for analysis in (alone, together):
        for picture in analysis["pictures"]:
            picture["confidence"] = round(picture["confidence"], 4)
    assert alone == together


def test_a_tracker_that_is_missing_stops_before_training(warm, tmp_path):
    finished = warm.run([*TINY, "--phase", "teacher", "--out", tmp_path / "out", "run.trackers=[mlflow]"], ranks=2)
    assert finished.code == 2
    assert "pip install mlflow" in finished.output
    assert not (tmp_path / "out").exists()
