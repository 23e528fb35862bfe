"""Settings, stages and submission of the Slurm chain, with an sbatch, squeue and scancel that only take notes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from trainer.artifacts import missing
from trainer.chain import settings as chain_settings
from trainer.chain import slurm, submit
from trainer.chain.following import progress, status
from trainer.chain.settings import Settings
from trainer.config.load import load_recipe, to_dict
from trainer.request.stages import Stage, chain

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "tests/fixtures/slurm_tiny.yaml")
DS_CONFIG = str(ROOT / "ds_configs/cpu_debug.json")
FAKE = """#!/bin/bash
echo "$(basename "$0") $*" >>"$FAKE/calls"
case $(basename "$0") in
    sbatch)
        [[ $* == *--test-only* ]] && exit 0
        if [[ -f $FAKE/refuse && $* == *"$(cat "$FAKE/refuse")"* ]]; then
            echo "sbatch: error: invalid partition" >&2; exit 1
        fi
        id=$(($(cat "$FAKE/id") + 1)); echo $id >"$FAKE/id"; echo "$id;cluster" ;;
    squeue) cat "$FAKE/queue" ;;
esac
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder first on PATH with the three programs; "calls" holds what they were asked."""
    for name in ("sbatch", "squeue", "scancel", "scontrol"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "id").write_text("100")
    (tmp_path / "queue").write_text("")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def settings_for(tmp_path, **changes):
    values = {"recipe": RECIPE, "ds_config": DS_CONFIG, "out": str(tmp_path / "run"), "gpus_per_node": "2"}
    return Settings(**values | changes)


def finish(settings, *artifacts):
    """Leave what a finished phase leaves, as far as the chain looks at it."""
    for name in artifacts:
        folder = settings.run / name
        folder.mkdir(parents=True, exist_ok=True)
        phase, _, module = name.partition("_")
        result = {"phase": phase, "module": int(module) if module else None, "files": {}, "metrics": {"accuracy": 0.5}}
        (folder / "result.json").write_text(json.dumps(result))


def calls(fake, program):
    path = fake / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    asked = [line.removeprefix(program + " ") for line in lines if line.startswith(program + " ")]
    return [line for line in asked if "--test-only" not in line]


def test_flag_beats_environment_beats_default():
    environ = {
        "RECIPE": RECIPE,
        "DS_CONFIG": DS_CONFIG,
        "OUT": "runs/x",
        "NODES": "4",
        "GPUS_PER_NODE": "",
        "MEM": "8G",
    }
    command, settings = chain_settings.read(["plan", "--nodes", "2", "train.epochs=3", "--qos", "low"], environ)
    assert (command, settings.nodes, settings.gpus_per_node, settings.mem) == ("plan", "2", "8", "8G")
    assert (settings.qos, settings.overrides) == ("low", ("train.epochs=3",))
    assert chain_settings.read(["a.b=1"], environ)[0] == "submit"


def test_nodes_and_time_per_stage():
    settings = settings_for(Path("/x"), nodes="4,distill=1", time="1-12:30:00,evaluate=90,train=00:30:36")
    assert [settings.nodes_of(s) for s in ("meta", "distill", "train", "download")] == [4, 1, 4, 1]
    assert [settings.hours_of(s) for s in ("meta", "evaluate")] == [36.5, 1.5]
    assert settings.hours_of("train") == pytest.approx(0.51)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"nodes": "2,distil=1"}, "'distil' is no stage"),
        ({"nodes": "two"}, "nodes is 'two'"),
        ({"time": "tomorrow"}, "time is 'tomorrow'"),
        ({"gpus_per_node": "0"}, "tasks_per_node is 0, expected 1 or more"),
        ({"out": ""}, "set OUT or --out"),
        ({"level": "experts"}, "level is 'experts', expected module or expert"),
    ],
)
def test_settings_without_a_meaning_are_named(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        settings_for(tmp_path, **changes)


def test_stages_of_a_recipe_with_baselines_and_a_hub_teacher():
    recipe = load_recipe(RECIPE, ["train.baselines=[scratch, scratch_equal_cost]", "teacher.source=someone/vit"])
    found = {stage.name: stage.needs for stage in chain(recipe)}
    assert found == {
        "download": (), "probe": ("download",), "meta": ("probe",), "distill": ("meta",), "train": ("distill",),
        "train_scratch": ("probe",), "train_scratch_equal_cost": ("distill",), "evaluate": ("train",),
    }  # fmt: skip
    assert [s.name for s in chain(load_recipe(RECIPE))] == ["teacher", "meta", "distill", "train", "evaluate"]
    *_, train, evaluate = chain(load_recipe(RECIPE, ["train.start=scratch"]))
    assert train.artifacts == evaluate.inputs == ("train_scratch",) and evaluate.artifacts == ("evaluate_scratch",)


def test_a_recipe_with_a_hub_repo_checks_it_first_and_pushes_last():
    recipe = load_recipe(RECIPE, ["hub.repo=alice/model"])
    first, *_, last = chain(recipe)
    assert first.name == "download" and chain(recipe)[1].needs == ("download",)
    assert last == Stage("push", "push", ("download", "evaluate"), ("train", "evaluate"), ("push",))


def test_jobs_of_the_push_and_the_download_need_internet_and_no_gpu(tmp_path, fake):
    settings = settings_for(tmp_path, nodes="2", partition="gpu", download_partition="login",
                            overrides=("hub.repo=alice/model",))  # fmt: skip
    submit.submit(settings)
    for name in ("download", "push"):
        lines = (settings.run / f"slurm/1/{name}.sbatch").read_text().splitlines()
        assert {"#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=1", "#SBATCH --partition=login", "GPUS=0"} <= set(lines)
        assert not any("gres" in line for line in lines if line.startswith("#SBATCH"))
    assert [(row.stage, row.depends) for row in submit.rows(settings.run)][-1] == ("push", "101:106")
    assert f"--ds_config {settings.run}/slurm/1/ds_config.json --phase push" in "\n".join(lines)


def test_a_push_is_missing_when_its_input_or_its_goal_is_another(tmp_path):
    settings, recipe = settings_for(tmp_path), load_recipe(RECIPE, ["hub.repo=alice/model"])
    push = chain(recipe)[-1]
    assert missing(push, settings.run, recipe) == [0]
    finish(settings, "train", "evaluate", "push")
    path = settings.run / "push/result.json"
    goal = {"repo": "alice/model", "revision": "main", "commit": "abcdef0123"}
    path.write_text(json.dumps(json.loads(path.read_text()) | goal))
    assert missing(push, settings.run, recipe) == []
    assert str(progress.read(settings.run, "push")) == "alice/model@main, commit abcdef0"
    assert missing(push, settings.run, load_recipe(RECIPE, ["hub.repo=alice/model", "hub.revision=v2"])) == [0]
    os.utime(settings.run / "push/result.json", (50, 50))
    assert missing(push, settings.run, recipe) == [0]


def test_evaluation_older_than_the_training_is_missing(tmp_path):
    settings, recipe = settings_for(tmp_path), load_recipe(RECIPE)
    evaluate = chain(recipe)[-1]
    finish(settings, "train", "evaluate")
    os.utime(settings.run / "train/result.json", (100, 100))
    assert missing(evaluate, settings.run, recipe) == []
    os.utime(settings.run / "evaluate/result.json", (50, 50))
    assert missing(evaluate, settings.run, recipe) == [0]


def test_submission_chains_the_jobs_and_notes_each_id(tmp_path, fake, capsys):
    settings = settings_for(tmp_path, array_throttle=2, nodes="2", partition="gpu")
    assert submit.submit(settings) == 0
    made = calls(fake, "sbatch")
    assert [Path(call.split()[-1]).stem for call in made] == ["teacher", "meta", "distill", "train", "evaluate"]
    assert "--dependency" not in made[0]
    for call, parent in zip(made[1:], (101, 102, 103, 104)):
        assert f"--dependency=afterok:{parent} --kill-on-invalid-dep=yes" in call
    assert "--array=0-2%2" in made[2]
    assert [(r.stage, r.array, r.job, r.depends) for r in submit.rows(settings.run)] == [
        ("teacher", "-", "101", "-"), ("meta", "-", "102", "101"), ("distill", "0,1,2", "103", "102"),
        ("train", "-", "104", "103"), ("evaluate", "-", "105", "104"),
    ]  # fmt: skip
    script = (settings.run / "slurm/1/distill.sbatch").read_text()
    for line in ("#SBATCH --gres=gpu:2", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=2", "#SBATCH --partition=gpu"):
        assert line in script.splitlines()
    subprocess.run(["bash", "-n", settings.run / "slurm/1/distill.sbatch"], check=True)
    assert load_recipe(settings.run / "slurm/1/recipe.yaml") == load_recipe(RECIPE)
    assert (settings.run / "logs").is_dir()


def test_only_what_is_missing_is_submitted(tmp_path, fake):
    settings = settings_for(tmp_path)
    finish(settings, "teacher", "meta", "distill_0", "distill_2")
    submit.submit(settings)
    made = calls(fake, "sbatch")
    assert [Path(call.split()[-1]).stem for call in made] == ["distill", "train", "evaluate"]
    assert "--array=1 " in made[0] and "--dependency" not in made[0]


def test_artifact_of_another_recipe_is_refused(tmp_path, fake):
    settings = settings_for(tmp_path)
    finish(settings, "teacher")
    other = to_dict(load_recipe(RECIPE, ["seed=7"]))
    (settings.run / "teacher/config.yaml").write_text(yaml.safe_dump({"recipe": other}))
    with pytest.raises(ValueError, match="seed: 7 there, 0 here"):
        submit.submit(settings)
    assert calls(fake, "sbatch") == []


def test_failing_submission_takes_back_the_ones_before(tmp_path, fake):
    (fake / "refuse").write_text("distill")
    with pytest.raises(slurm.SlurmError, match=r"invalid partition\. Partitions: sinfo -s"):
        submit.submit(settings_for(tmp_path))
    assert calls(fake, "scancel") == ["101 102"]


def test_live_chain_is_not_submitted_twice(tmp_path, fake):
    settings = settings_for(tmp_path)
    submit.submit(settings)
    (fake / "queue").write_text("103_1|103|1|RUNNING|None|node1|0:10\n")
    with pytest.raises(ValueError, match=r"still live \(103_1 RUNNING"):
        submit.submit(settings)
    (fake / "queue").write_text("103_1|103|1|FAILED|NonZeroExitCode|node1|0:10\n7|7|N/A|RUNNING|None|node1|0:10\n")
    assert submit.submit(settings) == 0
    assert len(calls(fake, "sbatch")) == 10


def test_jobs_of_a_driver_job_do_not_inherit_its_resources(monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1000")
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    assert "SLURM_MEM_PER_CPU" not in slurm.clean_environ()
    assert slurm.clean_environ()["SLURM_CONF"] == "/etc/other.conf"


def test_without_slurm_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm.SlurmError, match="sbatch is not on PATH: run this on a login node"):
        submit.submit(settings_for(tmp_path))
    assert submit.rows(tmp_path / "run") == []


def test_ranks_that_do_not_divide_the_batch_are_refused_before_anything_is_written(tmp_path):
    settings = settings_for(tmp_path, nodes="2,train=3", gpus_per_node="1")
    with pytest.raises(ValueError, match=r"global batch of 16 .* train\.global_batch"):
        submit.submit(settings)
    assert not settings.run.exists()


def test_status_tells_state_progress_and_reason(tmp_path, fake, capsys):
    settings = settings_for(tmp_path)
    submit.submit(settings)
    finish(settings, "teacher")
    (settings.run / "meta").mkdir()
    rows = [{"kind": "train", "phase": "meta", "epoch": 0, "step": 5, "loss": 1.0},
            {"kind": "eval", "phase": "meta", "epoch": 1, "step": 20, "accuracy": 0.25, "loss": 2.0}]  # fmt: skip
    (settings.run / "meta/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (settings.run / "logs/meta-102").mkdir()
    (settings.run / "logs/meta-102/node1-rank0.out").write_text(
        "[meta] epoch 2/8 step 3/20 loss 2.1 lr 1e-3 90 img/s eta 0:00:31\n"
    )
    (settings.run / "slurm/events").mkdir()
    (settings.run / "slurm/events/distill_1.tsv").write_text("t\t103\t1\tfailed\tout of luck\n")
    (fake / "queue").write_text(
        "101|101|N/A|COMPLETED|None|node1|0:10\n102|102|N/A|RUNNING|None|node[1-2]|0:42\n"
        "103_1|103|1|FAILED|NonZeroExitCode|node1|0:10\n104|104|N/A|PENDING|Dependency||0:00\n"
    )
    capsys.readouterr()
    assert status.show(settings) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "done" in lines["teacher"] and "accuracy 50.0%" in lines["teacher"]
    assert "epoch 2/8 step 3/20, eta 0:00:31, accuracy 25.0%" in lines["meta"] and "node[1-2]" in lines["meta"]
    assert "FAILED" in lines["distill_1"] and "out of luck (restart 1)" in lines["distill_1"]
    assert "waits: Dependency" in lines["train"]
    assert "ENDED" in lines["evaluate"]  # Slurm no longer knows it


@pytest.mark.parametrize("indent", [None, 1])
def test_the_job_body_reads_the_newest_save_not_the_best(tmp_path, indent):
    folder = tmp_path / "train/checkpoints"
    folder.mkdir(parents=True)
    names = {"tag": "step_00000120", "best": "step_00000040"}
    (folder / "latest.json").write_text(json.dumps(names, indent=indent) + "\n")
    command = f"RUN={tmp_path} artifact=train; source {ROOT}/slurm/body.sh; saved_step"
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout == "120\n"


def test_status_without_a_controller_shows_the_disk(tmp_path, fake, capsys, monkeypatch):
    settings = settings_for(tmp_path)
    submit.submit(settings)
    (fake / "squeue").write_text(
        "#!/bin/bash\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n"
    )
    assert status.show(settings) == 3
    shown = capsys.readouterr().out
    assert "Slurm gives no answer" in shown and "no answer" in shown
