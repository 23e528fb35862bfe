"""report.html: complete, self-contained and safe, also of runs that are unfinished, damaged or hostile."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from tests.report_folder import RECIPE, analysed_run, analysis, complete_run, put
from trainer.report import __main__, drawing, write
from trainer.report.data import read_phases
from trainer.report.run_page import run_page

VOID = {"meta", "img", "br", "wbr"}  # without an end tag


class Page(HTMLParser):
    """Text and attributes of a page; fails on tags that are not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.tags = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def all_text(self):
        return " ".join("".join(self.text).split())


@pytest.fixture(autouse=True, scope="module")
def drawn_once():
    """Each chart is drawn once: hundreds of spoiled runs share most of theirs."""
    drawn: dict[str, str] = {}

    def svg(chart, draw=drawing.svg):
        key = repr(chart)
        if key not in drawn:
            drawn[key] = draw(chart)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "svg", svg)
        yield


def page(run):
    return Page(run_page("demo", read_phases(run)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return page(analysed_run(tmp_path_factory.mktemp("run")))


@pytest.fixture
def quick(monkeypatch):
    """write_report without the pictures of report.md, which take seconds."""
    monkeypatch.setattr(write, "_draw", lambda run_dir, phases: {})


def test_summary_says_what_was_taught_and_how_it_compares(whole):
    text = whole.all_text
    assert "8 of 8 phases complete" in text
    # 0.8749 of the evaluation, not 0.875 of the training; 0.8749 / 0.9616 = 0.9098; 0.8749 - 0.6 and - 0.7
    assert (
        "A V-MoE (4 blocks, 2 experts, 1 per token) taught on the embedded digits by a small teacher trained here "
        "reaches 87.5% accuracy, 91% of its teacher's 96.2%. That is 27.5 points above the same student trained from "
        "scratch for as many epochs, and 17.5 points above it at the same total cost." in text
    )
    # FLOPs 1 + 2 + 3 + 4 = 10e12; seconds 10.4 + 20 + 30 + 40 = 100.4 on 2 ranks: 200.8 / 3600 h
    assert "Cost10 TFLOP" in text and "Time1 min 40 sfor the same on 2 processes: 0.056 process hours" in text
    assert "Look at this first" not in text


def test_every_section_is_there(whole):
    heads = [attributes["id"] for tag, attributes in whole.tags if tag == "h2"]
    assert heads == ["phases", "learning-curves", "modules", "training-loss", "load-of-the-experts", "routing",
                     "classes", "environment"]  # fmt: skip
    links = [attributes["href"] for tag, attributes in whole.tags if tag == "a"]
    assert links == [f"#{head}" for head in heads]
    captions = [tag for tag, _ in whole.tags].count("figcaption")
    assert captions == [tag for tag, _ in whole.tags].count("figure") >= 6


def test_nothing_is_loaded_from_elsewhere(whole):
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in whole.tags}
    for tag, attributes in whole.tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href"):
                assert value.startswith(("data:image/png;base64,", "#")), (tag, value[:60])
    (policy,) = (attributes["content"] for _, attributes in whole.tags if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    style = "".join(whole.text)
    assert "url(data:image/png;base64," in style
    assert not re.search(r"url\((?!data:)|@import|https?://", style)


def test_routing_maps_hold_the_expert_of_every_patch(whole):
    maps = [attributes["src"] for tag, attributes in whole.tags if tag == "img"]
    first, second = (Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) for uri in maps)
    blue, orange, black = (0, 114, 178), (230, 159, 0), (0, 0, 0)  # experts 0 and 1, dropped
    assert [first.getpixel((x, y)) for y in (0, 1) for x in (0, 1)] == [blue, orange, orange, black]
    assert [second.getpixel((x, y)) for y in (0, 1) for x in (0, 1)] == [orange, orange, blue, blue]
    assert "bee, taken for cat 50.0% sure" in whole.all_text.replace("cat50", "cat 50")
    assert "dropped: every expert it chose was full" in whole.all_text


def test_classes_and_confusion(whole):
    text = whole.all_text
    # the hardest first: bee 1 of 4, cat 1 of 2, ant 4 of 4
    assert re.search(r"bee25\.0%4cat \(2 times\)cat50\.0%2ant \(1 time\)ant100\.0%4–", text)
    # rows from the top: 4 ants right, 1 bee taken for an ant, 1 right and 2 taken for a cat, 1 cat for an ant, 1 right
    assert "ant bee cat predicted ant bee cat true class 4 1 1 2 1 1" in text


def test_many_classes_show_the_ends_and_the_confusions(tmp_path):
    count = 1000
    names = [f"class {i}" for i in range(count)]
    classes = {"images": [10] * count, "correct": [i % 11 for i in range(count)], "predicted": [10] * count,
               "taken_for": [0] * count, "taken_count": [3] * count}  # fmt: skip
    run = analysed_run(tmp_path, labels=names, classes=classes, confusion=None, confusions=[[7, 3, 9]] * 50)
    found = page(run)
    rows = [tag for tag, _ in found.tags].count("tr")
    assert "The 20 hardest classes" in found.all_text and "The 10 easiest" in found.all_text
    assert "Half of the classes reach 50.0% or more, a tenth stays below 10.0%." in found.all_text
    assert "class 7class 3990.0%" in found.all_text and rows < 120
    assert len(run_page("demo", read_phases(run))) < 200_000


def test_names_of_the_run_cannot_break_the_page(tmp_path):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    picture = analysis()["pictures"][0] | {"label": 0, "png": 'x)}body{}"></style>'}
    run = analysed_run(tmp_path, labels=[evil, "bee", "cat"], pictures=[picture])
    recipe = RECIPE | {"data": {"source": "hub", "path": evil}, "teacher": {"source": evil}}
    (run / "train" / "config.yaml").write_text(json.dumps({"recipe": recipe, evil: evil}))
    result = json.loads((run / "train" / "result.json").read_text())
    result |= {"command": evil, "git_commit": evil, "device": evil, "versions": {evil: evil}}
    (run / "train" / "result.json").write_text(json.dumps(result))
    with (run / "train" / "events.jsonl").open("w") as file:
        file.write(json.dumps({"event": evil, "step": evil}) + "\n")
    with (run / "train" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "warning", "epoch": 1, "step": 9, "message": evil, f"kept/{evil}": 0.1}) + "\n")
        file.write(json.dumps({"kind": "train", "epoch": 1, "step": 9, f"load/{evil}": [0.5, 0.5]}) + "\n")
    found = Page(run_page(evil, read_phases(run)))
    assert found.all_text.count("alert(1)") >= 8
    test_nothing_is_loaded_from_elsewhere(found)
    assert "body{}" not in run_page("demo", read_phases(run))


def spoil(value):
    """The same JSON with one value after another replaced by what does not belong there."""
    yield from (None, "text", [], -1)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from ({**value, key: broken} for broken in spoil(inner))
            yield {k: v for k, v in value.items() if k != key}
    elif isinstance(value, list) and value:
        yield from ([broken, *value[1:]] for broken in spoil(value[0]))


@pytest.mark.parametrize("name", ["evaluate/analysis.json", "train/result.json", "meta/result.json"])
def test_a_spoiled_file_never_stops_the_page(tmp_path, name):
    run = analysed_run(tmp_path)
    whole = json.loads((run / name).read_text())
    cases = list(spoil(whole))
    assert len(cases) > 40
    for case in cases:
        (run / name).write_text(json.dumps(case))
        assert "phases complete" in run_page("demo", read_phases(run))


@pytest.mark.parametrize("key", ["kind", "epoch", "step", "loss", "lr", "load/10", "accuracy"])
def test_a_spoiled_row_never_stops_the_page(tmp_path, key):
    run = analysed_run(tmp_path)
    lines = (run / "train" / "metrics.jsonl").read_text().splitlines()
    for wrong in (None, "text", [], {}, -1, 1e400, [0.5], ["x", 1]):
        rows = [json.loads(lines[0]) | {key: wrong}, *map(json.loads, lines[1:])]
        (run / "train" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert "87.5%" in run_page("demo", read_phases(run))


def test_a_damaged_run_is_reported_with_what_is_damaged(tmp_path, quick):
    run = analysed_run(tmp_path)
    for name in ("train/metrics.jsonl", "meta/result.json", "evaluate/analysis.json", "train/config.yaml"):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole[:10] + b"\x00\xff\n" + whole[10 : len(whole) // 2])
    write.write_report(run)
    text = Page((run / "report.html").read_text()).all_text
    for name in ("train/metrics.jsonl: ", "meta/result.json", "evaluate/analysis.json", "train/config.yaml"):
        assert f"Damaged: {name}" in text
    assert "87.5%" in text and "damaged" in text


def test_an_unfinished_run_has_a_page(tmp_path, quick):
    put(tmp_path / "train", None, {1: 0.5, 2: 0.55}, loads=[[1.0, 0.0]] * 3)
    (tmp_path / "train" / "config.yaml").write_text(json.dumps({"recipe": RECIPE | {"train": {"baselines": []}}}))
    write.write_report(tmp_path)
    text = Page((tmp_path / "report.html").read_text()).all_text
    assert "0 of 4 phases complete" in text and "The student is not trained to the end yet." in text
    assert "Not finished: train (step 10), last accuracy 55.0% after epoch 2." in text
    assert "Not there yet: teacher, meta, evaluate." in text
    assert "Dead experts" in text and "10 expert 1 in train" in text


def test_an_empty_phase_has_a_page(tmp_path):
    (tmp_path / "teacher").mkdir()
    assert "unfinished (nothing logged)" in page(tmp_path).all_text


def test_comparison(tmp_path, quick, capsys):
    first, second = complete_run(tmp_path / "a" / "run"), analysed_run(tmp_path / "b" / "run")
    (first / "evaluate" / "result.json").unlink()  # 0.875 of its training counts then
    (first / "train" / "config.yaml").write_text(json.dumps({"recipe": RECIPE | {"seed": 1}}))
    __main__.main([str(first), str(second)])
    assert str(first / "comparison.html") in capsys.readouterr().out
    found = Page((first / "comparison.html").read_text())
    assert "The best student is that of a/run with 87.5%, 0.0 points above the next." in found.all_text
    assert "a/runb/run" in found.all_text and "seed10" in found.all_text and "modules22" not in found.all_text
    assert "10 TFLOP10 TFLOP" in found.all_text
    assert not [value for _, found_in in found.tags for key, value in found_in.items() if key == "src"]


def test_the_same_folder_twice_is_an_error(tmp_path, quick, capsys):
    run = complete_run(tmp_path / "run")
    with pytest.raises(SystemExit):
        __main__.main([str(run), str(run)])
    assert "the same folder is given twice" in capsys.readouterr().err
