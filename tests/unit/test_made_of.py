"""What a run was made of: recorded when a phase begins, compared by every later phase and by a resume."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from models.files.hub import CheckpointFiles
from models.files.places import expanded
from trainer import artifacts, context, made_of, pins, writer_lock
from trainer.cli.replay import read_saved
from trainer.config.data import DataConfig
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe
from trainer.context import Run
from trainer.data.fingerprint import fingerprint
from trainer.data.sources import open_source
from trainer.distributed.ranks import Dist

ROOT = Path(__file__).resolve().parents[2]
DS_VALUES = read_ds_config(ROOT / "ds_configs/cpu_debug.json")
CLASSES = ("ant", "bee")


@pytest.fixture(autouse=True)
def quick_commit(monkeypatch):
    """Two processes of git per phase would be most of the time these tests take."""
    monkeypatch.setattr(artifacts, "git_commit", lambda: "0123abc")


@pytest.fixture(autouse=True)
def locks():
    """What a test opened and did not finish is not kept from the next."""
    yield
    writer_lock.release_all()


def picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(path)


@pytest.fixture
def pictures(tmp_path):
    """DATA/{train,validation}/{ant,bee}/*.bmp, 16 and 4 images; bmp files are all of one size."""
    root = tmp_path / "pictures"
    for split, count in (("train", 8), ("validation", 2)):
        for number, label in enumerate(CLASSES):
            for image in range(count):
                picture(root / split / label / f"{image}.bmp", 100 * number + image)
    return root


def run_on(out, pictures, *changes, ds=None, sha256="a" * 64):
    """A run on these pictures whose teacher's weights are said to have this SHA-256."""
    recipe = load_recipe(
        ROOT / "tests/fixtures/tiny.yaml",
        ["data.source=folder", f"data.path={pictures}", "teacher.source=someone/teacher", *changes],
    )
    run = Run(recipe, DS_VALUES | (ds or {}), out, Dist(0, 1, 0, 1, torch.device("cpu")), "a command")
    run.opened.once("teacher record", lambda: {"source": "someone/teacher@1", "sha256": sha256})
    return run


def finish(run, phase, module=None):
    """A result of a phase, with nothing trained."""
    folder, complete = run.open(phase, module)
    assert not complete
    result = {"phase": phase, "module": module, "metrics": {}}
    return artifacts.write_result(folder, result)


def begin(run, phase, module=None):
    """A phase that was killed after a checkpoint."""
    folder, _ = run.open(phase, module)
    (folder / "checkpoints").mkdir()
    writer_lock.release_all()
    return folder


def refusal(run, phase="distill", module=0):
    with pytest.raises(ValueError) as caught:
        run.open(phase, module)
    writer_lock.release_all()
    message = str(caught.value)
    assert "\n" not in message and "run.accept=[" in message
    return message


def test_a_result_records_what_it_was_made_of(tmp_path, pictures):
    made = finish(run_on(tmp_path, pictures), "meta")["made_of"]
    assert made["teacher"]["sha256"] == "a" * 64
    assert made["data"]["train"]["classes"] == {"ant": 8, "bee": 8}
    assert made["data"]["val"]["images"] == 4
    assert made["ds_config"]["bf16.enabled"] is False and "gradient_clipping" in made["ds_config"]
    assert made["code"] == {"sha256": made_of.code_digest(), "commit": "0123abc"}
    assert made["versions"]["torch"] and made["accepted"] == []
    assert str(tmp_path) not in json.dumps(made)


def test_a_teacher_replaced_between_two_modules(tmp_path, pictures):
    """The folder teacher.source was given other weights after meta and distill_0."""
    finish(run_on(tmp_path, pictures), "meta")
    finish(run_on(tmp_path, pictures), "distill", 0)
    message = refusal(run_on(tmp_path, pictures, sha256="b" * 64), module=1)
    assert "another teacher" in message and "a" * 12 in message and "b" * 12 in message
    assert "run.accept=[teacher]" in message


def test_a_teacher_replaced_between_kill_and_resume(tmp_path, pictures):
    begin(run_on(tmp_path, pictures), "distill", 0)
    assert "another teacher" in refusal(run_on(tmp_path, pictures, sha256="b" * 64))


def test_a_complete_result_of_another_teacher_is_not_nothing_to_do(tmp_path, pictures):
    finish(run_on(tmp_path, pictures), "meta")
    assert run_on(tmp_path, pictures, "teacher.source=/a/copy").open("meta")[1]
    refusal(run_on(tmp_path, pictures, "teacher.source=other/teacher", sha256="b" * 64), "meta", None)


def more_images(root):
    for image in range(8, 16):
        picture(root / "train/ant" / f"{image}.bmp", image)


def one_deleted(root):
    (root / "train/bee/3.bmp").unlink()


def one_moved_to_another_class(root):
    (root / "train/bee/3.bmp").rename(root / "train/ant/33.bmp")


def classes_renamed(root):
    for split in ("train", "validation"):
        (root / split / "bee").rename(root / split / "wasp")


def a_class_came(root):
    for split in ("train", "validation"):
        shutil.copytree(root / split / "bee", root / split / "wasp")


def one_file_renamed(root):
    (root / "train/bee/3.bmp").rename(root / "train/bee/3a.bmp")


def content_replaced(root):
    size = (root / "train/bee/3.bmp").stat().st_size
    picture(root / "train/bee/3.bmp", 200)
    assert (root / "train/bee/3.bmp").stat().st_size == size


def size_changed(root):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / "train/bee/3.bmp")


def two_swapped(root):
    (root / "train/ant/1.bmp").rename(root / "x")
    (root / "train/bee/1.bmp").rename(root / "train/ant/1.bmp")
    (root / "x").rename(root / "train/bee/1.bmp")


def validation_changed(root):
    picture(root / "validation/ant/7.bmp", 7)


def truncated(root):
    path = root / "train/ant/0.bmp"
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    "change, expected",
    [
        (more_images, "split train: 16 images then, 24 now (class 'ant' 8 then, 16 now)"),
        (one_deleted, "split train: 16 images then, 15 now (class 'bee' 8 then, 7 now)"),
        (one_moved_to_another_class, "class 'ant' 8 then, 9 now, class 'bee' 8 then, 7 now"),
        (classes_renamed, "class names: only then ['bee'], only now ['wasp']"),
        (a_class_came, "class names: only then [], only now ['wasp']"),
        (one_file_renamed, "split train: other files or contents"),
        (content_replaced, "split train: other files or contents"),
        (size_changed, "split train: other files or contents"),
        (two_swapped, "split train: other files or contents"),
        (truncated, "split train: other files or contents"),
        (validation_changed, "split val: 4 images then, 5 now"),
    ],
)
def test_data_that_changed(tmp_path, pictures, change, expected):
    """Between two phases, between kill and resume, and under a complete result."""
    finish(run_on(tmp_path, pictures), "meta")
    begin(run_on(tmp_path, pictures), "distill", 0)
    before = (tmp_path / "distill_0/made_of.json").read_text()
    change(pictures)
    for phase, module in (("distill", 0), ("distill", 1), ("meta", None)):
        message = refusal(run_on(tmp_path, pictures), phase, module)
        assert expected in message and "run.accept=[data]" in message
    assert (tmp_path / "distill_0/made_of.json").read_text() == before
    (tmp_path / "meta").rename(tmp_path / "away")  # by its own beginning alone
    assert expected in refusal(run_on(tmp_path, pictures))


def test_what_is_accepted_by_name_is_recorded(tmp_path, pictures, caplog):
    finish(run_on(tmp_path, pictures), "meta")
    begin(run_on(tmp_path, pictures), "distill", 0)
    more_images(pictures)
    refusal(run_on(tmp_path, pictures, "run.accept=[teacher,code]"))
    result = finish(run_on(tmp_path, pictures, "run.accept=[data]"), "distill", 0)
    assert "accepted by run.accept" in caplog.text
    assert [line.split(" was ")[0] for line in result["made_of"]["accepted"]] == [
        str(tmp_path / "meta"),
        str(tmp_path / "distill_0"),
    ]
    assert result["made_of"]["data"]["train"]["images"] == 24


def test_a_name_that_cannot_be_accepted():
    with pytest.raises(ValueError, match=r"run\.accept is 'versions', expected teacher, data, ds_config, code"):
        load_recipe(ROOT / "tests/fixtures/tiny.yaml", ["run.accept=[versions]"])


def test_where_the_data_lies_does_not_define_a_run(tmp_path, pictures, monkeypatch):
    """Every job of a chain copies the data into a scratch folder of its own, or names it by a variable."""
    out = tmp_path / "a"
    finish(run_on(out, pictures), "meta")
    copy = tmp_path / "job 2"
    shutil.copytree(pictures, copy)
    finish(run_on(out, copy), "distill", 0)
    monkeypatch.setenv("SLURM_TMPDIR", str(copy))
    finish(run_on(out, "$SLURM_TMPDIR"), "distill", 1)
    saved = yaml.safe_load((out / "distill_1/config.yaml").read_text())
    assert saved["recipe"]["data"]["path"] == "$SLURM_TMPDIR"
    out.rename(tmp_path / "b")  # and a run may move
    assert run_on(tmp_path / "b", copy).open("distill", 1)[1]
    assert read_saved(tmp_path / "b").recipe.modules == 2


def test_an_older_version_recorded_nothing(tmp_path, pictures, caplog):
    caplog.set_level("INFO")
    finish(run_on(tmp_path, pictures), "meta")
    result = json.loads((tmp_path / "meta/result.json").read_text())
    del result["made_of"]
    (tmp_path / "meta/result.json").write_text(json.dumps(result))
    (tmp_path / "meta/made_of.json").unlink()
    finish(run_on(tmp_path, pictures), "distill", 0)
    assert f"{tmp_path / 'meta'} does not record what it was made of" in caplog.text


@pytest.mark.parametrize("odd", ['{"data": {"train": 3}}', '{"data": {}}', '{"teacher": {"sha256": 5}}'])
def test_a_record_that_was_altered(tmp_path, pictures, odd):
    folder = begin(run_on(tmp_path, pictures), "distill", 0)
    (folder / "made_of.json").write_text(odd)
    with pytest.raises(ValueError, match="is truncated or altered: delete"):
        run_on(tmp_path, pictures).open("distill", 0)


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"gradient_clipping": 0.001}, '"gradient_clipping" is 0.5 then, 0.001 now'),
        ({"bf16": {"enabled": True}}, '"bf16.enabled" is False then, True now'),
        ({"communication_data_type": "bf16"}, '"communication_data_type" is absent then, bf16 now'),
    ],
)
def test_a_deepspeed_json_changed_between_kill_and_resume(tmp_path, pictures, changed, expected):
    first = {"gradient_clipping": 0.5}
    begin(run_on(tmp_path, pictures, "distill.clip=null", ds=first), "distill", 0)
    message = refusal(run_on(tmp_path, pictures, "distill.clip=null", ds=first | changed))
    assert expected in message and "run.accept=[ds_config]" in message
    saved = yaml.safe_load((tmp_path / "distill_0/config.yaml").read_text())
    assert saved["ds_config"]["gradient_clipping"] == 0.5 and "bf16" not in saved["ds_config"]


def test_config_yaml_holds_the_deepspeed_json_that_goes_on(tmp_path, pictures):
    """Topology may change between kill and resume (docs/checkpoints.md); --config repeats what ran last."""
    begin(run_on(tmp_path, pictures), "distill", 0)
    run_on(tmp_path, pictures, ds={"zero_optimization": {"stage": 2}, "steps_per_print": 3}).open("distill", 0)
    saved = read_saved(tmp_path / "distill_0/config.yaml")
    assert saved.ds_values["zero_optimization"] == {"stage": 2} and saved.ds_values["steps_per_print"] == 3


def test_each_phase_has_a_deepspeed_json_of_its_own(tmp_path, pictures):
    finish(run_on(tmp_path, pictures, "meta.clip=null", ds={"gradient_clipping": 0.5}), "meta")
    other = run_on(tmp_path, pictures, "meta.clip=null", "distill.clip=null", ds={"gradient_clipping": 1.5})
    finish(other, "distill", 0)


def test_other_code(tmp_path, pictures, monkeypatch):
    finish(run_on(tmp_path, pictures), "meta")
    monkeypatch.setattr(made_of, "code_digest", lambda: "f" * 64)
    monkeypatch.setattr(artifacts, "git_commit", lambda: "4567def")
    message = refusal(run_on(tmp_path, pictures))
    assert "commit 0123abc" in message and "4567def" in message and "run.accept=[code]" in message
    assert run_on(tmp_path, pictures).open("meta")[1]  # it is complete, whatever made it
    finish(run_on(tmp_path, pictures, "run.accept=[code]"), "distill", 0)


def test_the_digest_of_the_code_follows_what_decides_numbers(tmp_path):
    for name in ("models/a.py", "trainer/data/b.py", "trainer/report/c.py", "trainer/context.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    digest = made_of.code_digest.__wrapped__
    first = digest(tmp_path)
    (tmp_path / "trainer/report/c.py").write_text("x = 2\n")
    assert digest(tmp_path) == first
    (tmp_path / "trainer/data/b.py").write_text("x = 2\n")
    assert digest(tmp_path) != first


def test_other_packages_are_a_warning(tmp_path, pictures, monkeypatch, caplog):
    finish(run_on(tmp_path, pictures), "meta")
    versions = artifacts.versions()
    monkeypatch.setattr(artifacts, "versions", lambda: versions | {"timm": "0.1"})
    finish(run_on(tmp_path, pictures), "distill", 0)
    assert re.search(r"meta was made with other packages: timm \S+ then, 0.1 now", caplog.text)


def test_the_fingerprint_is_that_of_the_images_wherever_they_lie(tmp_path, pictures):
    data = DataConfig(source="folder", path=str(pictures))
    first = fingerprint(open_source(data, "train"))
    (tmp_path / "link").symlink_to(pictures)
    for path in (tmp_path / "link", f"{pictures}/", os.path.relpath(pictures)):
        assert fingerprint(open_source(replace(data, path=str(path)), "train")) == first
    assert fingerprint(open_source(replace(data, limit=8), "train")) != first
    assert fingerprint(open_source(data, "val")) != first


def test_data_without_files_has_a_fingerprint_too():
    found = [fingerprint(open_source(DataConfig(), split)) for split in ("train", "val")]
    assert [each["images"] for each in found] == [1437, 360]
    assert fingerprint(open_source(DataConfig(), "train")) == found[0]


@pytest.mark.parametrize("place", ["$NOWHERE/data", "${NOWHERE}/data", "$EMPTY/data"])
def test_a_variable_that_is_not_set_is_named(monkeypatch, place):
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("EMPTY", "")
    for use in (expanded, CheckpointFiles, lambda path: open_source(DataConfig(source="folder", path=path), "train")):
        with pytest.raises(ValueError, match=r"\$(NOWHERE|EMPTY) in .* is not set here"):
            use(place)


def test_variables_home_and_a_folder_with_a_dollar_in_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JOB", "7")
    monkeypatch.chdir(tmp_path)
    assert expanded("~/x${JOB}") == f"{tmp_path}/x7"
    (tmp_path / "a$JOB").mkdir()
    assert expanded("a$JOB") == "a$JOB"
    assert CheckpointFiles("a$JOB").directory == Path("a$JOB")
    with pytest.raises(ValueError, match="is not a directory"):
        CheckpointFiles("$HOME/none")


def test_a_hub_id_is_loaded_at_the_commit_it_resolved_to_first(tmp_path, monkeypatch):
    """The branch moves between two phases."""
    monkeypatch.setattr(context, "load_teacher", lambda source: loads.append(source) or model(source))
    loads = []
    commits = ["1" * 40, "2" * 40]

    def model(source):
        name, _, commit = source.partition("@")
        return SimpleNamespace(source=f"{name}@{commit or commits.pop(0)}", num_classes=10, labels=None)

    monkeypatch.setattr(context, "fingerprint", lambda teacher: {"source": teacher.source, "sha256": "a" * 64})
    monkeypatch.setattr(context, "with_classes", lambda dense, labels, match: dense)
    for module in (0, 1):
        recipe = load_recipe(ROOT / "tests/fixtures/tiny.yaml", ["teacher.source=someone/teacher"])
        run = Run(recipe, DS_VALUES, tmp_path, Dist(0, 1, 0, 1, torch.device("cpu")), "a command")
        result = finish(run, "distill", module)
        assert result["made_of"]["teacher"]["source"] == "someone/teacher@" + "1" * 40
    assert loads == ["someone/teacher", "someone/teacher@" + "1" * 40]


def test_a_data_set_of_the_hub_is_read_at_the_commit_it_resolved_to_first(tmp_path, monkeypatch):
    paths = []

    def opened(data, split):
        paths.append(data.path)
        source = open_source(DataConfig(), split)
        source.origin = f"someone/set@{'1' * 40}, configuration full"
        return source

    monkeypatch.setattr(context, "open_source", opened)
    for module in (0, 1):
        finish(run_on(tmp_path, "someone/set", "data.source=hub"), "distill", module)
    assert paths == ["someone/set"] * 2 + [f"someone/set@{'1' * 40}"] * 2


def test_the_first_writer_of_a_pin_wins(tmp_path):
    first, second = (f"a/b@{digit * 40}" for digit in "12")
    pins.pin(tmp_path, "a/b", first)
    pins.pin(tmp_path, "a/b", first)
    with pytest.raises(ValueError, match=r"a/b moved from .* start this one again"):
        pins.pin(tmp_path, "a/b", second)
    assert pins.pinned(tmp_path, "a/b") == first
    assert pins.pinned(tmp_path, "a/b@v2") == "a/b@v2"  # another revision has an entry of its own
    pins.pin(tmp_path, "/a/folder", "/a/folder")
    assert len(list((tmp_path / "sources").iterdir())) == 1


@pytest.mark.parametrize("odd", ["", "[]", "{}", '{"resolved": "a/b@main"}', '{"resolved": 3}'])
def test_a_pin_that_was_altered(tmp_path, odd):
    pins.pin(tmp_path, "a/b", "a/b@" + "1" * 40)
    next((tmp_path / "sources").iterdir()).write_text(odd)
    with pytest.raises(ValueError, match="is truncated or altered: delete it"):
        pins.pinned(tmp_path, "a/b")
