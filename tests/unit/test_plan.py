"""What `plan` says about commands and cost; the dry run itself once, end to end."""

import json
from pathlib import Path

import pytest

from trainer.chain import cost, plan
from trainer.chain.settings import Settings
from trainer.chain.submit import load, plan_orders
from trainer.config.load import load_recipe
from trainer.plan.cost import Measured, Speeds
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


def speed_of(flops_per_second):
    """One finished result of a phase that no test plans, whose rank computes that fast."""
    return Speeds([Measured("probe", "probe", Path("x"), flops_per_second, 1.0, 1, 0.0)])


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
    lines = cost.cost(settings, orders, flops, speed_of(1e9)).splitlines()
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows["teacher"][-2:] == ["1", "4"]  # at most 2 GPUs x 2 h
    assert rows["distill"][1:4] == ["3", "2", "2"] and rows["distill"][-2:] == ["2.5", "12"]
    assert rows["evaluate"][-2:] == ["-", "4"]  # evaluation has no estimate, only its limit
    assert rows["total"][-2:] == ["5.5", "28"]
    assert "teacher, meta, distill, train, evaluate, of which nothing is finished, by the slowest" in lines[-1]


def note(run, result, *rows):
    """What the job body notes: (seconds since 1970, kind)."""
    (run / "slurm/events").mkdir(parents=True, exist_ok=True)
    lines = [f"1970-01-01T{s // 3600:02d}:{s // 60 % 60:02d}:{s % 60:02d}Z\t7\t0\t{kind}\tx\n" for s, kind in rows]
    (run / f"slurm/events/{result}.tsv").write_text("".join(lines))


def test_every_stage_is_expected_to_take_what_it_took(tmp_path):
    other = tmp_path / "other"
    settings = settings_for(tmp_path, speed_from=str(other))
    assert cost.speeds_of(settings).slowest is None
    recipe, _ = load(settings)
    orders = plan_orders(settings, recipe, tmp_path / "scripts")
    # two ranks: a thousand seconds of teacher at 1e9 FLOP/s each; 800 seconds a start, by the record of the process
    write_result(other, "teacher", phase="teacher", flops=2e12, seconds=1000.0, world_size=2, startup_seconds=800.0)
    # one rank: 500 seconds at 4e9 FLOP/s. Its jobs held their node for 300 + 600 seconds: 200 for each of two starts
    write_result(other, "distill_0", phase="distill", flops=2e12, seconds=500.0, world_size=1, startup_seconds=1.0)
    note(other, "distill_0", (0, "started"), (300, "requeued"), (1000, "started"), (1600, "done"))
    write_result(other, "evaluate", phase="evaluate", flops=0.0, seconds=600.0, world_size=1, startup_seconds=300.0)
    flops = {"teacher": 1e12, "meta": 3.6e12, "distill_0": 4e12, "distill_1": 4e12, "distill_2": 4e12, "train": 7.2e12}
    lines = cost.cost(settings, orders, flops, cost.speeds_of(settings)).splitlines()
    hours = {line.split()[0]: float(line.split()[-2]) for line in lines[1:-1]}
    assert hours["teacher"] == pytest.approx((1000 + 2 * 800) / 3600, rel=0.01)  # half the work, two ranks start
    assert hours["distill"] == pytest.approx(3 * (1000 + 2 * 200) / 3600, rel=0.01)  # the others as the one known
    assert hours["evaluate"] == pytest.approx((600 + 2 * 300) / 3600, rel=0.01)
    assert hours["meta"] == pytest.approx(1.0) and hours["train"] == pytest.approx(2.0)  # at the teacher's speed
    assert f"what each stage took in {other}" in lines[-1] and "meta, train, of which nothing is finished" in lines[-1]
    # its own measurement comes first
    write_result(settings.run, "teacher", phase="teacher", flops=6e9, seconds=1.0, world_size=2)
    assert cost.speeds_of(settings).of("teacher").flops_per_second == 3e9


def test_a_result_that_fills_several_time_limits_starts_as_often(tmp_path):
    speeds = Speeds([Measured("train", "train", tmp_path, flops=1e12, seconds=1000.0, ranks=1, startup=100.0)])
    settings = settings_for(tmp_path, time="00:20:00")  # 1200 s: 800 of work, 100 to start, 300 of warning
    assert cost.expected_hours(settings, "train", 1, "train", 1e12, speeds) == pytest.approx((1000 + 200) / 3600)
    assert cost.expected_hours(settings, "train", 2, "train", 1e12, speeds) == pytest.approx((1000 + 200) / 3600)
    assert cost.expected_hours(settings, "download", 0, "download", None, speeds) == 0


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
    assert "100 steps of 16 images on 2 ranks" in shown and "PROBLEM" not in shown
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
    assert cost.gpu_of(settings) == "h100"
    write_result(settings.run, "teacher", flops=3.956e14, seconds=1.0, world_size=2)
    assert cost.gpu_of(settings) == "h100,share=0.2"  # 197.8 of 989 TFLOP/s
    assert cost.gpu_of(settings_for(tmp_path, gpu_kind="h100,share=0.5")) == "h100,share=0.5"
