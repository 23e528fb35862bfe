"""Detectors in the reports: their figures side by side, finished or not, beside a student and alone."""

import re

import pytest

from tests.report_folder import analysed_run, put_detector
from tests.unit.test_report import cells
from trainer.report import write
from trainer.report.charts import legend
from trainer.report.data import read_phases
from trainer.report.detectors import detector_charts, detector_section, detectors_of
from trainer.report.warnings import expected

FIRST = {"ap": 0.125, "ap50": 0.25, "ap75": 0.0625, "ar": 0.3, "ap/disc": 0.25, "ap/a <b>": 0.0, "images": 5}
LAST = {"ap": 0.1875, "ap50": 0.375, "ap75": 0.125, "ar": 0.4, "ap/disc": 0.375, "ap/a <b>": 0.0, "images": 5}
MASKS = {"mask_ap": 0.0625, "mask_ap50": 0.125, "mask_ap75": 0.0, "mask_ar": 0.2, "mask_ap/disc": 0.125}


@pytest.fixture
def run(tmp_path):
    """A complete run with a finished detector, and one from scratch with masks that is at its first epoch."""
    analysed_run(tmp_path)
    put_detector(tmp_path / "detect", {1: FIRST, 2: LAST}, {})
    put_detector(tmp_path / "detect_scratch", {1: FIRST | MASKS}, {"freeze": True}, done=False)
    return tmp_path


def test_figures_side_by_side_in_the_text(run):
    text = write.write_report(run)
    assert cells(text, "detectors, in %") == ["detect", "detect_scratch"]
    assert cells(text, "boxes: AP") == ["18.8", "12.5"]  # the unfinished one: of its last evaluation
    assert cells(text, "boxes: AP50") == ["37.5", "25.0"]
    assert cells(text, "boxes: AP75") == ["12.5", "6.2"]
    assert cells(text, "boxes: AR") == ["40.0", "30.0"]
    assert cells(text, "boxes: AP of disc") == ["37.5", "25.0"]
    assert cells(text, "masks: AP") == ["-", "6.2"]
    assert cells(text, "masks: AP of disc") == ["-", "12.5"]
    assert cells(text, "m2mKD")[2] == "87.5"  # the student's tables stay
    assert "Not finished: detect_scratch, unfinished (step 5), last AP 12.5% after epoch 1." in text
    assert (run / "detector_ap.png").read_bytes().startswith(b"\x89PNG")
    assert "](detector_ap.png)" in (run / "report.md").read_text()


def test_charts_go_over_the_epochs_of_every_detector(run):
    boxes, masks = detector_charts(detectors_of(read_phases(run)))
    assert [line.points for line in boxes.lines] == [[(1, 0.125), (2, 0.1875)], [(1, 0.125)]]
    assert [name for name, _ in legend(boxes)] == ["detect", "detect_scratch"]
    assert [(line.name, line.points) for line in masks.lines] == [("detect_scratch", [(1, 0.0625)])]


def test_the_page_says_what_each_detector_is(run):
    write.write_report(run)
    page = (run / "report.html").read_text()
    section = detector_section(read_phases(run))
    assert section and section in page
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in section.split("</tr>")]
    assert ["backbone", "student, m2mKD", "student, scratch"] in rows
    assert ["trained", "all of it", "heads alone"] in rows
    assert ["validation images", "5", "5"] in rows
    assert ["boxes: AP of a &lt;b&gt;", "0.0%", "0.0%"] in rows  # a name of a data set cannot break the page
    assert "<span>Detector</span><b>18.8%</b>" in page and "Detector scratch" not in page  # not finished
    assert "Detectors: training loss" in page and "The same for detect</summary>" in page
    # its row among the phases does not pass for an accuracy
    assert re.search(r">detect</td><td[^>]*><span class=\"done\">done</span></td><td[^>]*>AP 18.8%<", page)


def test_detectors_alone(tmp_path):
    put_detector(tmp_path / "detect", {1: FIRST, 2: LAST}, {"backbone": "timm/vit_<x>", "scratch": True})
    text = write.write_report(tmp_path)
    assert text.startswith("| detectors, in %") and "teacher" not in text and "Missing" not in text
    page = (tmp_path / "report.html").read_text()
    assert "A detector on <b>timm/vit_&lt;x&gt;</b> comes to <b>18.8%</b> AP of boxes." in page
    assert "1 of 1 phases complete" in page and "backbone started anew, all of it" in page


def test_one_that_the_recipe_asks_for_is_missed(tmp_path):
    analysed_run(tmp_path)
    assert "detect" not in read_phases(tmp_path)
    config = tmp_path / "train" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace('"modules"', '"detect": {"epochs": 2, "backbone": ""}, "modules"'))
    assert expected(read_phases(tmp_path))[-1] == "detect"
    assert "Missing phases: detect." in write.write_report(tmp_path)
    # a NAC has no maps, so --phase all trains no detector on it
    config.write_text(config.read_text().replace('"student": {', '"student": {"kind": "nac", '))
    assert "detect" not in read_phases(tmp_path)


def test_runs_compared(tmp_path):
    taught, frozen = tmp_path / "taught", tmp_path / "frozen"
    put_detector(taught / "detect", {1: FIRST, 2: LAST}, {"backbone": "a"})
    put_detector(frozen / "detect", {2: FIRST}, {"backbone": "b"})
    page = write.write_comparison([frozen, taught]).read_text()
    assert "The best detector is that of <b>taught</b> with 18.8% AP of boxes." in page
    assert re.search(r"AP of detect</td><td[^>]*>12.5%</td><td[^>]*>18.8%<", page)
