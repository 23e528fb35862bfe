"""Teachers, students and results of other runs whose classes stand in another order than the data's, or are others."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from models.preprocessing import Preprocessing
from models.teacher.load import fingerprint, load_teacher, new_teacher, save_teacher
from models.vmoe.model import VMoE
from tests.unit.test_reuse import SETTINGS, donor, fill, new_run, teachers  # noqa: F401  fixtures
from trainer.report.data import PhaseRecord
from trainer.report.warnings import warnings
from trainer.teaching import hybrids, reuse, upcycling
from trainer.teaching.students import new_student, student_config
from trainer.tracking.health import against_chance

DIGITS = [str(digit) for digit in range(10)]
LIKE_THE_TEACHER = {"patch_size": 4, "width": 16, "depth": 4, "heads": 2, "mlp_dim": 24}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def saved_teacher(folder: Path, labels: list[str]) -> Path:
    torch.manual_seed(3)
    images = Preprocessing(8, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    model = new_teacher(image_size=8, patch_size=4, width=16, depth=4, heads=2, mlp_dim=24, labels=labels,
                        preprocessing=images)  # fmt: skip
    save_teacher(model, folder, images)
    return folder


@pytest.fixture
def turned(tmp_path) -> Path:
    """A teacher of the ten digits, 9 first."""
    return saved_teacher(tmp_path / "turned", DIGITS[::-1])


def test_the_rows_of_the_head_follow_the_data(turned, tmp_path, caplog):
    with torch.device("meta"):  # as where a start checks the sizes
        teacher = new_run(tmp_path / "run", turned).teacher
    as_saved = load_teacher(str(turned))
    torch.testing.assert_close(teacher.model(IMAGES), as_saved.model(IMAGES).flip(1))
    assert teacher.labels == DIGITS and teacher.model.num_classes == 10
    assert not teacher.model.head.weight.requires_grad
    run = new_run(tmp_path / "run", turned)
    with caplog.at_level(logging.INFO):
        record = run.teacher_record
    assert record["sha256"] == fingerprint(as_saved)["sha256"]  # that of the checkpoint
    assert "9, 8, 7, 6, 5 and 5 more" in record["classes"] and "0, 1, 2, 3, 4 and 5 more" in record["classes"]
    assert caplog.messages.count(record["classes"]) == 1


def test_a_head_of_more_classes_keeps_those_of_the_data(tmp_path):
    source = saved_teacher(tmp_path / "more", ["ten", *DIGITS[::-1]])
    with pytest.raises(ValueError, match=r"has 11 classes .* has 10: .*only in its head: ten.*teacher\.classes=subset"):
        _ = new_run(tmp_path / "run", source, teacher={"head": "own"}).teacher
    teacher = new_run(tmp_path / "run", source, teacher={"classes": "subset"}).teacher
    expected = load_teacher(str(source)).model(IMAGES)[:, 1:].flip(1)
    torch.testing.assert_close(teacher.model(IMAGES), expected)
    assert fingerprint(teacher)["sha256"] == fingerprint(load_teacher(str(source)))["sha256"]


def test_as_many_classes_under_other_names_are_refused_unless_asked_for(tmp_path):
    source = saved_teacher(tmp_path / "words", [f"class {digit}" for digit in DIGITS])
    with pytest.raises(ValueError, match=r"only in its head: class 0, class 1.*or set teacher\.classes=numbers"):
        _ = new_run(tmp_path / "run", source, teacher={"head": "own"}).teacher
    teacher = new_run(tmp_path / "run", source, teacher={"classes": "numbers"}).teacher
    assert torch.equal(teacher.model(IMAGES), load_teacher(str(source)).model(IMAGES))


def test_a_student_started_from_the_teacher_has_its_head_in_the_datas_order(turned, tmp_path):
    run = new_run(tmp_path / "run", turned, student=LIKE_THE_TEACHER | {"init": "teacher"})
    assert torch.equal(new_student(run).head.weight, load_teacher(str(turned)).model.head.weight.flip(0))
    start, teacher = upcycling.record(run)["student_start"], run.teacher_record
    assert start["sha256"] == teacher["sha256"] == fingerprint(load_teacher(str(turned)))["sha256"]


def test_a_student_started_from_other_classes_starts_without_their_head(turned, tmp_path, caplog):
    flowers = saved_teacher(tmp_path / "flowers", [f"flower {digit}" for digit in DIGITS])
    run = new_run(tmp_path / "run", turned, student=LIKE_THE_TEACHER | {"init": str(flowers)})
    student = new_student(run)
    assert not student.head.weight.any()  # as a V-MoE starts
    assert torch.equal(student.blocks[0].attn.qkv.weight, load_teacher(str(flowers)).model.blocks[0].attn.qkv.weight)
    assert "The student starts without its head" in caplog.text
    assert upcycling.record(run)["student_start"]["sha256"] == fingerprint(load_teacher(str(flowers)))["sha256"]


def test_a_saved_student_goes_on_in_the_datas_order(turned, tmp_path):
    run = new_run(tmp_path / "run", turned, train={"init": str(tmp_path / "model")})
    model = VMoE(student_config(run))
    model.load_state_dict(fill(model, 3))
    images = Preprocessing(8, mean=(0.1,) * 3, std=(0.9,) * 3)
    model.save_pretrained(tmp_path / "model", preprocessing=images, labels=DIGITS[::-1])
    student = reuse.initial_student(run, ep_size=1)
    assert torch.equal(student.head.weight, model.head.weight.flip(0))
    assert torch.equal(student.head.bias, model.head.bias.flip(0))
    assert "another order" in student.classes_note
    model.save_pretrained(tmp_path / "model", preprocessing=images, labels=[*DIGITS[:9], "ten"])
    with pytest.raises(ValueError, match=r"train\.init .* only in the data: 9; only in its head: ten"):
        reuse.check_student(run)


def with_classes_of(donor: Path, copy: Path, classes: object) -> Path:  # noqa: F811
    shutil.copytree(donor, copy)
    for path in copy.glob("*/result.json"):
        result = json.loads(path.read_text())
        assert result["classes"] == DIGITS
        path.write_text(json.dumps(result | {"classes": classes}))
    return copy


def test_what_was_taught_on_another_order_is_refused(donor, teachers, tmp_path, caplog):  # noqa: F811
    source = {"source": str(with_classes_of(donor, tmp_path / "turned", DIGITS[::-1]))}
    run = new_run(tmp_path / "run", teachers / "one", meta=source, distill=source)
    for check in (reuse.check_meta, reuse.check_modules):
        with pytest.raises(
            ValueError, match=r"another order: 9, 8, 7, 6, 5 and 5 more there, 0, 1, 2, 3, 4 and 5 more"
        ):
            check(run)
    older = {"source": str(with_classes_of(donor, tmp_path / "older", None))}
    reuse.check_meta(new_run(tmp_path / "run", teachers / "one", meta=older))
    assert "does not say which classes it was made on" in caplog.text


def test_chance_is_told_from_knowledge_by_the_binomial():
    # of 24 guesses among 3 classes none is right with (2/3)^24 = 6e-5, of 8 with 0.039; 12 of 24 or more with 0.068
    assert against_chance(0.0, 24, 3) == "below"
    assert against_chance(0.0, 8, 3) == "near"
    assert against_chance(0.5, 24, 3) == "near"
    assert against_chance(1.0, 24, 3) == "above"
    assert against_chance(0.0011, 50_000, 1000) == "near"
    assert against_chance(0.002, 50_000, 1000) == "above"


def test_a_teacher_far_below_chance_stops_the_run_unless_asked_for(turned, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hybrids, "evaluate", lambda *a, **k: {"accuracy": 0.0, "images": 100})
    with pytest.raises(ValueError, match=r"reaches 0\.0% on 100 .* among 10 classes reaches 10\.0%.*allow_chance=true"):
        hybrids.check_teacher(new_run(tmp_path / "run", turned), SETTINGS)
    run = new_run(tmp_path / "run", turned, teacher={"allow_chance": True})
    checked = hybrids.check_teacher(run, SETTINGS)
    assert checked.accuracy == 0 and "nothing can be learnt from it" in checked.doubt
    assert [record.levelname for record in caplog.records if record.message == checked.doubt] == ["ERROR"]
    monkeypatch.setattr(hybrids, "evaluate", lambda *a, **k: {"accuracy": 0.1, "images": 100})
    assert hybrids.check_teacher(new_run(tmp_path / "run", turned), SETTINGS).doubt
    monkeypatch.setattr(hybrids, "evaluate", lambda *a, **k: {"accuracy": 0.5, "images": 100})
    assert not hybrids.check_teacher(new_run(tmp_path / "run", turned), SETTINGS).doubt


def test_the_report_says_that_the_teacher_is_at_chance(tmp_path):
    result = {"metrics": {"teacher_accuracy": 0.0}, "health": {"teacher_at_chance": "teacher T reaches 0.0%"}}
    names = ("teacher", "meta", "train", "evaluate")
    phases = {name: PhaseRecord(tmp_path / name) for name in names}
    phases["meta"] = PhaseRecord(tmp_path / "meta", result)
    assert "No better than chance: teacher T reaches 0.0%." in warnings(phases, None)
