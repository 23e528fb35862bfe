"""python -m trainer.judge: six models of four kinds in one table, and one clear error for what cannot be judged."""

import json
import re
import subprocess
import sys

import pytest
import timm
import torch

from tests import judging
from tests.hub_server import HubServer
from tests.launch import ROOT, environment, free_port
from tests.unit import vit_families
from trainer.judge import subjects
from trainer.judge.__main__ import main
from trainer.judge.subjects import load_subject, load_subjects


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two students, a NAC, a timm ViT, a transformers ViT and a dense baseline, as they lie on a disk."""
    root = tmp_path_factory.mktemp("saved")
    for seed in (0, 1):
        judging.student(seed=seed).save_pretrained(root / f"student{seed}")
    judging.nac().save_pretrained(root / "circuit")
    dense = judging.student()
    dense.save_pretrained(root / "dense")
    of_timm = vit_families.tiny("deit3", num_classes=10)
    vit_families.save_timm(root / "of_timm", of_timm)
    vit_families.edit_config(root / "of_timm", label_names=judging.DIGITS)
    names = {"id2label": dict(enumerate(judging.DIGITS)), "label2id": {name: int(name) for name in judging.DIGITS}}
    vit_families.save_transformers(root / "teacher", "ViTForImageClassification", num_labels=10, **names)
    return root


def judged(capsys, *words):
    assert main([*map(str, words), "--json", "--no-cache", "--resamples", "100"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    assert main([*map(str, words), "--no-cache"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    return line


def test_six_models_in_one_table(saved, tmp_path, monkeypatch, capsys):
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path)
        hub.seed("alice/student", saved / "student1")
        hub.seed("timm/deit3_small_patch16_224.fb_in1k", saved / "of_timm")
        models = [saved / "student0", "alice/student", saved / "circuit", "deit3_small_patch16_224.fb_in1k",
                  saved / "teacher", saved / "dense"]  # fmt: skip
        words = [*models, "--tasks", "accuracy", "knn", "fewshot:shots=1,queries=5,episodes=20", "--data", "digits",
                 "data.limit=150", "--out", tmp_path / "out", "--resamples", "100", "--no-cache"]  # fmt: skip
        assert main(list(map(str, words))) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split() == ["student0", "student", "circuit", "deit3_small_patch16_224.fb_in1k",
                                             "teacher", "dense"]  # fmt: skip
    (top,) = [line for line in table.splitlines() if line.startswith("  top-1")]
    assert len(re.findall(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", top)) == 6
    result = json.loads((tmp_path / "out" / "judged.json").read_text())
    assert [model["kind"] for model in result["models"]] == [
        "V-MoE",
        "V-MoE",
        "NAC",
        *["VisionTransformer"] * 2,
        "V-MoE",
    ]
    assert re.fullmatch(r"alice/student@[0-9a-f]{40}", result["models"][1]["source"])
    assert result["models"][1]["parameters"] == sum(p.numel() for p in judging.student().parameters())
    accuracy, knn, fewshot = result["tasks"]
    # the same weights under two names
    assert accuracy["results"]["student0"] == accuracy["results"]["dense"]
    assert accuracy["results"]["student0"] != accuracy["results"]["student"]
    assert {len(task["results"]) for task in (accuracy, knn, fewshot)} == {6}
    page = (tmp_path / "out" / "report.html").read_text()
    for name in ("student0", "circuit", "Reliability", "5-way 1-shot, mean"):
        assert name in page


def test_a_model_is_what_its_own_code_makes_of_it(saved):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = timm.create_model(f"local-dir:{saved / 'of_timm'}", pretrained=True).eval()
    found = load_subject(str(saved / "of_timm"))
    with torch.no_grad():
        torch.testing.assert_close(found.model(images), model(images))
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(found.features(images), features)
    assert found.labels == judging.DIGITS


def test_another_resolution(saved, capsys, monkeypatch):
    seen = []
    load = subjects.load_subject
    monkeypatch.setattr(subjects, "load_subject", lambda source, size=None: seen.append(size) or load(source, size))
    tasks = ("--tasks", "knn", "knn:image_size=24", "--data", "digits", "data.limit=60")
    judged(capsys, saved / "student0", saved / "of_timm", *tasks)
    assert sorted(seen, key=str) == [24, 24, None, None]
    model = load_subject(str(saved / "student0"), 24)
    assert model.preprocessing.image_size == 24
    assert model.model(torch.zeros(1, 3, 24, 24)).shape == (1, 10)
    message = refused(capsys, saved / "circuit", "--tasks", "knn:image_size=24", "--data", "digits")
    assert "takes images of 16 pixels alone, as every NAC" in message
    message = refused(capsys, saved / "student0", "--tasks", "probe:image_size=18", "--data", "digits")
    assert "image_size 18 is no multiple of the patch size 4" in message


def test_a_run_folder_is_its_student(saved, tmp_path):
    run = tmp_path / "run"
    for phase in ("meta", "train_scratch", "train"):
        judging.student(seed=len(phase)).save_pretrained(run / phase)
        (run / phase / "result.json").write_text("{}")
    student = load_subject(str(run))
    assert student.source == str(run / "train")
    names = [subject.name for subject in load_subjects([str(run), str(run / "train_scratch")])]
    assert names == ["run", "train_scratch"]
    (run / "train" / "result.json").unlink()
    (run / "train_scratch" / "result.json").unlink()
    with pytest.raises(ValueError, match="holds no trained student, only meta: run --phase train first"):
        load_subject(str(run))


def test_what_cannot_be_judged(saved, tmp_path, capsys):
    student = saved / "student0"
    assert "evaluation 'acuracy' is not known. Did you mean accuracy" in refused(capsys, student, "--tasks", "acuracy")
    assert "has no setting 'shotss'. Did you mean shots" in refused(capsys, student, "--tasks", "fewshot:shotss=1")
    assert "the evaluation 'knn' is asked for twice" in refused(capsys, student, "--tasks", "knn", "knn")
    assert "imagenet-a:data=FOLDER" in refused(capsys, student, "--tasks", "imagenet-a")
    assert "the same model is given twice" in refused(capsys, student, student)
    assert "timm has no weights of 'vit_base_patch16_224.nobody'" in refused(capsys, "vit_base_patch16_224.nobody")
    assert "has no config.json" in refused(capsys, tmp_path)
    message = refused(capsys, student, "--tasks", "corruptions:kinds=[fog],reference=studentO")
    assert "reference is 'studentO', expected one of the models (student0) or alexnet. Did you mean student0" in message
    message = refused(capsys, student, "--tasks", "fewshot:ways=11", "--data", "digits")
    assert "has 10 classes of 35 images or more" in message
    assert "--batch is 0, expected 1 to 1,000,000" in refused(capsys, student, "--batch", "0")


def test_two_ranks_say_what_one_says(saved, tmp_path, capsys):
    """The command under torchrun; 100 images are three forwards and a rest."""
    words = [str(saved / "student0"), "--tasks", "accuracy", "knn", "fewshot:queries=2,episodes=5,shots=1",
             "--data", "digits", "data.limit=100", "--resamples", "100", "--no-cache"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(),
               "-m", "trainer.judge", *words, "--batch", "7", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    alone = judged(capsys, *words[:-3])
    two = json.loads((tmp_path / "judged.json").read_text())
    assert two["tasks"] == alone["tasks"]
    assert two["models"] == alone["models"]
