"""Studies as jobs of a stand-in of Slurm: who makes what, what is submitted, what a job and the last one do."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from tests.launch import ROOT
from tests.unit.slurm_stand_in import stand_in  # noqa: F401
from tests.unit.test_study import study_file
from trainer.chain.following import snapshot
from trainer.chain.submit import rows
from trainer.config.load import load_recipe, plain_values
from trainer.study import __main__ as local
from trainer.study import element, gather, jobs, worker
from trainer.study.plan import cells, read_study
from trainer.study.runner import Runner
from trainer.study.waves import waves, works

VARIANTS = """
  scratch: {overrides: {train.start: scratch}}
  m2mkd: {reference: scratch}
  keep: {overrides: {train: {stitches: keep}}}
"""


def finish(folder: Path, *names: str, accuracy: float = 0.5) -> None:
    """What a complete artifact leaves, as far as a study looks at it."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "model.safetensors").write_text(f"{folder} {name}")
        text = json.dumps({"metrics": {"accuracy": accuracy}, "flops": 1e9})
        (folder / name / "result.json").write_text(text)


@pytest.fixture
def command(tmp_path, monkeypatch, stand_in, capsys):  # noqa: F811
    """command(*words, variants=, more=) is bash slurm/study.sh STUDY WORDS: (exit code, stdout, stderr)."""
    monkeypatch.chdir(ROOT)

    def run(*words, variants=VARIANTS, more="", **environ):
        path = study_file(tmp_path, variants, more, seeds="[0]")
        given = {
            "RECIPE": path,
            "OUT": tmp_path / "out",
            "DS_CONFIG": "study",
            "GPUS_PER_NODE": "1",
            "PYTHON": "python",
        }
        for name, value in (given | environ).items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", ["jobs", *words])
        code = jobs.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def submitted(stand_in) -> list[str]:  # noqa: F811
    return [call for call in stand_in.calls("sbatch") if "--test-only" not in call]


def end_jobs(stand_in) -> None:  # noqa: F811
    for job in (stand_in.folder / "queue").iterdir():
        job.unlink()


# who makes what


@pytest.mark.parametrize("name", ["study_ablation", "study_other_classes"])
def test_every_artifact_has_one_maker_whose_job_ends_before_it_is_needed(name, tmp_path):
    study = read_study(ROOT / f"recipes/{name}.yaml")
    grid = cells(study, tmp_path)
    todo = works(grid, {})
    assert [work.cell for work in todo] == [cell.name for cell in grid]
    keys = {cell.name: cell.keys for cell in grid}
    made = [keys[work.cell][part.name] for work in todo for part in work.parts if not part.source]
    assert sorted(made) == sorted({key for of_cell in keys.values() for key in of_cell.values()})
    done: dict[str, set[str]] = {}  # cell -> all whose jobs have ended when its own starts
    for group in waves(todo):
        for work in group:
            assert set(work.waits_for) <= done.keys(), "it stands behind what it waits for"
            done[work.cell] = set(work.waits_for).union(*(done[name] for name in work.waits_for))
            needed = {part.maker for part in work.parts if part.source}
            if work.teacher:
                needed.add(next(cell.name for cell in grid if str(cell.folder / "teacher") == work.teacher))
            assert needed <= done[work.cell]
        assert len({work.waits_for for work in group}) == 1


def test_cells_wait_for_what_makes_the_shared_part_and_for_nothing_twice(tmp_path):
    study = read_study(study_file(tmp_path, more="share_teacher: true"))
    todo = works(cells(study, tmp_path), {})
    waits = {work.cell: work.waits_for for work in todo}
    (teacher,) = [name for name in waits if name.startswith("teachers/")]
    assert waits["scratch/seed0"] == waits["m2mkd/seed1"] or waits["m2mkd/seed1"] == ("scratch/seed1",)
    assert waits["keep/seed0"] == ("m2mkd/seed0",), "which waits for the teacher itself"
    assert waits[teacher] == ()


def test_what_is_complete_anywhere_is_linked_and_waited_for_by_nobody(tmp_path):
    grid = cells(read_study(study_file(tmp_path, seeds="[0]")), tmp_path)
    key = grid[0].keys["teacher"]
    scratch, m2mkd, keep = works(grid, {key: Path("/there")})
    assert (scratch.parts[0].source, scratch.parts[0].maker) == ("/there", "")
    assert (m2mkd.waits_for, keep.waits_for) == ((), ("m2mkd/seed0",))


# what is submitted


def test_cells_are_arrays_behind_what_they_share_and_the_table_comes_last(command, stand_in, tmp_path):  # noqa: F811
    code, said, error = command("submit", "--array-throttle", "4")
    assert code == 0, error
    assert "3 cells, 0 complete; to make: 3 in 3 waves (7 results made, 5 shared)" in said
    run = tmp_path / "out/jobs"
    assert [(row.stage, row.array, row.job, row.depends) for row in rows(run)] == [
        ("cells", "0", "101", "-"), ("cells", "1", "102", "101_0"), ("cells", "2", "103", "102_1"),
        ("gather", "-", "104", "101:102:103"),
    ]  # fmt: skip
    first, second, _, last = submitted(stand_in)
    assert "--array=0%4 --hold" in first and "--array=1%4 --dependency=afterany:101_0 " in second
    assert "--dependency=afterany:101:102:103 " in last
    script = (run / "slurm/1/cells-1.sbatch").read_text()
    assert "PHASE=cell\nARTIFACTS=(scratch/seed0 m2mkd/seed0 keep/seed0)\n" in script
    assert f"TRAINER_ARGS=(--cells {run}/slurm/1/cells.json --ds_config {run}/slurm/1/ds_config.json)" in script
    assert "--job-name=out-cells" in script and "--gres=gpu:1" in script
    assert "--gres" not in (run / "slurm/1/gather.sbatch").read_text().partition("unset")[0]
    assert (tmp_path / "out/keep/seed0/recipe.yaml").is_file()
    assert (run / "slurm/1/code/trainer/study/element.py").is_file()

    code, _, error = command("submit")
    assert code == 2 and "are still live" in error
    assert local.main([str(tmp_path / "study_x.yaml"), "--out", str(tmp_path / "out")]) == 2, "nor by processes"
    assert [element.result for element in snapshot.read(run).elements] == [
        "scratch/seed0", "m2mkd/seed0", "keep/seed0", "gather",
    ]  # fmt: skip


def test_submitting_again_makes_what_is_missing_under_the_same_numbers(command, stand_in, tmp_path):  # noqa: F811
    command("submit")
    end_jobs(stand_in)
    finish(tmp_path / "out/m2mkd/seed0", "teacher", "meta", "distill_0", "distill_1", "train", accuracy=0.75)
    code, said, error = command("submit", variants="\n  first: {overrides: {train.lr: 0.9}}" + VARIANTS)
    assert code == 0, error
    assert "4 cells, 1 complete; to make: 3 in 1 wave (3 results made, 9 shared)" in said
    run = tmp_path / "out/jobs"
    again = [row for row in rows(run) if row.script.startswith(str(run / "slurm/2"))]
    assert [(row.array, row.depends) for row in again] == [("0,2,3", "-"), ("-", "105")], "3 is the new one"
    shown = {each.result: each.state for each in snapshot.read(run).elements}
    assert shown["m2mkd/seed0"] == snapshot.DONE and shown["first/seed0"] == snapshot.WAITING
    assert json.loads((run / "m2mkd/seed0/result.json").read_text())["metrics"] == {"accuracy": 0.75}

    end_jobs(stand_in)
    finish(tmp_path / "out/first/seed0", "teacher", "meta", "distill_0", "distill_1", "train")
    finish(tmp_path / "out/keep/seed0", "teacher", "meta", "distill_0", "distill_1", "train")
    finish(tmp_path / "out/scratch/seed0", "teacher", "train_scratch")
    before = len(submitted(stand_in))
    code, said, _ = command("submit")
    assert code == 0 and "every cell is complete, nothing to submit" in said
    assert len(submitted(stand_in)) == before and (tmp_path / "out/study.md").is_file()


def test_arrays_end_where_the_cluster_wants_it(command, stand_in, tmp_path):  # noqa: F811
    stand_in.says("config", "MaxArraySize            = 3\n")
    variants = "".join(f"\n  v{i}: {{phases: [teacher], overrides: {{teacher.lr: 0.0{i + 1}}}}}" for i in range(5))
    code, _, error = command("submit", variants=variants)
    assert code == 0, error
    found = [(row.array, row.offset) for row in rows(tmp_path / "out/jobs")]
    assert found == [("0,1,2", "0"), ("3,4", "3"), ("-", "0")]


def test_cells_that_share_a_job(command, stand_in, tmp_path):  # noqa: F811
    """Five cells in three jobs; cells of one job wait for whole jobs of those before."""
    variants = "".join(f"\n  v{i}: {{phases: [teacher], overrides: {{teacher.lr: 0.0{i + 1}}}}}" for i in range(5))
    code, said, error = command("plan", "--elements-per-job", "2", variants=variants)
    assert code == 0 and "  3 jobs, --array=0-2: " in said and "1 array, 3 jobs of 1 GPU" in said, said + error
    code, _, error = command("submit", "--elements-per-job", "2", variants=variants)
    assert code == 0, error
    assert [(row.array, row.per_job) for row in rows(tmp_path / "out/jobs")] == [("0,1,2,3,4", "2"), ("-", "1")]
    assert "--array=0-2 " in submitted(stand_in)[0]
    code, _, error = command("submit", "--elements-per-job", "1,expert=2", variants=variants)
    assert code == 2 and "elements_per_job names stage expert" in error


def test_what_the_hub_gives_is_downloaded_first_and_once(command, stand_in, tmp_path):  # noqa: F811
    words = ("teacher.source=someone/vit", "teacher.head=own")
    code, _, error = command("submit", *words)
    assert code == 0, error
    run = tmp_path / "out/jobs"
    assert [(row.stage, row.depends) for row in rows(run)] == [
        ("download", "-"), ("cells", "101"), ("cells", "102_1"), ("gather", "102:103"),
    ]  # fmt: skip
    assert "--dependency=afterok:101 --kill-on-invalid-dep=yes" in submitted(stand_in)[1]
    script = (run / "slurm/1/download.sbatch").read_text()
    assert f"TRAINER_ARGS=(--recipe {run}/slurm/1/download-0.yaml --out {run})" in script
    assert "source: someone/vit" in (run / "slurm/1/download-0.yaml").read_text()
    end_jobs(stand_in)
    (run / "download").mkdir()
    (run / "download/result.json").write_text('{"names": ["someone/vit"]}')
    command("submit", *words)
    assert [row.stage for row in rows(run)][4:] == ["cells", "cells", "gather"]


def test_a_teacher_that_cells_share_is_nothing_to_download(command, stand_in, tmp_path):  # noqa: F811
    code, _, error = command("submit", more="share_teacher: true")
    assert code == 0, error
    assert "download" not in {row.stage for row in rows(tmp_path / "out/jobs")}


def test_only_some_variants(command, stand_in, tmp_path):  # noqa: F811
    code, said, error = command("submit", "--only", "scr*")
    assert code == 0, error
    assert "1 cell, 0 complete" in said and [row.stage for row in rows(tmp_path / "out/jobs")] == ["cells", "gather"]
    assert "'--only=scr*'" in (tmp_path / "out/jobs/slurm/1/gather.sbatch").read_text()


def test_a_plan_submits_and_writes_nothing(command, stand_in, tmp_path):  # noqa: F811
    code, said, error = command("plan", "--time", "02:00:00,gather=00:10:00", "--nodes", "2", "train.epochs=1")
    assert code == 0, error
    assert "1 job, --array=2: keep/seed0, after m2mkd/seed0" in said
    assert "3 arrays, 3 jobs of 2 GPUs and 02:00:00: at most 12 GPU-hours" in said
    assert "  ok       gather: " in said and submitted(stand_in) == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "x"], "--only x matches no variant. Variants: scratch, m2mkd, keep"),
        (["--nodes", "1,train=2"], "nodes names stage train, and a job of a study makes all of a cell"),
        (["--nodes", "3"], "numbers of nodes that fit: 2 and 4"),
        (["train.epoch=3"], "variant scratch: unknown key train.epoch"),
        (["--ds-config", "none.json"], "none.json"),
        (["--time", "00:01:00"], "time of"),
    ],
)
def test_what_is_refused_before_anything_is_submitted(command, stand_in, tmp_path, words, said):  # noqa: F811
    code, _, error = command("submit", *words)
    assert code == 2 and said in error and error.count("error:") == 1
    assert submitted(stand_in) == [] and not list(tmp_path.glob("out/jobs/slurm/[0-9]*"))


def test_artifacts_of_another_recipe_are_refused(command, stand_in, tmp_path):  # noqa: F811
    command("submit")
    end_jobs(stand_in)
    finish(tmp_path / "out/m2mkd/seed0", "meta")
    before = len(submitted(stand_in))
    code, _, error = command("submit", "meta.epochs=7")
    assert code == 2 and "out/m2mkd/seed0/meta is of another recipe (meta.epochs: 2 there, 7 here)" in error
    assert len(submitted(stand_in)) == before


def test_a_study_at_work_in_processes_is_not_submitted(command, stand_in, tmp_path):  # noqa: F811
    runner = Runner([], Path("unused"), tmp_path / "out", 1, after=lambda: None)
    code, _, error = command("submit")
    runner.lock.close()
    assert code == 2 and "python -m trainer.study is at work in" in error and submitted(stand_in) == []


def test_all_jobs_or_none(command, stand_in):  # noqa: F811
    stand_in.says("lost", "103")
    code, _, error = command("submit")
    assert code == 3 and "Socket timed out" in error and stand_in.queue() == {}


def test_the_script_wants_a_study(tmp_path):
    done = subprocess.run(["bash", "slurm/study.sh", "plan"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no study named: bash slurm/study.sh recipes/")


@pytest.mark.parametrize("name", ["study_base.yaml", "baselines/scratch_kd.yaml", "own_images.yaml"])
def test_a_recipe_in_one_file_is_the_same_recipe_under_any_overrides(tmp_path, name):
    """As a submission keeps the base of its study."""
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(plain_values(ROOT / "recipes" / name), sort_keys=False))
    given = ["data.path=images", "teacher.source=a/b"] if name.startswith("own") else []
    for changes in (given, [*given, "epochs=3"], [*given, "train.epochs=7", "epochs=2"]):
        assert load_recipe(path, changes) == load_recipe(ROOT / "recipes" / name, changes)


# what a job does


@pytest.fixture
def at_work(command, stand_in, tmp_path, monkeypatch):  # noqa: F811
    """Submits the study; at_work(cell) is the job of a cell without its training: (exit code, what it made)."""
    command("submit")

    def run(cell: str, rank: int = 0, code: int = 0):
        made = []

        def pretend(folder, ds_config, names):
            made.extend(names)
            if code == 0:
                finish(folder, *names)
            return code

        monkeypatch.setattr(worker, "main", pretend)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        folder = tmp_path / "out/jobs/slurm/1"
        done = element.main(
            ["--cells", str(folder / "cells.json"), "--ds_config", str(folder / "ds_config.json"), cell]
        )
        return done, made

    return run


def test_a_job_links_what_others_made_and_makes_the_rest(at_work, tmp_path, capsys):
    code, made = at_work("m2mkd/seed0")
    assert code == 2 and made == []
    said = capsys.readouterr().err
    assert said.startswith("error: m2mkd/seed0 needs teacher of scratch/seed0, which is not complete: see how its job")
    assert at_work("scratch/seed0") == (0, ["teacher", "train_scratch"])
    assert at_work("m2mkd/seed0") == (0, ["meta", "distill_0", "distill_1", "train"])
    assert at_work("keep/seed0") == (0, ["train"])
    out = tmp_path / "out"
    one, other = (out / name / "seed0/distill_1/model.safetensors" for name in ("m2mkd", "keep"))
    assert one.samefile(other) and (out / "jobs/keep/seed0/result.json").is_file()


def test_a_job_that_was_interrupted_is_not_complete(at_work, tmp_path):
    assert at_work("scratch/seed0", code=75) == (75, ["teacher", "train_scratch"])
    assert not (tmp_path / "out/jobs/scratch/seed0/result.json").exists()


def test_other_ranks_wait_for_what_rank_0_links(at_work, tmp_path):
    at_work("scratch/seed0")
    late = threading.Timer(0.3, finish, [tmp_path / "out/m2mkd/seed0", "teacher"])
    late.start()
    begun = time.monotonic()
    code, _ = at_work("m2mkd/seed0", rank=1)
    assert code == 0 and time.monotonic() - begun > 0.3
    assert not (tmp_path / "out/jobs/m2mkd/seed0/result.json").exists(), "rank 0 says so"


def test_progress_of_a_cell_is_what_it_has_and_where_it_is(tmp_path):
    """What the job body compares between two crashes."""
    cell = tmp_path / "m2mkd/seed0"
    text = f"RUN={tmp_path}/jobs PHASE=cell artifact=m2mkd/seed0; source {ROOT}/slurm/body.sh; saved_step"

    def saved() -> str:
        return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout.strip()

    assert saved() == "results:0"
    finish(cell, "teacher", "meta")
    for name, step in (("meta", 40), ("distill_0", 7)):
        (cell / name / "checkpoints").mkdir(parents=True)
        (cell / name / "checkpoints/latest.json").write_text(f'{{"tag": "step_{step:08d}"}}')
    assert saved() == "results:2,distill_0:7"
    finish(tmp_path / "jobs", "m2mkd/seed0")
    assert saved() == "done"


# the last job


TUNED = """
  scratch: {overrides: {train.start: scratch}}
  a: {overrides: {train.start: scratch, train.epochs: 1}, tune: {train.lr: [0.1, 0.2, 0.4]}}
"""
UNTUNED = "tune_overrides: {train.epochs: 1}"


def last_job(folder: Path, name: str, monkeypatch) -> int:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return gather.main(["--submission", str(folder), "--work", str(ROOT), "--name", name])


def test_what_tuning_chose_is_submitted_once(command, stand_in, tmp_path, monkeypatch, capsys):  # noqa: F811
    out, run = tmp_path / "out", tmp_path / "out/jobs"
    code, said, error = command("submit", variants=TUNED, more=UNTUNED)
    assert code == 0, error
    assert "then, submitted by the job choose: 1 cell of a\n" in said
    assert [row.stage for row in rows(run)][-1] == "choose"
    states = {each.result: each.state for each in snapshot.read(run).elements}
    assert states["a/seed0"] == snapshot.MISSING and states["tuning/a/train.lr=0.1/seed0"] == snapshot.WAITING

    end_jobs(stand_in)
    for rate, accuracy in ((0.1, 0.5), (0.2, 0.9), (0.4, 0.7)):  # scratch/seed0 has failed
        finish(out / f"tuning/a/train.lr={rate}/seed0", "teacher", "train_scratch", accuracy=accuracy)
    # the study is edited while its jobs wait, which changes nothing
    study_file(tmp_path, TUNED.replace("scratch}}", "scratch, train.epochs: 9}}"), UNTUNED, seeds="[0, 1, 2]")
    before = len(submitted(stand_in))
    stand_in.says("queue/7", "7|7|N/A|RUNNING|None|node1|0:10|" + str(run / "slurm/1/choose.sbatch"))
    assert last_job(run / "slurm/1", "choose", monkeypatch) == 0, capsys.readouterr().err
    array, last = submitted(stand_in)[before:]
    assert "--array=4" in array and "gather.sbatch" in last
    works_there = json.loads((run / "slurm/2/cells.json").read_text())
    assert [work["cell"] for work in works_there] == ["a/seed0"], "not what has failed before"
    assert "lr: 0.2" in (out / "a/seed0/recipe.yaml").read_text()
    assert "WORK=" + str(ROOT) in (run / "slurm/2/cells-1.sbatch").read_text()
    assert json.loads((run / "choose/result.json").read_text()) == {"missing": ["scratch/seed0", "a/seed0"]}

    # started once more, after a requeue
    assert last_job(run / "slurm/1", "choose", monkeypatch) == 0
    assert len(submitted(stand_in)) == before + 2
    # and what failed ends it: tables, no more jobs
    assert last_job(run / "slurm/2", "gather", monkeypatch) == 0
    assert len(submitted(stand_in)) == before + 2
    table = json.loads((out / "study.json").read_text())
    assert table["missing"] == ["scratch/seed0", "a/seed0"] and table["tuning"]["a"]["chosen"] == ["train.lr=0.2"]


def test_trials_that_fail_choose_nothing(command, stand_in, tmp_path, monkeypatch):  # noqa: F811
    run = tmp_path / "out/jobs"
    command("submit", variants=TUNED, more=UNTUNED)
    end_jobs(stand_in)
    before = len(submitted(stand_in))
    assert last_job(run / "slurm/1", "choose", monkeypatch) == 0
    assert len(submitted(stand_in)) == before and not (run / "slurm/2").exists()


def test_where_jobs_may_not_submit_there_is_the_table_and_a_reason(command, stand_in, tmp_path, monkeypatch, capsys):  # noqa: F811
    out, run = tmp_path / "out", tmp_path / "out/jobs"
    command("submit", variants=TUNED, more=UNTUNED)
    end_jobs(stand_in)
    for rate in (0.1, 0.2, 0.4):
        finish(out / f"tuning/a/train.lr={rate}/seed0", "teacher", "train_scratch")
    stand_in.says("refuse", "slurm/2/")
    assert last_job(run / "slurm/1", "choose", monkeypatch) == 1
    assert "error: sbatch failed: sbatch: error: invalid partition" in capsys.readouterr().err
    assert (out / "study.md").is_file() and not (run / "choose/result.json").exists()
    os.unlink(stand_in.folder / "refuse")
    code, said, error = command("submit", variants=TUNED, more=UNTUNED)
    assert code == 0 and "to make: 2 in" in said, error
