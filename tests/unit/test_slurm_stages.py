"""Which jobs the chain makes of recipes with experts, a second round, a grown teacher or a given start."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.unit.test_plan import speed_of
from tests.unit.test_slurm_chain import RECIPE, ROOT, calls, fake, finish, settings_for  # noqa: F401  a fixture
from trainer.artifacts import missing
from trainer.chain import cost, plan, submit
from trainer.chain.following import status
from trainer.config.load import load_recipe
from trainer.request.stages import chain, hub_names, stages

EXPERTS = ("distill.level=expert", "student.moe.num_experts=2")
MODULES = ("distill_0", "distill_1", "distill_2")


def needs_of(*overrides):
    return {stage.name: stage.needs for stage in chain(load_recipe(RECIPE, list(overrides)))}


def stage_of(name, *overrides):
    return next(stage for stage in chain(load_recipe(RECIPE, list(overrides))) if stage.name == name)


def test_experts_are_an_array_over_modules_and_experts_between_clusters_and_modules():
    assert needs_of(*EXPERTS) == {
        "teacher": (), "meta": ("teacher",), "cluster": ("meta",), "expert": ("cluster",), "distill": ("expert",),
        "train": ("distill",), "evaluate": ("train",),
    }  # fmt: skip
    expert, distill = stage_of("expert", *EXPERTS), stage_of("distill", *EXPERTS)
    names = ("expert_0_0", "expert_0_1", "expert_1_0", "expert_1_1", "expert_2_0", "expert_2_1")
    assert (expert.array, expert.experts, expert.artifacts) == (True, 2, names)
    assert expert.inputs == ("teacher", "meta", "cluster_0", "cluster_1", "cluster_2")
    assert distill.inputs == (*expert.inputs, *names) and distill.artifacts == MODULES
    assert "expert" not in needs_of(*EXPERTS, "distill.source=someone/run")  # modules that come whole


@pytest.mark.parametrize("element, flags", [("0", "--module 0 --expert 0"), ("11", "--module 2 --expert 3")])
def test_the_job_body_finds_module_and_expert_of_an_element(element, flags):
    for experts, expected in (("4", flags), ("0", f"--module {element}")):
        command = f'source {ROOT}/slurm/body.sh; EXPERTS={experts}; choose {element}; echo "${{part[@]}}"'
        assert subprocess.run(["bash", "-c", command], capture_output=True, text=True).stdout.strip() == expected


def test_the_level_can_be_chosen_at_submission(tmp_path, fake):  # noqa: F811
    settings = settings_for(tmp_path, level="expert", nodes="2,expert=1,cluster=1", array_throttle=5)
    finish(settings, "teacher", "meta", "cluster_0", "cluster_1", "cluster_2", "expert_0_0", "expert_2_3")
    for name, expert in (("expert_0_0", 0), ("expert_2_3", 3)):  # finish() knows nothing of experts
        path = settings.run / name / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"module": int(name[7]), "expert": expert}))
    submit.submit(settings)
    made = calls(fake, "sbatch")
    assert [Path(call.split()[-1]).stem for call in made] == ["expert", "distill", "train", "evaluate"]
    assert "--array=1-10%5 " in made[0] and "--dependency" not in made[0]
    script = (settings.run / "slurm/1/expert.sbatch").read_text()
    assert (
        "\n#SBATCH --nodes=1\n" in script
        and "\nEXPERTS=4\n" in script
        and "--module" not in script.split("EXPERTS=")[0]
    )
    assert "\n#SBATCH --nodes=2\n" in (settings.run / "slurm/1/distill.sbatch").read_text()
    recipe = load_recipe(settings.run / "slurm/1/recipe.yaml")
    assert (
        recipe.distill.level == "expert"
        and missing(stage_of("expert", "distill.level=expert"), settings.run, recipe)[0] == 1
    )


def test_a_second_round_in_parallel_is_an_array():
    refine = stage_of("refine", "refine.epochs=2")
    assert refine.array and refine.needs == ("distill",) and refine.artifacts == ("refine_0", "refine_1", "refine_2")
    assert refine.inputs == ("teacher", "meta", *MODULES)
    train = stage_of("train", "refine.epochs=2")
    assert train.needs == ("refine",) and train.inputs == ("teacher", "meta", *refine.artifacts)


def test_a_second_round_in_order_is_a_job_per_module_behind_the_one_before(tmp_path, fake):  # noqa: F811
    overrides = ("refine.epochs=2", "refine.order=sequential")
    needs = needs_of(*overrides)
    assert needs["refine_0"] == ("distill",) and needs["refine_1"] == ("refine_0",) and needs["train"] == ("refine_2",)
    assert stage_of("refine_1", *overrides).inputs == ("teacher", "meta", "refine_0", "distill_1")
    settings = settings_for(tmp_path, overrides=overrides, nodes="2,refine=1", time="24:00:00,refine=01:00:00")
    finish(settings, "teacher", "meta", *MODULES, "refine_0")
    submit.submit(settings)
    made = [(row.stage, row.array, row.depends) for row in submit.rows(settings.run)]
    assert made == [("refine_1", "-", "-"), ("refine_2", "-", "101"), ("train", "-", "102"), ("evaluate", "-", "103")]
    script = (settings.run / "slurm/1/refine_2.sbatch").read_text()
    assert "--phase refine --module 2)" in script and "\nARTIFACTS=(refine_2)\n" in script
    assert "\n#SBATCH --nodes=1\n" in script and "\n#SBATCH --time=01:00:00\n" in script


@pytest.mark.parametrize(
    "overrides",
    [("refine.epochs=2", "refine.order=together"), ("refine.order=fit", "distill.stitches=tied")],
    ids=["together", "fit"],
)
def test_a_second_round_of_all_modules_together_is_one_job(tmp_path, fake, overrides):  # noqa: F811
    needs, names = needs_of(*overrides), ("refine_0", "refine_1", "refine_2")
    assert needs["refine"] == ("distill",) and needs["train"] == ("refine",)
    refine = stage_of("refine", *overrides)
    assert not refine.array and refine.inputs == ("teacher", "meta", *MODULES)
    assert refine.artifacts == names[::-1]  # the job's body looks at the first, which is complete last
    assert stage_of("train", *overrides).inputs == ("teacher", "meta", *names)
    settings = settings_for(tmp_path, overrides=overrides, time="24:00:00,refine=01:00:00")
    finish(settings, "teacher", "meta", *MODULES, "refine_0")  # ended between two results
    submit.submit(settings)
    assert [(row.stage, row.array, row.depends) for row in submit.rows(settings.run)] == [
        ("refine", "-", "-"), ("train", "-", "101"), ("evaluate", "-", "102"),
    ]  # fmt: skip
    script = (settings.run / "slurm/1/refine.sbatch").read_text()
    assert "--phase refine)" in script and "--array" not in script
    orders = submit.plan_orders(settings, load_recipe(RECIPE, list(overrides)), tmp_path / "scripts")
    flops = {name: 3.6e12 for order in orders for name in order.stage.artifacts}
    rows = {line.split()[0]: line.split() for line in cost.cost(settings, orders, flops, speed_of(1e9)).splitlines()}
    assert rows["refine"][1] == "1" and rows["refine"][-1] == str(settings.ranks_of("refine"))


def test_a_grown_teacher_comes_after_the_meta_model():
    grown = ("teacher.grown=true", "meta.init=scratch", "meta.objective=labels", "hub.repo=alice/model")
    needs = needs_of(*grown)
    assert needs == {
        "download": (), "meta": ("download",), "incubate": ("meta",), "assemble": ("incubate",),
        "distill": ("assemble",), "train": ("distill",), "evaluate": ("train",), "push": ("download", "evaluate"),
    }  # fmt: skip
    assert stage_of("meta", *grown).inputs == () and stage_of("incubate", *grown).array
    assert stage_of("assemble", *grown).inputs == ("meta", "incubate_0", "incubate_1", "incubate_2")
    assert stage_of("distill", *grown).inputs == ("assemble", "meta")


def test_what_training_does_not_start_from_is_not_made():
    given = "train.init=someone/vmoe"
    assert needs_of(given) == {"download": (), "train": ("download",), "evaluate": ("train",)}
    assert stage_of("train", given).inputs == ()
    assert needs_of(given, "train.kd_weight=0.5")["train"] == ("teacher",)
    assert needs_of(given, "train.border_weight=1")["train"] == ("meta",)
    assert stage_of("train", given, "train.border_weight=1").inputs == ("teacher", "meta")
    assert list(needs_of("train.start=scratch")) == ["teacher", "train", "evaluate"]
    assert needs_of("train.start=upcycled", "student.init=teacher")["train"] == ("teacher",)
    rival = stage_of("train", "train.start=scratch_equal_cost", *EXPERTS)  # needs what everything before has cost
    assert rival.needs == ("distill",) and {"cluster_1", "expert_2_1", "distill_2"} <= set(rival.inputs)
    assert [stage.name for stage in stages(load_recipe(RECIPE, ["train.start=scratch"]))][:3] == [
        "teacher",
        "meta",
        "distill",
    ]


def test_everything_that_lies_on_the_hub_is_downloaded_first(tmp_path):
    words = ["teacher.source=a/teacher", "meta.source=a/run", "distill.source=a/run", "student.init=a/dense"]
    assert hub_names(load_recipe(RECIPE, words)) == ["a/teacher", "a/run", "a/dense"]
    assert hub_names(load_recipe(RECIPE, ["student.init=teacher", f"train.init={tmp_path}"])) == []


def test_plan_names_module_and_expert_and_counts_every_element(tmp_path):
    settings = settings_for(tmp_path, level="expert", overrides=("refine.epochs=1", "refine.order=sequential"))
    recipe, _ = submit.load(settings)
    orders = submit.plan_orders(settings, recipe, tmp_path / "scripts")
    text = plan.commands(settings, orders)
    assert "--phase expert --module $((SLURM_ARRAY_TASK_ID / 4)) --expert $((SLURM_ARRAY_TASK_ID % 4))" in text
    assert "trainer/run.py --phase refine --module 1\n" in text
    flops = {name: 3.6e12 for order in orders for name in order.stage.artifacts}  # an hour of one rank each
    rows = {line.split()[0]: line.split() for line in cost.cost(settings, orders, flops, speed_of(1e9)).splitlines()}
    assert rows["expert"][1] == "12" and rows["expert"][-2] == "12" and rows["refine_2"][1] == "1"


def test_status_finds_the_log_of_one_expert(tmp_path, fake, capsys):  # noqa: F811
    settings = settings_for(tmp_path, level="expert")
    finish(settings, "teacher", "meta", "cluster_0", "cluster_1", "cluster_2")
    submit.submit(settings)
    for element, step in ((1, 5), (11, 7)):
        folder = settings.run / f"logs/expert-101_{element}"
        folder.mkdir(parents=True)
        (folder / "node1-rank0.out").write_text(f"[expert] epoch 1/8 step {step}/20 loss 2.1 eta 0:00:31\n")
    (fake / "queue").write_text("101_1|101|1|RUNNING|None|node1|0:42\n101_11|101|11|RUNNING|None|node1|0:42\n")
    capsys.readouterr()
    status.show(settings)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "step 5/20" in lines["expert_0_1"] and "step 7/20" in lines["expert_2_3"]
    assert "RUNNING" in lines["expert_2_3"] and lines["cluster_2"].split()[2] == "done"
