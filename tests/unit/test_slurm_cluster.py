"""What a cluster does not allow is said before anything is submitted; silence is told from refusal."""

import json
from pathlib import Path

import pytest

from tests.unit.slurm_stand_in import stand_in  # noqa: F401
from tests.unit.test_slurm_chain import settings_for
from trainer.chain import cluster, containers, plan, slurm, submit
from trainer.chain.settings import Settings
from trainer.chain.slots import slots
from trainer.config.load import load_recipe

PARTITIONS = """\
PartitionName=gpu AllowAccounts=ALL AllowQos=ALL Default=YES MaxNodes=4 MaxTime=1-00:00:00 State=UP TotalNodes=16
PartitionName=old AllowAccounts=physics,chem AllowQos=ALL Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=DOWN
PartitionName=shut DenyAccounts=guests DenyQos=low Default=NO MaxTime=02:00:00 State=DRAIN TotalNodes=2
"""


def problems(stand_in, tmp_path, partitions=PARTITIONS, **changes):  # noqa: F811
    stand_in.says("partition", partitions)
    settings = settings_for(tmp_path, **changes)
    orders = submit.plan_orders(settings, load_recipe(settings.recipe), tmp_path)
    return cluster.problems(settings, [order.stage for order in orders])


def test_nothing_is_said_where_all_is_allowed(stand_in, tmp_path):  # noqa: F811
    assert problems(stand_in, tmp_path, nodes="4", time="23:00:00", partition="gpu") == []
    assert problems(stand_in, tmp_path, partition="hidden") == []  # sbatch itself knows
    assert problems(stand_in, tmp_path, partition="old,gpu") == []  # one of two is enough


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"partition": "old", "account": "chem"}, "train, evaluate: partition old is DOWN"),
        ({"time": "1-00:00:01"}, "time is 1-00:00:01, and partition gpu allows 1-00:00:00"),
        ({"nodes": "1,train=5"}, "train: 5 nodes, and a job in partition gpu may have 4"),
        ({"nodes": "3", "partition": "shut", "accept": "down", "time": "1:00:00"}, "partition shut may have 2"),
        ({"partition": "old", "account": "bio", "accept": "down"}, "old allows only physics,chem, not 'bio'"),
        ({"partition": "shut", "account": "guests", "time": "1:00:00"}, "shut does not allow 'guests': choose with"),
        ({"partition": "gpu,meta=shut", "qos": "low", "time": "1:00:00"}, "meta: partition shut is DRAIN"),
    ],
)
def test_what_would_wait_for_ever_is_named(stand_in, tmp_path, changes, words):  # noqa: F811
    assert any(words in line for line in problems(stand_in, tmp_path, **changes))


def test_the_account_of_the_environment_counts(stand_in, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SBATCH_ACCOUNT", "bio")
    assert any("'bio'" in line for line in problems(stand_in, tmp_path, partition="old"))


@pytest.mark.parametrize(
    "nodes, changes, is_refused",
    [
        ("gpu:a100:8(S:0-1)\ngpu:v100:8\n", {}, True),
        ("gpu:a100:8(S:0-1)\ngpu:v100:4\n", {}, False),  # the other node has too few
        ("gpu:a100:8\ngpu:v100:8\n", {"nodes": "1"}, False),  # all of a job's GPUs are in one node
        ("gpu:a100:8\ngpu:v100:8\n", {"constraint": "a100"}, False),
        ("gpu:a100:8\ngpu:v100:8\n", {"gpu_type": "a100"}, False),
        ("gpu:a100:8\ngpu:v100:8\n", {"accept": "mixed"}, False),
        ("gpu:8\ngpu:8\n(null)\n", {}, False),
    ],
)
def test_nodes_of_one_job_with_different_gpus(stand_in, tmp_path, nodes, changes, is_refused):  # noqa: F811
    stand_in.says("nodes", nodes)
    said = problems(stand_in, tmp_path, **{"nodes": "2", "gpus_per_node": "8"} | changes)
    assert any("have different GPUs (a100, v100)" in line for line in said) == is_refused


def test_a_refusal_comes_before_anything_is_submitted_or_written(stand_in, tmp_path):  # noqa: F811
    stand_in.says("partition", PARTITIONS)
    with pytest.raises(ValueError, match=r"nothing was submitted\. teacher, meta, .*: partition old is DOWN"):
        submit.submit(settings_for(tmp_path, partition="old", account="chem"))
    stand_in.says("refuse", "teacher.sbatch")  # by sbatch --test-only
    with pytest.raises(slurm.SlurmError, match="invalid partition"):
        submit.submit(settings_for(tmp_path))
    assert stand_in.queue() == {} and not (tmp_path / "run/slurm/1").exists()
    assert all("--test-only" in call for call in stand_in.calls("sbatch"))


def test_equal_jobs_are_asked_about_once(stand_in, tmp_path):  # noqa: F811
    submit.submit(settings_for(tmp_path, nodes="2,evaluate=1"))
    assert sum("--test-only" in call for call in stand_in.calls("sbatch")) == 3  # jobs, the array, evaluate


def test_a_silent_controller_is_no_refusal(stand_in, tmp_path, capsys, monkeypatch):  # noqa: F811
    stand_in.says("down", "")
    with pytest.raises(slurm.NoAnswer, match="The controller does not answer"):
        submit.submit(settings_for(tmp_path))
    monkeypatch.setattr(plan, "_dry_run", lambda settings, recipe, folder: {"checks": [], "problems": [], "flops": {}})
    assert plan.show(settings_for(tmp_path)) == 1
    assert "NO ANSWER  scontrol failed" in capsys.readouterr().out


def test_plan_says_what_the_partition_does_not_allow(stand_in, tmp_path, capsys, monkeypatch):  # noqa: F811
    stand_in.says("partition", PARTITIONS)
    monkeypatch.setattr(plan, "_dry_run", lambda settings, recipe, folder: {"checks": [], "problems": [], "flops": {}})
    assert plan.show(settings_for(tmp_path, time="3-0")) == 1
    assert "PROBLEM  teacher, meta, distill, train, evaluate: time is 3-0" in capsys.readouterr().out


def test_a_slot_no_longer_than_its_warning_is_refused():
    given = {"recipe": "r", "ds_config": "d", "out": "o"}
    with pytest.raises(ValueError, match=r"time of train is 00:05:00 and warn_seconds is 300.*told to stop when it"):
        Settings(**given, time="01:00:00,train=00:05:00")
    assert Settings(**given, time="00:05:00,evaluate=00:01:00", warn_seconds=120).hours_of("train") == 1 / 12


def test_plan_tells_how_many_steps_a_job_has_room_for(tmp_path, stand_in):  # noqa: F811
    finished = tmp_path / "before/train"
    finished.mkdir(parents=True)
    (finished / "result.json").write_text(json.dumps({"phase": "train", "seconds": 400.0, "world_size": 4}))
    (finished / "metrics.jsonl").write_text(json.dumps({"kind": "train", "phase": "train", "step": 800}) + "\n")
    settings = settings_for(tmp_path, time="01:00:00,train=00:30:00", speed_from=str(tmp_path / "before"))
    orders = submit.plan_orders(settings, load_recipe(settings.recipe), tmp_path)
    # 400 s x 4 ranks / 800 steps = 2 rank-seconds a step; (1800 - 300) s / (2 / 2 ranks) = 1500
    (line,) = slots(settings, orders)
    assert line.startswith(
        "train: a job of 00:30:00, less 300 s of warning, has room for about 1500 steps of 1 s on 2 ranks"
    )


@pytest.mark.parametrize(
    "nodes, gpus, ep_size, accept, is_refused",
    [("2", "2", 4, "", True), ("2", "2", 4, "across", False), ("1", "4", 4, "", False), ("2", "4", 4, "", False),
     ("2", "2", 2, "", False), ("2,train=1", "2", 4, "", True), ("2", "2", "auto", "", False)],
)  # fmt: skip
def test_experts_shared_by_ranks_of_two_nodes_are_asked_for_by_name(tmp_path, nodes, gpus, ep_size, accept, is_refused):
    overrides = (f"ds.trainer.ep_size={ep_size}",)
    settings = settings_for(tmp_path, nodes=nodes, gpus_per_node=gpus, overrides=overrides, accept=accept)
    if is_refused:
        with pytest.raises(
            ValueError, match=r"distill: .*ep_size. is 4 on nodes of 2 ranks.*straddle.*--accept across"
        ):
            submit.load(settings)
    else:
        submit.load(settings)


@pytest.mark.parametrize(
    "nodes, fitting", [(3, "2 and 4"), (5, "4 and 8"), (9, "8 and 16"), (12, "8 and 16"), (40, "16")]
)
def test_the_numbers_of_nodes_that_would_fit_are_named(tmp_path, nodes, fitting):
    with pytest.raises(ValueError, match=f"nodes of 1 ranks; numbers of nodes that fit: {fitting}$"):
        submit.load(settings_for(tmp_path, nodes=str(nodes), gpus_per_node="1"))


def test_no_more_loading_processes_than_cores(tmp_path, capsys):
    recipe, _ = submit.load(settings_for(tmp_path, cpus_per_task="8,train=2", overrides=("data.workers=12",)))
    assert recipe.data.workers == 2
    assert "data.workers is 12 and a rank has 2 CPU cores (--cpus-per-task): 2 are used" in capsys.readouterr().out
    recipe, _ = submit.load(settings_for(tmp_path, cpus_per_task="12", overrides=("data.workers=12",)))
    assert recipe.data.workers == 12 and capsys.readouterr().out == ""


def test_a_container_of_pyxis_is_flags_of_srun_and_of_apptainer_a_command(tmp_path):
    given = {"container": "image.sqsh", "container_mounts": "/data:/data", "srun_args": "--mpi=none"}
    pyxis = settings_for(tmp_path, **given)
    mounts = f"{pyxis.run}:{pyxis.run},/work:/work,/data:/data"
    work = Path("/work")
    assert containers.srun_flags(pyxis, work) == [
        "--container-image=image.sqsh", f"--container-mounts={mounts}", "--container-workdir=/work",
    ]  # fmt: skip
    assert containers.command(pyxis, work, gpus=True) == []
    apptainer = settings_for(tmp_path, container_runtime="apptainer", **given)
    assert containers.srun_flags(apptainer, work) == []
    with_gpus = ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", "/work", "image.sqsh"]
    assert containers.command(apptainer, work, gpus=True) == with_gpus
    assert "--nv" not in containers.command(apptainer, work, gpus=False)
    assert (
        containers.srun_flags(settings_for(tmp_path), work)
        == containers.command(settings_for(tmp_path), work, True)
        == []
    )


def test_values_by_stage_and_none_of_the_gpu_jobs_for_download_and_push(tmp_path, stand_in):  # noqa: F811
    settings = settings_for(
        tmp_path, partition="gpu,big,distill=a100", qos="high,push=low", mem="400G", constraint="ib",
        cpus_per_task="12", gpus_per_node="8,evaluate=1", gpu_type="a100,evaluate=", reservation="ours,evaluate=",
        account="me", sbatch_args="--exclusive", download_args="--licenses=net", overrides=("hub.repo=alice/model",),
        accept="down", nodes="2,evaluate=1",
    )  # fmt: skip
    stand_in.says("partition", PARTITIONS)
    assert submit.submit(settings) == 0

    def header(stage):
        lines = (settings.run / f"slurm/1/{stage}.sbatch").read_text().splitlines()
        return {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH ")}

    assert {"partition=gpu,big", "qos=high", "mem=400G", "gres=gpu:a100:8", "reservation=ours", "exclusive",
            "cpus-per-task=12"} <= header("train")  # fmt: skip
    assert "partition=a100" in header("distill")
    assert "gres=gpu:1" in header("evaluate") and not any("reservation" in line for line in header("evaluate"))
    for stage in ("download", "push"):
        assert {"partition=gpu,big", "cpus-per-task=4", "account=me", "licenses=net"} <= header(stage)
        of_gpu_jobs = ("mem", "constraint", "gres", "exclusive", "reservation", "qos=high")
        assert not [line for line in header(stage) if line.startswith(of_gpu_jobs)]
    assert "qos=low" in header("push")
