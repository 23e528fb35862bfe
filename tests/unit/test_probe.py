"""Phase probe: which head a teacher gets, features that are computed once, and what the fitted head becomes."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.preprocessing import Preprocessing
from models.teacher.classes import feature_width, with_probe
from models.teacher.load import Teacher, fingerprint, load_teacher
from tests.report_folder import complete_run, put
from tests.unit import vit_families
from tests.unit.checkpoint_ranks import run_ranks
from tests.unit.test_class_order import LIKE_THE_TEACHER, saved_teacher
from tests.unit.test_reuse import new_run
from tests.unit.vit_families import every_family
from trainer import heads, made_of
from trainer.config.data import DataConfig
from trainer.config.phases import TeacherConfig
from trainer.context import Run
from trainer.data.decode import UnreadableImageError
from trainer.data.sources import DigitsSource
from trainer.distributed.interrupt import Interrupted
from trainer.hub import card
from trainer.phases import probe
from trainer.report.data import read_phases, teacher_accuracy, teacher_head
from trainer.report.write import write_report
from trainer.teaching import features, upcycling
from trainer.teaching.students import new_student
from trainer.teaching.teachers import before_the_probe

IMAGES = 100
PREPROCESSING = Preprocessing(8, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
PLACES = {"device": torch.device("cpu"), "dtype": torch.float32}


# --- which head


def head_of(labels, *, head="auto", classes="names", data=("cat", "dog", "owl"), named=True, num_classes=None):
    """The kind of head and why, for a teacher with these labels (None: it has no names)."""
    count = len(labels) if num_classes is None else num_classes
    teacher = SimpleNamespace(labels=labels, num_classes=count, source="a/b")
    images = SimpleNamespace(labels=list(data), named=named, name="pictures")
    found = heads.head_of(teacher, TeacherConfig(source="a/b", head=head, classes=classes), images)
    return found.kind, found.why, found.match.rows if found.match else None


NUMBERS = [str(number) for number in range(3)]
THOUSAND = [str(number) for number in range(1000)]


@pytest.mark.parametrize(
    "given, kind, why",
    [
        ({"labels": ["cat", "dog", "owl"]}, "own", "has the data's classes"),
        ({"labels": ["owl", "dog", "cat"]}, "own", "in another order"),
        ({"labels": ["owl", "ant", "dog", "cat"]}, "own", "rows of the data's 3 are kept: cat, dog, owl"),
        ({"labels": None, "num_classes": 3}, "own", "class i of the data is taken to be row i of the head"),
        ({"labels": ["fox", "ant", "bee"]}, "probe", "a/b has other classes than the data"),
        ({"labels": ["owl", "ant", "dog"]}, "probe", "a/b has other classes than the data"),
        ({"labels": None, "num_classes": 1000}, "probe", "has 1000 classes and the data (pictures) has 3"),
        # numbers as names say nothing of which three of the thousand they are
        ({"labels": THOUSAND, "data": NUMBERS, "named": False}, "probe", "has 1000 classes"),
        ({"labels": None, "num_classes": 1000, "data": NUMBERS}, "probe", "has 1000 classes"),
        ({"labels": None, "num_classes": 1000, "data": sorted(THOUSAND[:12])}, "probe", "has 1000 classes"),
        ({"labels": None, "num_classes": 1000, "data": ["n01440764", "n02102040"]}, "own", "the data's 2 are kept"),
        ({"labels": None, "num_classes": 0}, "probe", "a/b has no head"),
        ({"labels": None, "num_classes": 0, "data": []}, "none", "the images of pictures have no labels"),
        ({"labels": ["cat", "dog", "owl"], "head": "probe"}, "probe", "teacher.head=probe"),
        ({"labels": ["cat", "dog", "owl"], "head": "none"}, "none", "teacher.head=none"),
        ({"labels": ["owl", "dog", "cat"], "head": "own"}, "own", "in another order"),
    ],
)  # fmt: skip
def test_the_head_that_is_taken_and_why(given, kind, why):
    found, reason, rows = head_of(**given)
    assert found == kind and why in reason
    if kind == "own":
        data = given.get("data", ["cat", "dog", "owl"])
        assert len(rows) == len(data)
        assert not given["labels"] or [given["labels"][row] for row in rows] == list(data)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"labels": None, "num_classes": 0, "head": "own"}, "no head of its own.*set teacher.head=probe"),
        ({"labels": None, "num_classes": 0, "classes": "subset"}, "no head of its own.*teacher.classes=names"),
        ({"labels": ["fox", "ant", "bee"], "head": "own"}, "only in its head: fox.*or teacher.head=probe"),
        ({"labels": ["fox", "ant"], "classes": "numbers"}, "needs as many.*or teacher.head=probe"),
        ({"labels": None, "num_classes": 0, "head": "probe", "data": []}, "needs labels, and the images of pictures"),
        ({"labels": ["cat"], "head": "own", "data": []}, "needs labels, and the images of pictures"),
    ],
)
def test_heads_that_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        head_of(**given)


@pytest.mark.parametrize(
    "knobs, said",
    [
        ({"head": "probe"}, "teacher.head is 'probe', expected auto, own or none without teacher.source"),
        ({"source": "a/b", "head": "probe", "classes": "subset"}, "expected auto or own with teacher.classes=subset"),
        ({"finetune_epochs": 1}, "teacher.finetune_epochs is 1, expected 0 without a probe"),
        ({"source": "a/b", "head": "own", "finetune_epochs": 1}, "expected 0 without a probe"),
        ({"source": "a/b", "finetune_epochs": 1, "warmup_epochs": 2}, "0 to teacher.finetune_epochs=1"),
    ],
)
def test_knobs_that_contradict_each_other(knobs, said):
    with pytest.raises(ValueError, match=said):
        TeacherConfig(**knobs)


# --- features


class Counting:
    """A stand-in of a teacher: two features of an image; counts the images it is shown, and can be made to fail."""

    def __init__(self, *, dies_at=None, nan_at=None):
        self.shown = 0
        self.dies_at = dies_at
        self.nan_at = nan_at

    def __call__(self, images):
        self.shown += len(images)
        if self.dies_at is not None and self.shown > self.dies_at:
            raise KeyboardInterrupt  # nothing after it runs: as after a kill
        found = torch.stack([images.mean((1, 2, 3)), images.amax((1, 2, 3))], 1)
        if self.nan_at is not None and self.shown > self.nan_at:
            found[-1, 1] = float("nan")
        return found


class Agreement:
    """Interruption for ranks that are threads."""

    warned = False

    def __init__(self, dist, done):
        self.dist = dist

    def agreed(self, done, failed=False):
        if any(self.dist.gather(failed)):
            return "failed"
        return "warned" if self.warned else ""


@pytest.fixture(autouse=True)
def agreement(monkeypatch):
    monkeypatch.setattr(features, "Interruption", Agreement)
    monkeypatch.setattr(Agreement, "warned", False)


def digits(**config) -> DigitsSource:
    return DigitsSource(DataConfig(limit=IMAGES, **config), "train")


def compute(source, folder, world=1, batch=16, teachers=None):
    """What compute returned, or raised, on each rank."""
    teachers = teachers or [Counting() for _ in range(world)]

    def work(dist):
        return features.compute(
            teachers[dist.rank],
            source,
            PREPROCESSING,
            folder,
            dist,
            dtype=torch.float32,
            batch=batch,
            workers=0,
            description="probe",
        )

    return run_ranks(world, work)


def test_shards_cover_every_image_whatever_their_number():
    for images in (1, 31, 32, 33, 2048, 2049, 10_000, 1_281_167):
        made = features.shards(images)
        assert [place for shard in made[:2] for place in shard] == list(range(min(images, 2 * len(made[0]))))
        assert sum(map(len, made)) == images and made[-1].stop == images
        assert len(made[0]) <= features.LARGEST


@pytest.mark.parametrize("world, batch", [(2, 16), (3, 16), (3, 7), (5, 100)])
def test_any_number_of_ranks_gives_the_same_features(tmp_path, world, batch):
    source = digits()
    assert compute(source, tmp_path / "one") == [IMAGES]
    assert compute(source, tmp_path / "many", world, batch) == [IMAGES] * world
    one, many = (features.read(source, tmp_path / name) for name in ("one", "many"))
    assert torch.equal(one.features, many.features) and torch.equal(one.labels, many.labels)
    assert one.labels.tolist() == source.targets.tolist() and one.features.shape == (IMAGES, 2)


def test_a_start_after_a_kill_computes_what_is_missing_alone(tmp_path):
    source = digits()
    killed = Counting(dies_at=70)
    with pytest.raises(KeyboardInterrupt):
        features.compute(
            killed,
            source,
            PREPROCESSING,
            tmp_path,
            new_run(tmp_path, tmp_path).dist,
            dtype=torch.float32,
            batch=16,
            workers=0,
            description="probe",
        )
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(kept) == 2  # of 32 images each
    (tmp_path / "00000064-00000096.safetensors.tmp").write_bytes(b"half of a shard")
    teachers = [Counting() for _ in range(3)]
    assert compute(source, tmp_path, world=3, teachers=teachers) == [IMAGES - 64] * 3
    assert sum(teacher.shown for teacher in teachers) == IMAGES - 64
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    teachers = [Counting()]
    assert compute(source, tmp_path, teachers=teachers) == [0] and not teachers[0].shown
    compute(source, tmp_path / "whole")
    assert torch.equal(features.read(source, tmp_path).features, features.read(source, tmp_path / "whole").features)


def test_a_warning_stops_all_ranks_and_whole_shards_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(Agreement, "warned", True)
    stopped = compute(digits(), tmp_path, world=2, batch=32)
    assert all(isinstance(each, Interrupted) for each in stopped)
    assert "the same command continues" in str(stopped[0])
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_features_that_are_not_finite_are_refused_on_all_ranks(tmp_path):
    refused = compute(digits(), tmp_path, world=2, teachers=[Counting(), Counting(nan_at=0)])
    for each in refused:
        assert isinstance(each, ValueError)
        assert "features of image 47 of" in str(each) and "not finite" in str(each)  # the last of its first batch
    for path in tmp_path.glob("*.safetensors"):
        assert torch.isfinite(load_file(path)["features"]).all()


def test_images_that_cannot_be_read_are_left_out(tmp_path, monkeypatch):
    source = digits(skip_unreadable=True)
    read = DigitsSource._read

    def unreadable(self, row):
        if row == source.rows[40]:
            raise UnreadableImageError("row 40 is damaged")
        return read(self, row)

    monkeypatch.setattr(DigitsSource, "_read", unreadable)
    compute(source, tmp_path, world=2)
    found = features.read(source, tmp_path)
    assert found.labels.tolist() == np.delete(source.targets, 40).tolist()
    assert len(found.features) == IMAGES - 1


def test_a_damaged_shard_is_named(tmp_path):
    source = digits()
    compute(source, tmp_path)
    damaged = tmp_path / "00000032-00000064.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"00000032-00000064.*delete it and run --phase probe again"):
        features.read(source, tmp_path)


# --- the head


@every_family
def test_the_head_of_every_family_reads_what_was_fitted(family):
    """A distilled DeiT has two heads, SigLIP pools by attention, DINOv2 has none."""
    model = vit_families.tiny(family)
    images = vit_families.images()
    read = model.forward_head(model.forward_features(images), pre_logits=True)
    teacher = Teacher(model, PREPROCESSING, "a/b", None, model.num_classes)
    assert feature_width(teacher) == read.shape[1]
    draws = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(7, read.shape[1], generator=draws), torch.randn(7, generator=draws)
    labels = [f"class {number}" for number in range(7)]
    before = fingerprint(teacher)["sha256"]
    teacher.as_saved = {"head.weight": torch.zeros(3, 3)}  # of a head whose rows were put into another order
    probed = with_probe(teacher, weight, bias, labels)
    torch.testing.assert_close(probed.model(images), read @ weight.T + bias)
    assert probed.labels == labels and probed.num_classes == probed.model.num_classes == 7
    first = fingerprint(probed)["sha256"]
    assert len({before, first, fingerprint(with_probe(probed, weight + 1, bias, labels))["sha256"]}) == 3


# --- the phase


@pytest.fixture
def other_classes(tmp_path):
    """A teacher of four flowers; the data has ten digits."""
    return saved_teacher(tmp_path / "flowers", [f"flower {number}" for number in range(4)])


def probed_run(out, source, limit=120, **sections):
    run = new_run(out, source, data={"limit": limit}, **sections)
    probe.check(before_the_probe(run))
    probe.run(run)
    return new_run(out, source, data={"limit": limit}, **sections)


def test_the_teacher_goes_on_as_an_ordinary_classifier(other_classes, tmp_path):
    run = probed_run(tmp_path / "run", other_classes)
    result = json.loads((run.out / "probe/result.json").read_text())
    teacher = run.teacher
    assert teacher.labels == run.labels == result["classes"] and teacher.num_classes == 10
    checkpoint = load_teacher(str(other_classes)).model
    images = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    saved = load_file(run.out / "probe/model.safetensors")
    read = checkpoint.forward_head(checkpoint.forward_features(images), pre_logits=True)
    torch.testing.assert_close(teacher.model(images), read @ saved["head.weight"].T + saved["head.bias"])
    assert "has 4 classes and the data" in result["head"]["why"] and result["head"]["kind"] == "probe"
    assert result["teacher"] == run.teacher_record and result["metrics"]["accuracy"] > 0.15
    assert result["flops"] > 0 and result["images_seen"] == 240
    logits = []
    for index in range(len(run.sources[1])):
        kept = features.read(run.sources[1], run.out / "probe/features/val").features[index]
        logits.append(kept @ saved["head.weight"].T + saved["head.bias"])
    correct = torch.stack(logits).argmax(1) == torch.from_numpy(np.asarray(run.sources[1].targets))
    assert result["metrics"]["accuracy"] == pytest.approx(float(correct.float().mean()))


def test_a_student_started_from_the_teacher_has_the_probe_as_its_head(other_classes, tmp_path):
    student = LIKE_THE_TEACHER | {"init": "teacher"}
    run = probed_run(tmp_path / "run", other_classes, student=student)
    saved = load_file(run.out / "probe/model.safetensors")
    assert torch.equal(new_student(run).head.weight, saved["head.weight"])
    assert upcycling.record(run)["student_start"]["sha256"] == run.teacher_record["sha256"]


def test_a_complete_probe_is_not_made_again(other_classes, tmp_path, monkeypatch):
    run = probed_run(tmp_path / "run", other_classes)
    monkeypatch.setattr(features, "compute", lambda *_, **__: pytest.fail("computed twice"))
    monkeypatch.setattr(probe, "fit_linear", lambda *_, **__: pytest.fail("fitted twice"))
    probe.run(run)


def test_one_probe_is_told_from_another(other_classes, tmp_path):
    one = probed_run(tmp_path / "one", other_classes).teacher_record
    other = probed_run(tmp_path / "other", other_classes, limit=110).teacher_record
    again = probed_run(tmp_path / "again", other_classes).teacher_record
    assert one == again and one["sha256"] != other["sha256"]


def test_a_checkpoint_that_was_replaced_after_its_probe_is_refused(other_classes, tmp_path):
    source = shutil.copytree(other_classes, tmp_path / "source")
    run = probed_run(tmp_path / "run", source)
    other = load_file(source / "model.safetensors")
    other["vit.embeddings.cls_token"].add_(1.0)
    save_file(other, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="was made with another teacher"):
        new_run(run.out, source, data={"limit": 120}).open("meta")
    with pytest.raises(ValueError, match="was made with another teacher"):
        new_run(run.out, source, data={"limit": 120}).open("probe")


def test_a_head_that_fits_needs_no_probe(tmp_path, caplog):
    source = saved_teacher(tmp_path / "digits", [str(digit) for digit in range(10)])
    knobs = {"finetune_epochs": 2}
    run = new_run(tmp_path / "run", source, teacher=knobs)
    before = run.teacher_record
    probe.run(run)
    assert "teacher.finetune_epochs=2 has no effect" in caplog.text
    result = json.loads((run.out / "probe/result.json").read_text())
    assert result["head"] == {"kind": "own", "why": f"teacher {source} has the data's classes"}
    assert not (run.out / "probe/features").exists() and result["flops"] == 0
    assert new_run(tmp_path / "run", source, teacher=knobs).teacher_record == before
    assert new_run(tmp_path / "unprobed", source, teacher=knobs).teacher_record == before  # nothing waits for the phase


def test_a_missing_probe_names_its_phase(other_classes, tmp_path):
    with pytest.raises(ValueError, match=r"has 4 classes .* which does not exist: run --phase probe --out"):
        _ = new_run(tmp_path / "run", other_classes).teacher


def test_a_plan_has_a_blank_head(other_classes, tmp_path):
    run = before_the_probe(new_run(tmp_path / "run", other_classes))
    assert run.teacher.num_classes == 10 and not run.teacher.model.head.weight.any()
    assert "phase probe fits a head of the data's 10 classes" in run.teacher.classes_note
    assert load_teacher(str(other_classes)).num_classes == run.checkpoint.num_classes == 4  # which stays as it is
    found = probe.rehearse(run, None, {})
    assert "40 images through the teacher once; 16 features of each" in found.text
    assert found.costs["probe"].images == 40 and found.files == 40 * 16 * 4
    assert found.costs["probe"].flops == 40 * (patch_flops() + 4 * block_flops())
    # as torch counts what the phase runs of one image
    model = run.teacher.model
    image = torch.zeros(1, 3, *model.patch_embed.img_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.forward_head(model.forward_features(image), pre_logits=True)
    assert found.costs["probe"].flops == 40 * counter.get_total_flops()


def patch_flops() -> int:
    """Of the embedding of 4 patches of 48 numbers into width 16."""
    return 2 * 4 * 48 * 16


def block_flops() -> int:
    """Of a block of width 16, 5 tokens, an MLP of 24."""
    products = 16 * 48 + 16 * 16 + 2 * 16 * 24
    return 2 * 5 * products + 2 * 2 * 5 * 5 * 16


def test_a_class_with_one_image_is_refused(other_classes, tmp_path):
    run = before_the_probe(new_run(tmp_path / "run", other_classes, data={"limit": 11}))
    with pytest.raises(ValueError, match=r"two training images of every class.*give more images of them"):
        probe.check(run)


def test_a_run_that_goes_on_with_other_weights_does_not_mix_features(other_classes, tmp_path):
    """Killed between its features and its end; the checkpoint then changes."""
    source = shutil.copytree(other_classes, tmp_path / "source")
    run = probed_run(tmp_path / "run", source)
    (run.out / "probe/result.json").unlink()
    assert made_of.read(run.out / "probe")["checkpoint"]["sha256"]
    replaced = saved_teacher(tmp_path / "other", [f"flower {number}" for number in range(5)])
    shutil.rmtree(source)
    shutil.copytree(replaced, source)
    with pytest.raises(ValueError, match="was made with another teacher"):
        new_run(run.out, source, data={"limit": 120}).open("probe")


def test_ranks_do_not_change_the_classifier(other_classes, tmp_path):
    """On any number of ranks: the same features in the same order, so the same fit."""
    whole = probed_run(tmp_path / "one", other_classes)
    run = new_run(tmp_path / "three", other_classes, data={"limit": 120}, run={"eval_batch": 4})
    teacher = run.take_checkpoint().model
    sources = run.sources  # opened once: ranks are processes, and these threads share one run

    def work(dist):
        for source, name in zip(sources, ("train", "val")):
            features.compute(
                lambda images: teacher.forward_head(teacher.forward_features(images), pre_logits=True),
                source,
                run.data_for(PREPROCESSING).preprocessing,
                tmp_path / "three" / name,
                dist,
                dtype=torch.float32,
                batch=4,
                workers=0,
                description="probe",
            )

    assert run_ranks(3, work) == [None, None, None]
    kept = features.read(whole.sources[0], whole.out / "probe/features/train")
    torch.testing.assert_close(features.read(run.sources[0], tmp_path / "three/train").features, kept.features)


class Begun(Exception):
    """Training would begin here."""


def test_tuning_starts_from_the_checkpoints_own_numbers(other_classes, tmp_path, monkeypatch):
    """Not from those that the features were computed with, in bf16."""
    knobs = {"finetune_epochs": 1, "global_batch": 4, "drop_path": 0.1}
    run = new_run(tmp_path / "run", other_classes, data={"limit": 120}, teacher=knobs)
    run = replace(run, ds_values={"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}})
    started = {}

    def train(run, objective, data, schedule, settings, *_, **__):
        started.update(objective.module.state_dict())
        assert (schedule.epochs, settings.global_batch) == (1, 4)
        assert all(parameter.requires_grad for parameter in objective.module.parameters())
        raise Begun

    monkeypatch.setattr(Run, "train", train)
    with pytest.raises(Begun):
        probe.run(run)
    checkpoint = load_teacher(str(other_classes)).model.state_dict()
    assert started.keys() == checkpoint.keys()
    for name, value in checkpoint.items():
        assert name.startswith("head") or torch.equal(started[name], value), name
    assert len(started["head.weight"]) == 10


def test_a_plan_says_what_tuning_costs(other_classes, tmp_path):
    knobs = {"finetune_epochs": 2, "global_batch": 4}
    alone = probe.rehearse(before_the_probe(new_run(tmp_path / "a", other_classes)), None, {}).costs["probe"]
    run = new_run(tmp_path / "b", other_classes, teacher=knobs)
    run = before_the_probe(replace(run, ds_values={"zero_optimization": {"stage": 1}}))
    tuned = probe.rehearse(run, None, {})
    assert tuned.costs["probe"].images == alone.images + 2 * 20 and tuned.parameters > 0
    assert "then 10 steps of 4 images" in tuned.text
    per_image = (tuned.costs["probe"].flops - alone.flops) / 40
    # forward and backward, with the head; images take no gradient
    assert per_image == 3 * (alone.flops / 40 + 2 * 16 * 10) - patch_flops()


# --- what people read


def test_the_report_says_which_head_was_taken(tmp_path):
    complete_run(tmp_path)
    assert teacher_head(read_phases(tmp_path)) == ""  # a teacher that was trained here
    shutil.rmtree(tmp_path / "teacher")
    head = {"kind": "probe", "why": "teacher a/b has no head"}
    put(tmp_path / "probe", {"accuracy": 0.75, "held_out_accuracy": 0.625}, head=head)
    phases = read_phases(tmp_path)
    said = "Head of the teacher: a probe of its features (teacher a/b has no head), 62.5% on held-out training images"
    assert teacher_head(phases) == f"{said}, 75.0% on validation images."
    assert teacher_accuracy(phases) == 0.75
    write_report(tmp_path)
    assert said in (tmp_path / "report.md").read_text() and said in (tmp_path / "report.html").read_text()
    shutil.rmtree(tmp_path / "probe")
    tuned = {"accuracy": 0.875, "probe_accuracy": 0.75, "held_out_accuracy": 0.625}
    put(tmp_path / "probe", tuned, head=head, epochs=3)
    ending = "75.0% on validation images; after 3 epochs of fine-tuning, 87.5% on validation images."
    assert teacher_head(read_phases(tmp_path)).endswith(ending)
    shutil.rmtree(tmp_path / "probe")
    put(tmp_path / "probe", {}, head={"kind": "own", "why": "teacher a/b has the data's classes"})
    phases = read_phases(tmp_path)
    assert teacher_head(phases) == "Head of the teacher: own (teacher a/b has the data's classes)."
    assert teacher_accuracy(phases) == 0.5  # as phase meta measured it


def test_the_model_card_says_that_the_head_is_a_probe():
    record = SimpleNamespace(result={"head": {"kind": "probe"}, "epochs": 0})
    assert "linear classifier fitted to its features" in card._probe({"probe": record})
    record.result["epochs"] = 3
    assert "fine-tuned with it for 3 epochs" in card._probe({"probe": record})
    record.result["head"]["kind"] = "own"
    assert card._probe({"probe": record}) == card._probe({}) == ""
