"""What users type, tiny and end to end: the launchers, what a run leaves behind, and single phases of it."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.launch import ROOT, TINY, environment, launch, started
from trainer.loop.step import TrainStep
from trainer.run import main
from trainer.tracking.metrics import read_metrics

PHASES = ("teacher", "meta", "distill_0", "distill_1", "train", "train_scratch")
LEARNED = {"teacher", "meta", "distill_0", "distill_1"}  # what end-to-end training starts from
# one rank and two compute the same: nothing is drawn per rank, and SGD does not blow up rounding errors as AdamW does
COMPARABLE = ["augment.mixup=0", "student.moe.noise_std=0", "distill.drop_path=0", "train.drop_path=0",
              "train.baselines=[]"]  # fmt: skip
COMPARABLE += ["student.moe.eval_capacity_factor=1"]  # 100 images do not make whole batches on 2 ranks
COMPARABLE += [f"{section}.{knob}" for section in ("teacher", "meta", "distill", "train")
               for knob in ("optimizer=sgd", "epochs=1")]  # fmt: skip


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def copied(out: Path, to: Path, phases: set[str]) -> Path:
    for phase in phases:
        shutil.copytree(out / phase, to / phase, ignore=shutil.ignore_patterns("checkpoints"))
    return to


@pytest.mark.parametrize("phase", [*PHASES, "evaluate"])
def test_result_of_every_phase(chain, phase):
    result = result_of(chain[0] / phase)
    assert result["phase"] == phase.split("_")[0]
    assert result["module"] == (int(phase[-1]) if phase.startswith("distill") else None)
    assert all(isinstance(value, float) and math.isfinite(value) for value in result["metrics"].values())
    assert {"accuracy", "loss"} <= result["metrics"].keys()
    assert result["seconds"] > 0
    steps = 0 if phase == "evaluate" else 12  # 100 images // 16 x 2 epochs
    assert (result["steps"], result["images_seen"]) == (steps, 100 if phase == "evaluate" else 12 * 16)
    assert result["world_size"] == 2
    # phase evaluate has the whole student on every rank
    assert result["ep_size"] == (1 if phase in ("teacher", "meta", "evaluate") else 2)
    assert {"python", "torch", "deepspeed", "timm"} <= result["versions"].keys()
    assert "git_commit" in result and "--phase all" in result["command"]
    assert (chain[0] / phase / "config.yaml").is_file()


def test_hybrid_accuracies_are_stored(chain):
    meta = result_of(chain[0] / "meta")["metrics"]
    for module in (0, 1):
        assert (
            result_of(chain[0] / f"distill_{module}")["metrics"]["teacher_hybrid_accuracy"]
            == (meta[f"hybrid_accuracy/{module}"])
        )
    assert meta["teacher_accuracy"] == result_of(chain[0] / "teacher")["metrics"]["accuracy"]
    assert "hybrids 0:" in chain[1]


@pytest.mark.parametrize("phase", PHASES)
def test_metrics_rows(chain, phase):
    rows = read_metrics(chain[0] / phase / "metrics.jsonl")
    train, evaluation = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    assert [row["step"] for row in train] == [4, 6, 8, 12]
    start = [(0, 0, 100)] if phase.startswith("train") else []  # end to end, the student is evaluated as assembled too
    assert [(row["epoch"], row["step"], row["images"]) for row in evaluation] == [*start, (1, 6, 100), (2, 12, 100)]
    for row in train:
        assert all(row[key] > 0 for key in ("loss", "lr", "images_per_s", "grad_norm", "time")), row
        layers = [key for key in row if key.startswith("load/")]
        assert len(layers) == {"teacher": 0, "meta": 0, "distill_0": 2, "distill_1": 2}.get(phase, 4)
        for layer in layers:
            assert sum(row[layer]) == pytest.approx(1, abs=1e-3) and len(row[layer]) == 4
            assert 0 < row[layer.replace("load/", "kept/")] <= 1
            # 1 because the gates are renormalised, less where a token was dropped
            assert 0 < row[layer.replace("load/", "gate_sum/")] <= 1 + 1e-6


def test_report(chain):
    out, output = chain
    report = (out / "report.md").read_text()
    for name in ("learning_curves.png", "hybrid_accuracy.png", "expert_load.png"):
        assert name in report
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200
    table = next(line for line in report.splitlines() if line.startswith("| m2mKD"))
    assert table in output
    assert f"{100 * result_of(out / 'train')['metrics']['accuracy']:.1f}" in table


def test_evaluate_equals_the_last_evaluation_of_train(chain, warm, tmp_path):
    """Whatever ranks and batch: 100 images divide neither by 2 x 16 nor by 3 x 12, nor a global batch of 16 by 3."""
    evaluated = result_of(chain[0] / "evaluate")["metrics"]
    last = read_metrics(chain[0] / "train/metrics.jsonl")[-1]
    assert (evaluated["accuracy"], evaluated["images"]) == (last["accuracy"], 100)
    assert evaluated["loss"] == pytest.approx(last["loss"], rel=1e-6)

    out = copied(chain[0], tmp_path / "out", {*LEARNED, "train"})
    finished = warm.run([*TINY, "--phase", "evaluate", "--out", out, "run.eval_batch=12"], ranks=3)
    assert finished.code == 0, finished.output
    on_three = result_of(out / "evaluate")
    assert (on_three["world_size"], on_three["ep_size"], on_three["metrics"]["images"]) == (3, 1, 100)
    assert on_three["metrics"]["accuracy"] == evaluated["accuracy"]
    assert on_three["metrics"]["loss"] == pytest.approx(evaluated["loss"], rel=1e-6)


def test_a_bf16_run_has_one_accuracy(chain, warm, tmp_path):
    """That of the masters which are saved, in the type it trained in; also where evaluate is started with fp32."""
    out = copied(chain[0], tmp_path / "out", {"teacher"})
    command = [*TINY, "--out", out, "train.start=scratch", "train.epochs=1", "train.warmup_epochs=0"]
    for phase, options in (("train", ["ds.bf16.enabled=true"]), ("evaluate", [])):
        finished = warm.run([*command, *options, "--phase", phase], ranks=2)
        assert finished.code == 0, finished.output
    trained, evaluated = (result_of(out / f"{phase}_scratch") for phase in ("train", "evaluate"))
    assert (trained["dtype"], evaluated["dtype"]) == ("bfloat16", "bfloat16")
    assert evaluated["metrics"]["accuracy"] == trained["metrics"]["accuracy"]
    assert evaluated["metrics"]["loss"] == pytest.approx(trained["metrics"]["loss"], rel=1e-6)
    saved = load_file(out / "train_scratch/model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in saved.values())


def test_replay_under_torchrun(chain, tmp_path):
    """`--config OUT/train/config.yaml` in another folder gives the same weights, from another launcher too."""
    out = copied(chain[0], tmp_path / "out", LEARNED)
    finished = launch("torchrun", 2, ["--config", chain[0] / "train/config.yaml", "--out", out])
    assert finished.code == 0, finished.output
    assert weights(out / "train") == weights(chain[0] / "train")
    assert result_of(out / "train")["metrics"] == result_of(chain[0] / "train")["metrics"]


def test_single_phases(chain, warm, tmp_path):
    """One module alone, then scratch alone and a baseline replayed: the weights of the chain, and nothing else made."""
    out = copied(chain[0], tmp_path / "out", {"teacher", "meta"})
    finished = warm.run([*TINY, "--phase", "distill", "--module", "1", "--out", out], ranks=2)
    assert finished.code == 0, finished.output
    finished = warm.run([*TINY, "--phase", "train", "--out", out, "train.start=scratch"], ranks=2)
    assert finished.code == 0, finished.output
    assert sorted(path.name for path in out.iterdir()) == ["distill_1", "meta", "teacher", "train_scratch"]
    for phase in ("distill_1", "train_scratch"):
        assert weights(out / phase) == weights(chain[0] / phase)

    shutil.rmtree(out / "train_scratch")
    finished = warm.run(["--config", chain[0] / "train_scratch/config.yaml", "--out", out], ranks=2)
    assert finished.code == 0, finished.output
    assert weights(out / "train_scratch") == weights(chain[0] / "train_scratch")


def test_one_rank_of_plain_python_equals_two(warm, tmp_path):
    """The whole chain, with the same token groups: weights of every phase."""
    command = [*TINY, *COMPARABLE, "--phase", "all", "--out"]
    one = launch("python", 1, [*command, tmp_path / "one"])
    two = warm.run([*command, tmp_path / "two"], ranks=2)
    assert one.code == 0, one.output
    assert two.code == 0, two.output
    for phase in PHASES[:-1]:
        mine, other = (load_file(tmp_path / folder / phase / "model.safetensors") for folder in ("one", "two"))
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert_close(value, other[name], rtol=0, atol=1e-5, msg=lambda m, n=name, p=phase: f"{p}: {n}: {m}")
    results = [result_of(tmp_path / folder / "train") for folder in ("one", "two")]
    assert [(result["world_size"], result["ep_size"]) for result in results] == [(1, 1), (2, 2)]
    # before the first end-to-end step, of every treatment of the stitches
    starts = [
        {name: value for name, value in result["metrics"].items() if name.startswith("start_accuracy")}
        for result in results
    ]
    assert starts[0].keys() == {"start_accuracy", *(f"start_accuracy/{way}" for way in ("drop", "keep", "fold"))}
    assert starts[0] == starts[1]
    # the last evaluation of phase train, experts spread or not, and phase evaluate
    accuracies = [
        result_of(tmp_path / folder / phase)["metrics"]["accuracy"]
        for folder in ("one", "two")
        for phase in ("train", "evaluate")
    ]
    assert len(set(accuracies)) == 1


def compiles_while_it_trains(*arguments: str) -> int:
    """trainer/run.py on a rank, with a function that is compiled in each of its training steps."""
    compiled = []
    step = TrainStep.run

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    def run(*args, **kwargs):
        assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1)) == 2
        return step(*args, **kwargs)

    TrainStep.run = run
    code = main(list(arguments))
    assert compiled, "torch.compile did nothing"
    return code


def test_torch_compile_works_on_the_command_line(warm, tmp_path):
    """It was switched off for the whole process once, to save a second of the start."""
    arguments = [*TINY, "teacher.epochs=1", "teacher.warmup_epochs=0", "--phase", "teacher", "--out", tmp_path / "out"]
    finished = warm.call("tests.integration.test_launchers:compiles_while_it_trains", *map(str, arguments))
    assert finished.code == 0, finished.output


def test_student_classifies_without_deepspeed(chain, tmp_path):
    """The published folder on torch alone, in an environment where importing deepspeed fails."""
    script = f"""
import sys
sys.modules["deepspeed"] = None  # any import of it raises ImportError
sys.path.insert(0, {str(ROOT)!r})
import torch
from models.vmoe import VMoE
model = VMoE.from_pretrained({str(chain[0] / "train")!r}).eval()
from trainer.data.sources import DataConfig, open_source
from trainer.data.transforms import eval_transform
source, transform = open_source(DataConfig(limit=100), "val"), eval_transform(model.preprocessing)
with torch.no_grad():
    chosen = model(torch.stack([transform(source.image(i)) for i in range(100)])).argmax(-1)
print(sum(model.labels[c] == source.labels[source.label(i)] for i, c in enumerate(chosen.tolist())))
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path,
                              env=environment(), timeout=120)  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) / 100 == result_of(chain[0] / "evaluate")["metrics"]["accuracy"]


def start_on_uneven_nodes(sizes: str) -> int:
    """Join the ranks as torchrun starts them on nodes of these sizes, and say what they agree on."""
    import models  # noqa: F401
    from trainer.distributed import ranks

    rank = int(os.environ["RANK"])
    for size in map(int, sizes.split(",")):
        if rank < size:
            os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
            break
        rank -= size
    print(f"agreed on {ranks.start().local_world}", flush=True)
    ranks.stop()
    return 0


@pytest.mark.parametrize("sizes, agreed", [("2,1", 1), ("2,2", 2)])
def test_nodes_with_different_numbers_of_ranks(warm, sizes, agreed):
    function = f"tests.integration.test_launchers:{start_on_uneven_nodes.__name__}"
    finished = warm.call(function, sizes, ranks=sum(map(int, sizes.split(","))))
    assert finished.code == 0, finished.output
    assert finished.output.count(f"agreed on {agreed}\n") >= 1


def test_a_second_start_on_the_same_out_is_refused_and_the_first_goes_on(tmp_path):
    """What two processes of an unknown launcher are, too: each takes itself for the only one."""
    arguments = [*TINY, "--phase", "teacher", "--out", tmp_path / "out", "teacher.epochs=400", "run.save_every=2"]
    with started("python", 1, arguments) as first:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out/teacher/checkpoints/latest.json").is_file():
            assert time.monotonic() < deadline and first.process.poll() is None, first.log.read_text()
            time.sleep(0.1)
        second = launch("python", 1, arguments)
        assert second.code == 2 and "is being written by" in second.output and str(first.process.pid) in second.output
        assert first.process.poll() is None
        first.kill()
        assert (tmp_path / "out/teacher/writer.json").is_file()  # of a process that is gone: taken over
    with started("python", 1, arguments) as third:
        while "was left by" not in third.log.read_text():
            assert third.process.poll() is None, third.log.read_text()
            time.sleep(0.1)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_of_mpi_do_not_train_alone(tmp_path, rank):
    """mpiexec -n 2 of MPICH, without an address where they could meet."""
    command = [sys.executable, ROOT / "trainer/run.py", *TINY, "--phase", "teacher", "--out", tmp_path / "out"]
    finished = subprocess.run(command, env=environment() | {"PMI_RANK": rank, "PMI_SIZE": "2"}, capture_output=True,
                              text=True, timeout=60)  # fmt: skip
    assert finished.returncode == 2 and f"process {rank} of 2 (PMI_RANK, PMI_SIZE)" in finished.stderr
    assert not (tmp_path / "out").exists()
