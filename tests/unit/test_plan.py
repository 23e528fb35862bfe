"""What `plan` says about commands and cost; the dry run itself once, end to end."""

import json
from pathlib import Path

import pytest

from trainer.chain import plan
from trainer.chain.settings import Settings
from trainer.chain.submit import load, plan_orders
from trainer.config.load import load_recipe
from trainer.plan import cost
from trainer.plan.stand_ins import planned_run
from trainer.teaching.estimate import of_training

ROOT = Path(__file__).resolve().parents[2]


def settings_for(tmp_path, **changes):
    values = {
        "recipe": str(ROOT / "tests/fixtures/slurm_tiny.yaml"),
        "ds_config": str(ROOT / "ds_configs/cpu_debug.json"),
        "out": str(tmp_path / "run"),
        "nodes": "2",
        "gpus_per_node": "1",
        "time": "02:00:00",
    }
    return Settings(**values | changes)


def write_result(run, stage, **values):
    (run / stage).mkdir(parents=True)
    (run / stage / "result.json").write_text(json.dumps(values))


def test_cost_from_flops_and_a_measured_speed(tmp_path):
    settings = settings_for(tmp_path)
    recipe, _ = load(settings)
    orders = plan_orders(settings, recipe, tmp_path / "scripts")
    # 3.6e12 FLOPs at 1e9 FLOP/s = 3600 s of one rank = 1 GPU-hour
    flops = {
        "teacher": 3.6e12,
        "meta": 7.2e12,
        "distill_0": 3.6e12,
        "distill_1": 3.6e12,
        "distill_2": 1.8e12,
        "train": 0,
    }
    lines = plan.cost(settings, orders, flops, 1e9, "from a test").splitlines()
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows["teacher"][-2:] == ["1", "4"]  # at most 2 GPUs x 2 h
    assert rows["distill"][1:4] == ["3", "2", "2"] and rows["distill"][-2:] == ["2.5", "12"]
    assert rows["evaluate"][-2:] == ["-", "4"]  # evaluation has no estimate, only its limit
    assert rows["total"][-2:] == ["5.5", "28"]
    assert lines[-1].startswith("expected: from a test")


def test_speed_is_the_slowest_finished_stage_or_said_to_be_assumed(tmp_path):
    settings = settings_for(tmp_path, speed_from=str(tmp_path / "other"))
    assert plan.speed(settings)[0] == cost.ASSUMED_FLOPS
    assert "an assumption" in plan.speed(settings)[1]
    write_result(tmp_path / "other", "train", flops=8e9, seconds=2.0, world_size=4)
    write_result(tmp_path / "other", "meta", flops=9e9, seconds=1.0, world_size=4)
    speed, source = plan.speed(settings)
    assert speed == 1e9 and str(tmp_path / "other/train") in source
    write_result(settings.run, "teacher", flops=6e9, seconds=1.0, world_size=2)
    assert plan.speed(settings)[0] == 3e9  # its own measurement comes first


def test_commands_name_every_dependency(tmp_path):
    settings = settings_for(tmp_path, srun_args="--container-image=x")
    recipe, _ = load(settings)
    text = plan.commands(settings, plan_orders(settings, recipe, tmp_path / "scripts"))
    assert text.count("=$(sbatch --parsable") == 5
    assert "--dependency=afterok:$JOB_distill" in text and "--array=0-2" in text
    assert "srun --container-image=x python trainer/run.py --phase distill --module $SLURM_ARRAY_TASK_ID" in text


@pytest.fixture
def no_slurm(monkeypatch):
    monkeypatch.setattr(plan.shutil, "which", lambda *_, **__: None)


def test_plan_dry_runs_every_phase_and_writes_nothing(tmp_path, capsys, no_slurm):
    settings = settings_for(tmp_path)
    assert plan.show(settings) == 0
    shown = capsys.readouterr().out
    for name in ("data", "teacher", "meta", "distill_0", "distill_1", "distill_2", "train", "disk"):
        assert f"  ok       {name}: " in shown
    assert "160 steps of 16 images on 2 ranks" in shown and "PROBLEM" not in shown
    assert not settings.run.exists()


def test_plan_finds_what_only_torch_can_see(tmp_path, capsys, no_slurm):
    settings = settings_for(tmp_path, overrides=("student.patch_size=8",))  # the teacher cuts 32 px into 16 px patches
    assert plan.show(settings) == 1
    shown = capsys.readouterr().out
    assert "PROBLEM  distill_0" in shown and "ok       meta" in shown


def test_plan_says_what_each_phase_needs_on_a_gpu(tmp_path, capsys, no_slurm):
    """Under the DeepSpeed JSON of the chain, on the ranks of each stage; what does not fit is a problem."""
    settings = settings_for(tmp_path, gpu_kind="h100,share=0.2", nodes="2,distill=1")
    assert plan.show(settings) == 0
    shown = capsys.readouterr().out
    assert "h100: 989 TFLOP/s bf16, 20% of them counted on" in shown
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if " x" in line or "x1" in line}
    assert rows["distill_0"][1] == "16x1" and rows["train"][1] == "8x1"  # one rank, and two
    assert "trains in float32" in shown
    assert plan.show(settings_for(tmp_path, gpu_kind="h100,memory_gb=0.001")) == 1
    assert "PROBLEM  train needs" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--gpu h1 is not in the table"):
        settings_for(tmp_path, gpu_kind="h1")


def test_images_fewer_than_a_batch_are_a_problem_and_still_have_a_cost():
    """The ImageNet recipe on 1,500 pictures: a batch of 1024 has a step, one of 2048 has none."""
    recipe = load_recipe(ROOT / "recipes/vmoe_base_imagenet.yaml")
    ds_values = {"zero_optimization": {"stage": 1}}
    run = planned_run(recipe, ds_values, ROOT / "unused", 1, 8, images=1500, classes=1000)
    fits = of_training(run, "train", "train", 10.0)
    assert not fits.problem and fits.costs["train"].images == 30 * 1024
    small = of_training(run, "distill", "distill_0", 10.0, extra_flops=7)
    assert "1500" in small.problem and "2048" in small.problem
    assert small.costs["distill_0"].flops == 5 * 1500 * 10 + 7


def test_a_plan_counts_on_the_speed_of_a_finished_stage(tmp_path):
    settings = settings_for(tmp_path, gpu_kind="h100")
    assert plan.gpu_of(settings) == "h100"
    write_result(settings.run, "teacher", flops=3.956e14, seconds=1.0, world_size=2)
    assert plan.gpu_of(settings) == "h100,share=0.2"  # 197.8 of 989 TFLOP/s
    assert plan.gpu_of(settings_for(tmp_path, gpu_kind="h100,share=0.5")) == "h100,share=0.5"
