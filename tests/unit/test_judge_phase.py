"""evaluate.tasks: checked before anything is made, measured by phase evaluate, and shown in the run's report."""

import json

import pytest

from tests.judging import folder_of
from tests.launch import ROOT
from tests.run_folder import finish_run, new_recipe, new_student
from trainer.api import run_phase
from trainer.config.ds_config import read_ds_config
from trainer.report.write import write_report
from trainer.request.job import Job

DS = str(ROOT / "ds_configs/cpu_debug.json")


@pytest.fixture
def data(tmp_path):
    for split, count in (("train", 12), ("validation", 10)):
        folder_of(tmp_path / "data" / split, {"ant": count, "bee": count, "cat": count}, seed=1)
    return {"path": str(tmp_path / "data")}


def test_the_phase_judges_its_student(tmp_path, data):
    other = folder_of(tmp_path / "other", {"cat": 5, "ant": 7}, seed=2)
    tasks = ("knn", f"accuracy:data={other}", "fewshot:ways=2,shots=1,queries=2,episodes=5")
    sections = {"data": data, "evaluate": {"tasks": tasks, "resamples": 100}, "run": {"inference": False}}
    recipe = new_recipe(**sections)
    out = tmp_path / "run"
    finish_run(out, recipe, new_student())
    result = run_phase(recipe, "evaluate", out=out, ds_config=DS)
    judged = json.loads((out / "evaluate" / "judged.json").read_text())
    assert [task["text"] for task in judged["tasks"]] == list(tasks)
    top = judged["tasks"][1]["results"]["student"]["figures"]["top-1"]
    assert top["low"] <= top["value"] <= top["high"]
    assert result["judged"][tasks[1]]["top-1"] == top["value"]
    assert judged["tasks"][1]["results"]["student"]["images"] == 12
    write_report(out)
    page = (out / "report.html").read_text()
    assert "k-NN accuracy" in page and "2-way 1-shot, mean" in page

    (out / "evaluate" / "judged.json").write_text('{"models": [{"name": "x"}], "tasks": [{"text": 3}]}')
    write_report(out)
    assert "evaluate/judged.json is not what an evaluation writes" in (out / "report.html").read_text()

    # measured anew without them, nothing is left
    run_phase(new_recipe(**sections | {"evaluate": {"tasks": ()}}), "evaluate", out=out, ds_config=DS)
    assert not (out / "evaluate" / "judged.json").exists()


def test_mistakes_are_found_before_anything_is_made(tmp_path, data):
    def refuse(task, message):
        recipe = new_recipe(data=data, evaluate={"tasks": [task]}, run={"inference": False})
        finish_run(tmp_path / "run", recipe, new_student())
        with pytest.raises(ValueError, match=message):
            run_phase(recipe, "evaluate", out=tmp_path / "run", ds_config=DS)

    refuse("fewshot:ways=4", "has 0 classes of 35 images or more")
    refuse("accuracy:data=nowhere", "data.path 'nowhere' is no folder")
    recipe = new_recipe(evaluate={"tasks": ["fewshto"]})
    with pytest.raises(ValueError, match=r"evaluation 'fewshto' is not known. Did you mean fewshot"):
        Job.checked(recipe, read_ds_config(DS), "teacher", None, tmp_path, "command")
