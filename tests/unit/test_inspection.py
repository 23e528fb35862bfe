"""inspect says what is there and finds every kind of damage; export makes a usual model of a checkpoint."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.moe.layer import MoEConfig
from models.vmoe.model import VMoE, VMoEConfig
from tests.unit.checkpoint_ranks import SHAPES, run_ranks, save, saver, state_at, without_deepspeed
from trainer import artifacts
from trainer.checkpoint.inspection import Damaged, export, inspect

MODEL = VMoEConfig(image_size=16, patch_size=8, width=8, depth=2, heads=2, mlp_dim=12, num_classes=3, moe_blocks="1",
                   moe=MoEConfig(num_experts=2, k=1), seed=4)  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run: an unfinished phase with two checkpoints, 17 parameters and 2 elements of a buffer, and a finished one."""
    without_deepspeed(monkeypatch)
    out = tmp_path / "run"

    def work(dist):
        made = saver(dist, out / "meta")
        save(made, 3, score=0.25)
        save(made, 6)
        made.close()

    assert run_ranks(2, work) == [None, None]
    (out / "meta/config.yaml").write_text("phase: meta\n")
    (out / "distill_0").mkdir()
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, out / "distill_0/model.safetensors")
    result = {"phase": "distill", "metrics": {"accuracy": 0.5}, "steps": 12, "epochs": 2, "world_size": 2}
    artifacts.write_result(out / "distill_0", result)
    return out


def test_a_checkpoint(run):
    folder = run / "meta/checkpoints/step_00000003"
    text = inspect(folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
    assert text.splitlines() == [
        f"{folder}: checkpoint, whole",
        "  meta after step 3, score 0.25",
        "  saved by 2 ranks, ep 1, ZeRO 1, fp32, global batch 8 = 4 x 1 x 2",
        "  4 tensors, 20 parameters, as exp_avg, exp_avg_sq, fp32, state",
        f"  4 files, {size:,} bytes",
    ]


def test_a_run_a_phase_and_its_checkpoints(run):
    text = inspect(run)
    assert [line for line in text.splitlines() if not line.startswith(" ")] == [
        f"{run}/distill_0: artifact, whole",
        f"{run}/meta: unfinished (no result.json)",
        f"{run}/meta/checkpoints: in force step_00000006",
        f"{run}/meta/checkpoints/step_00000003: checkpoint, whole",
        f"{run}/meta/checkpoints/step_00000006: checkpoint, whole",
    ]
    assert "accuracy 0.5" in text and "2 tensors, 10 parameters, BF16, F32" in text
    assert inspect(run / "meta") in text and inspect(run / "meta/checkpoints") in text
    assert inspect(run / "distill_0") in text


def test_a_save_that_was_not_finished_is_no_damage(run):
    (run / "meta/checkpoints/step_00000009").mkdir()
    assert "step_00000009: a save that was not finished" in inspect(run / "meta")


@pytest.mark.parametrize(
    "name",
    ["meta/checkpoints/step_00000006/rank_00001.safetensors", "meta/checkpoints/step_00000003/rank_00000.json",
     "meta/checkpoints/step_00000006/manifest.json", "meta/checkpoints/latest.json", "distill_0/model.safetensors",
     "distill_0/result.json"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_damage_is_named_after_all_that_is_whole(run, name, how):
    path = run / name
    whole = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif path.name in ("latest.json", "result.json"):
        inspect(run)  # without them nothing is in force, or finished: no damage
        return
    with pytest.raises(Damaged, match="damaged in") as caught:
        inspect(run)
    text = caught.value.text
    assert re.search(f"DAMAGED: {re.escape(str(path))}.*(truncated|incomplete|missing)", text), text
    assert f"{run}/meta/checkpoints/step_0000000" in text and "whole" in text
    assert f" damaged in {run}: DAMAGED: " in str(caught.value)


def test_latest_of_a_checkpoint_that_is_gone(run):
    (run / "meta/checkpoints/latest.json").write_text('{"tag": "step_00000007"}')
    with pytest.raises(ValueError, match="names step_00000007, which does not exist"):
        inspect(run)


@pytest.mark.parametrize("name", ["", "nowhere", "file"])
def test_nothing_to_inspect(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=f"nothing to inspect at {re.escape(str((tmp_path / name).resolve()))}"):
        inspect(tmp_path / name)


def test_export_of_any_checkpoint(run, tmp_path):
    """The newest that is whole, or the one asked for; masters and buffers under their names, in shape."""
    line = export(run / "meta/checkpoints/step_00000003", tmp_path / "three")
    assert "meta after step 3, 4 tensors" in line
    for folder, step in (("three", 3), ("six", 6)):
        if folder == "six":
            export(run / "meta", tmp_path / folder)
        weights = load_file(tmp_path / folder / "model.safetensors")
        assert weights.keys() == SHAPES.keys()
        for (kind, name), values in state_at(step).items():
            if kind in ("fp32", "state"):
                assert torch.equal(weights[name], values.view(SHAPES[name])) and weights[name].dtype == values.dtype
    path = run / "meta/checkpoints/step_00000006/rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    export(run / "meta", tmp_path / "whole")
    whole = load_file(tmp_path / "whole/model.safetensors")
    assert torch.equal(whole["head.weight"].flatten(), state_at(3)["fp32", "head.weight"])


def test_what_export_refuses(run, tmp_path, monkeypatch):
    path = run / "meta/checkpoints/step_00000006/rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        export(run / "meta/checkpoints/step_00000006", tmp_path / "out")
    with pytest.raises(ValueError, match="no checkpoint at"):
        export(run / "distill_0", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(run / "meta", tmp_path / "out")
    with pytest.raises(ValueError, match="holds a model already"):
        export(run / "meta", tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"[\d,]+ bytes needed, 10 free"):
        export(run / "meta", tmp_path / "other")


@pytest.mark.parametrize("published", ["fp32", "ema"])
def test_export_of_phase_train_is_a_model(tmp_path, monkeypatch, published):
    """Saved by three ranks whose cuts go through the middle of tensors; loads as every published V-MoE.

    Where the checkpoint has an average, that is the model.
    """
    without_deepspeed(monkeypatch)
    model = VMoE(MODEL)
    torch.nn.init.normal_(model.head.weight)
    VMoE(replace(MODEL, seed=9)).save_pretrained(tmp_path / "train", labels=["a", "b", "c"])
    (tmp_path / "train/model.safetensors").unlink()
    state = model.state_dict()

    def work(dist):
        made = saver(dist, tmp_path / "train", batch=9)
        held = made.engine.deepspeed
        held.shapes = {name: tuple(value.shape) for name, value in state.items()}
        held.values = {}
        kinds = {"fp32": 2.0, "exp_avg": 3.0} | {published: 1.0}
        held.fill({(kind, name): x * value.flatten() for name, value in state.items() for kind, x in kinds.items()})
        made.save(5, state={}, own={}, wait=True)

    assert run_ranks(3, work) == [None] * 3
    export(tmp_path / "train", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    loaded = VMoE.from_pretrained(tmp_path / "out")
    assert loaded.labels == ["a", "b", "c"]
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model.eval()(images))

    (tmp_path / "train/config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is missing"):
        export(tmp_path / "train", tmp_path / "none")


def test_export_of_phase_meta_has_the_names_of_its_artifact(tmp_path, monkeypatch):
    without_deepspeed(monkeypatch)

    def work(dist):
        made = saver(dist, tmp_path / "meta")
        held = made.engine.deepspeed
        held.shapes, held.values = {"meta.stages.0.w": (2,)}, {}
        held.fill({("fp32", "meta.stages.0.w"): torch.tensor([1.0, 2.0])})
        made.save(5, state={}, own={}, wait=True)

    assert run_ranks(1, work) == [None]
    export(tmp_path / "meta", tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == {"stages.0.w"}


def test_a_model_without_a_record(run, tmp_path):
    export(run / "meta", tmp_path / "out")
    assert "4 tensors, 20 parameters, F32, I64" in inspect(tmp_path / "out")
