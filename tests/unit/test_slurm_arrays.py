"""Arrays as ranges, and several of them where the cluster's limit wants it."""

import json
import subprocess

import pytest

from tests.unit.slurm_stand_in import stand_in  # noqa: F401
from tests.unit.test_slurm_chain import ROOT, finish, settings_for
from trainer.chain import slurm, submit
from trainer.chain.arrays import TEXT_LIMIT, Array, ranges, split
from trainer.chain.following import snapshot, status


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and ranges([3]) == "3"


@pytest.mark.parametrize(
    "elements, max_size, arrays",
    [
        (range(1536), None, ["0-1535"]),
        (range(1536), 2000, ["0-1535"]),
        (range(1001), 1001, ["0-1000"]),
        (range(1536), 1001, ["0-1000", "0-534"]),
        ([2, 1000, 1001, 1500], 1001, ["0,998-999", "0"]),
        ([1200, 1535], 1001, ["0,335"]),
        ([], 1001, []),
    ],
)
def test_every_element_is_in_one_array_whose_ids_are_allowed(elements, max_size, arrays):
    found = split(list(elements), max_size)
    assert [array.text for array in found] == arrays
    assert [element for array in found for element in array.elements] == list(elements)


def test_a_text_that_slurm_would_not_take_is_split():
    found = split(range(0, 4000, 2), None)
    assert len(found) == 3 and all(len(array.text) <= TEXT_LIMIT and array.offset == 0 for array in found)
    assert found[0] == Array(tuple(range(0, 2 * len(found[0].elements), 2)), 0)


def test_more_experts_than_an_array_may_have(tmp_path, stand_in, capsys):  # noqa: F811
    """12 experts where an array ends at 4: elements 0-4, 5-9 and 10-11 of the one stage."""
    stand_in.says("config", "MaxArraySize            = 5\n")
    settings = settings_for(tmp_path, level="expert", array_throttle=2)
    finish(settings, "teacher", "meta", "cluster_0", "cluster_1", "cluster_2")
    assert submit.submit(settings) == 0
    rows = submit.rows(settings.run)
    assert [(row.stage, row.array, row.job, row.offset) for row in rows[:3]] == [
        ("expert", "0,1,2,3,4", "101", "0"), ("expert", "5,6,7,8,9", "102", "5"), ("expert", "10,11", "103", "10"),
    ]  # fmt: skip
    asked = [call.split()[1] for call in stand_in.calls("sbatch") if "--test-only" not in call]
    assert asked[:3] == ["--array=0-4%2", "--array=0-4%2", "--array=0-1%2"]
    assert rows[3].stage == "distill" and rows[3].depends == "101:102:103"
    assert "expert [5-9]: job 102\n" in capsys.readouterr().out

    # element 7 is task 2 of the second array: module 1, expert 3 of 4, as the body has it
    script = (settings.run / "slurm/1/expert-2.sbatch").read_text().splitlines()
    wanted = ("STAGE=", "ELEMENTS=", "OFFSET=", "PER_JOB=", "EXPERTS=", "ARTIFACTS=")
    lines = [line for line in script if line.startswith(wanted)]
    lines += ["task=2 SLURM_ARRAY_JOB_ID=102", f"source {ROOT}/slurm/body.sh", "choose $(elements_of_job)"]
    command = "\n".join([*lines, 'echo "$artifact ${part[@]} $name"'])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (
        done.stdout == "expert_1_3 --module 1 --expert 3 expert-102_2\n"
    )  # the last: its logs, as status looks for them

    # and status finds it there
    stand_in.says("queue/102", "102_2|102|2|RUNNING|None|node1|0:42|x\n")
    status.show(settings)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "102_2" in lines["expert_1_3"] and "RUNNING" in lines["expert_1_3"] and "102_2" not in lines["expert_1_0"]


def test_elements_that_share_a_job(tmp_path, stand_in, capsys):  # noqa: F811
    """Ten of 12 experts are missing, 4 to a job: tasks 0 to 2. The second is at its second element."""
    settings = settings_for(tmp_path, level="expert", elements_per_job="1,expert=4")
    finish(settings, "teacher", "meta", "cluster_0", "cluster_1", "cluster_2", "expert_0_0", "expert_1_2")
    for name, expert in (("expert_0_0", 0), ("expert_1_2", 2)):  # finish() knows nothing of experts
        path = settings.run / name / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"module": int(name[7]), "expert": expert}))
    assert submit.submit(settings) == 0
    assert "expert [1-5,7-11] in 3 jobs: job 101\n" in capsys.readouterr().out
    row = submit.rows(settings.run)[0]
    assert (row.array, row.offset, row.per_job) == ("1,2,3,4,5,7,8,9,10,11", "0", "4")
    assert next(call for call in stand_in.calls("sbatch") if "--test-only" not in call).split()[1] == "--array=0-2"
    logs = sorted(path.name for path in (settings.run / "logs").glob("expert*"))
    assert logs == ["expert-101_0.out", "expert-101_1.out", "expert-101_2.out"]

    (settings.run / "slurm/events").mkdir()
    noted = {"expert_1_0": "done\texit 0", "expert_1_1": "started\ton node1", "expert_2_0": "failed\texit 1: x"}
    for number, (name, text) in enumerate(noted.items()):
        job = "101_2" if name == "expert_2_0" else "101_1"
        (settings.run / f"slurm/events/{name}.tsv").write_text(f"2026-01-01T00:00:0{number}Z\t{job}\t0\t{text}\n")
    (settings.run / "expert_1_0").mkdir()
    (settings.run / "expert_1_0/result.json").write_text('{"metrics": {}}')
    for task in (1, 2):
        stand_in.says(f"queue/101_{task}", f"101_{task}|101|{task}|RUNNING|None|node1|0:42|x\n")
    states = {each.result: each for each in snapshot.read(settings.run).elements}
    assert states["expert_1_0"].state == snapshot.DONE and states["expert_1_1"].state == snapshot.RUNNING
    assert (states["expert_2_0"].state, states["expert_2_0"].detail) == (snapshot.ENDED, "exit 1: x")
    assert states["expert_2_1"].state == snapshot.RUNNING, "its turn comes"
    assert (states["expert_1_1"].job, states["expert_1_1"].rank_logs) == ("101_1", ("expert-101_1.5",))


def test_jobs_that_make_several_elements_have_ids_as_any_other():
    assert [array.text for array in split(range(1536), 1001, 8)] == ["0-191"]
    first, second, *_ = split(range(2, 30), 4, 2)
    assert (first.text, first.elements, first.offset, second.offset) == ("0-3", tuple(range(2, 10)), 1, 5)


def test_rows_of_an_older_version_are_read(tmp_path):
    path = tmp_path / "jobs.tsv"
    path.write_text("submitted\tstage\tarray\tjob\tdepends\tscript\nnow\tmeta\t-\t12\t-\ta.sbatch\nnow\tcut off")
    assert submit.rows(tmp_path) == [submit.Row("now", "meta", "-", "12", "-", "a.sbatch")]


@pytest.mark.parametrize(
    "words, advice",
    [
        ("Batch job submission failed: Pathname of a file, directory or other parameter too long", "shorter --out"),
        ("QOSMaxSubmitJobPerUserLimit", "each job of an array counts"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "--elements-per-job"),
    ],
)
def test_what_slurm_refuses_comes_with_advice(stand_in, words, advice):  # noqa: F811
    program = stand_in.folder / "sbatch"
    program.write_text(f'#!/bin/bash\necho "sbatch: error: {words}" >&2; exit 1\n')
    with pytest.raises(slurm.SlurmError, match=advice):
        slurm.submit([], "x.sbatch")


def test_the_driver_script_names_every_setting():
    """What cannot be set by environment would be a flag only; the block at the top is what users edit."""
    from trainer.chain.settings import Settings

    text = (ROOT / "slurm/m2mkd_vmoe.sh").read_text()
    rarely = {"warn_seconds", "max_requeues", "max_idle_requeues", "speed_from", "overrides"}
    for name in set(Settings.__dataclass_fields__) - rarely:
        assert f"\n{name.upper()}=${{{name.upper()}:-" in text, name
