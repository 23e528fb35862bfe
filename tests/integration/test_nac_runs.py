"""NAC on real ranks: the chain, kill and resume, evaluation on 1 and 2 ranks, all modules at once, ZeRO-2 in bf16."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from models.nac import NAC
from tests.hub_server import WRITER, HubServer
from tests.launch import ROOT
from trainer.api import load_results

NAC_RUN = [
    "--ds_config",
    str(ROOT / "ds_configs/cpu_debug.json"),
    "--recipe",
    str(ROOT / "tests/fixtures/tiny_nac.yaml"),
]
PHASES = ("distill_0", "distill_1", "distill_2", "train")


@pytest.fixture(scope="module")
def made(warm, tmp_path_factory):
    """OUT of an undisturbed run on two ranks."""
    out = tmp_path_factory.mktemp("nac") / "out"
    finished = warm.run([*NAC_RUN, "--phase", "all", "--out", out], ranks=2)
    assert finished.code == 0, finished.output
    return out


def digest(out, phase):
    return hashlib.sha256((out / phase / "model.safetensors").read_bytes()).hexdigest()


def test_the_chain_makes_a_nac_of_its_modules(made):
    results = load_results(made)
    assert results.keys() == {"teacher", "meta", *PHASES, "evaluate"}
    student = NAC.from_pretrained(made / "train")
    assert student.config.graph == "ring-of-cliques" and len(student.labels) == 10
    assert results["train"]["ep_size"] == 1
    learned = load_file(made / "distill_1" / "model.safetensors")
    # codes of the modules are drawn once and saved; the kernels stay with the NAC
    assert learned["code"].shape == (1, 8) and not any("bandwidth" in name for name in learned)
    assert {"post.weight", "tokenizer.grid", "state"} <= load_file(made / "distill_0" / "model.safetensors").keys()
    analysis = json.loads((made / "evaluate/analysis.json").read_text())
    assert analysis["smaller"].keys() == {"50%", "25%", "10%"} and len(analysis["circuit"]["use"][0]) == 8
    rows = results["evaluate"]["inference"]["rows"]
    forms = ["all mediators (trained)", "50% of the mediators", "25% of the mediators", "10% of the mediators"]
    assert [row["name"] for row in rows] == [*(f"student, {form}" for form in forms), "dense teacher"]
    measured = [results["evaluate"]["metrics"]["accuracy"], *analysis["smaller"].values()]
    assert [row["accuracy"] for row in rows[:4]] == measured
    text = (made / "report.html").read_text()
    assert "Accuracy by mediators kept" in text and "ring-of-cliques graph of" in text
    assert "A NAC (circuit started from a ring-of-cliques graph)" in text


def test_the_same_number_on_one_rank_and_twice(made, warm, tmp_path):
    out = shutil.copytree(made, tmp_path / "out")
    numbers = [load_results(out)["evaluate"]["metrics"]]
    for ranks in (1, 2):
        finished = warm.run([*NAC_RUN, "--phase", "evaluate", "--out", out], ranks=ranks)
        assert finished.code == 0, finished.output
        numbers.append(load_results(out)["evaluate"]["metrics"])
    assert numbers[0] == numbers[1] == numbers[2]


def test_killed_and_resumed_it_ends_with_the_same_bits(made, warm, tmp_path):
    out = tmp_path / "out"
    for phase in ("teacher", "meta", "distill_0", "distill_2"):
        shutil.copytree(made / phase, out / phase)
    for phase, words in (("distill_1", ["distill", "--module", "1"]), ("train", ["train"])):
        command = [*NAC_RUN, "--phase", *words, "--out", out]
        latest = out / phase / "checkpoints/latest.json"
        killed = warm.run(command, ranks=2, kill_when=latest.exists)
        assert killed.code == -9 and not (out / phase / "result.json").exists()
        finished = warm.run(command, ranks=2)
        assert finished.code == 0 and "resumed after step" in finished.output, finished.output
        assert digest(out, phase) == digest(made, phase), phase


def test_pushed_and_pulled(made, warm, tmp_path, monkeypatch):
    out = shutil.copytree(made, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoints"))
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path / "home")
        words = [*NAC_RUN, "--phase", "push", "hub.repo=alice/nac", "--out", str(out)]
        call = "tests.integration.test_push:main_with_hub"
        done = warm.call(call, server.url, str(tmp_path / "home"), WRITER, words, ranks=1)
        assert done.code == 0, done.output
        images = torch.randn(2, 3, 16, 16)
        assert torch.equal(NAC.from_pretrained("alice/nac")(images), NAC.from_pretrained(out / "train")(images))
        files = server.files("alice/nac")
    card = files["README.md"].decode()
    assert "from m2mkd.nac import NAC" in card and "m2mkd predict images --model alice/nac" in card
    assert "| student, 50% of the mediators |" in card and files["circuit.png"].startswith(b"\x89PNG")


def test_all_modules_at_once_with_borders_under_zero_2_in_bf16(made, warm, tmp_path):
    out = tmp_path / "out"
    for phase in ("teacher", "meta"):
        shutil.copytree(made / phase, out / phase)
    words = ["student.nac.read_in=tokens", "distill.border=mse", "distill.logit_weight=0", "distill.epochs=0"]
    words += ["refine.epochs=1", "refine.order=together", "refine.global_batch=16", "refine.lr=0.01", "train.epochs=1"]
    words += [
        "student.nac.mediator=one",
        "ds.zero_optimization.stage=2",
        "ds.bf16.enabled=true",
        "run.accept=[ds_config]",
    ]
    finished = warm.run([*NAC_RUN, "--phase", "all", "--out", out, *words], ranks=2)
    assert finished.code == 0, finished.output
    results = load_results(out)
    assert {result["evaluation"] for result in results.values()} == {"deterministic"}
    assert results["train"]["dtype"] == "bfloat16" and results["refine_1"]["metrics"].keys() >= {"hybrid_accuracy"}
    mediator = load_file(out / "refine_1" / "model.safetensors")  # one layer for both propagators
    assert {name.split(".")[1] for name in mediator if name.startswith("layers.")} == {"0"}
    assert load_file(out / "refine_0" / "model.safetensors")["state"].shape == (1, 5, 16)  # 2 x 2 patches and a class
    assert json.loads((out / "train/config.json").read_text())["model_type"] == "nac"
