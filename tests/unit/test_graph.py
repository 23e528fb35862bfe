"""The table of phases: a toy phase is one row and one file (this one), and everything that knows phases knows it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer import api, load_recipe
from trainer.artifacts import missing
from trainer.config.load import to_dict
from trainer.phases import code_of
from trainer.plan.rehearsal import DryRun, carry_out
from trainer.request import graph
from trainer.request.graph import OF_META, TABLE, Phase
from trainer.request.job import Job
from trainer.request.stages import chain, stages
from trainer.teaching.estimate import Cost, Rehearsed

ROOT = Path(__file__).resolve().parents[2]
calls = []


def run(run, module):
    """The toy phase's own."""
    calls.append(module)


def rehearse(run, module, known):
    return Rehearsed(f"nothing to it, after {sorted(known)}", {f"toy_{module}": Cost(1.0, 2.0)})


@pytest.fixture
def toy(monkeypatch):
    """A phase that looks at each module of the meta model, and that end-to-end training waits for."""
    row = Phase(
        "toy",
        "look at meta module --module i (or all)",
        repeated="module",
        defined_by=(*OF_META, "run"),
        needs=lambda recipe, start: ("meta",),
        section="meta",
        trains=lambda recipe: False,
        refused=lambda recipe: "no toys with three modules" if recipe.modules == 3 else "",
        code=__name__,
    )
    table = list(TABLE)
    table.insert(3, row)
    monkeypatch.setattr(graph, "TABLE", table)
    monkeypatch.setattr("trainer.request.stages.TABLE", table)
    monkeypatch.setattr("trainer.plan.rehearsal.TABLE", table)
    calls.clear()
    return row


def recipe_with(*overrides):
    return load_recipe(ROOT / "tests/fixtures/tiny.yaml", overrides)


def job_for(phase, *overrides, module=None):
    return Job.checked(recipe_with(*overrides), {}, phase, module, Path("out"), "typed")


def test_a_new_row_is_a_phase(toy):
    assert graph.phase_help()["toy"] == toy.help and list(graph.phase_help())[3] == "toy"
    assert job_for("all").phases[:3] == ["teacher", "meta", "toy"]
    assert job_for("toy").artifacts == ["toy_0", "toy_1"]
    assert job_for("toy", module="1").artifacts == ["toy_1"]
    assert graph.command_of("toy_1") == "--phase toy --module 1"
    assert "toy" in graph.stage_names() and "toy" in graph.by_module()
    with pytest.raises(ValueError, match="no toys with three modules"):
        job_for("toy", "modules=3")
    with pytest.raises(ValueError, match="got 2"):
        job_for("toy", module=2)


def test_what_defines_its_result_is_in_its_row(toy):
    values = [to_dict(recipe_with(change)) for change in ("train.epochs=2", "train.epochs=3", "run.keep=7")]
    ours, other_training, other_run = (graph.defining(value, "toy_0") for value in values)
    assert ours == other_training != other_run


def test_it_is_a_job_of_the_slurm_chain(toy, tmp_path):
    recipe = recipe_with()
    stage = next(stage for stage in stages(recipe) if stage.phase == "toy")
    assert (stage.needs, stage.inputs, stage.artifacts) == (("meta",), ("meta",), ("toy_0", "toy_1"))
    assert stage.array and stage.setting == "toy"
    assert missing(stage, tmp_path, recipe) == [0, 1]
    assert "toy" not in {stage.phase for stage in chain(recipe)}  # nothing that is trained needs it


def test_it_is_called_and_rehearsed(toy, tmp_path):
    job = job_for("toy")
    api._run(SimpleNamespace(), job, "toy")
    assert calls == [0, 1] and code_of("toy").run is run
    ds_values = {"train_batch_size": "auto", "zero_optimization": {"stage": 1}}
    layout = dict.fromkeys(graph.stage_names(), (1, 1))
    dry = DryRun(job.recipe, ds_values, tmp_path, layout, str(tmp_path))
    good, problems = carry_out(dry.checks({"meta", "toy"}))
    assert problems == []
    assert "toy_0: nothing to it, after ['meta', 'teacher']" in good
    assert dry.costs["toy_1"] == Cost(1.0, 2.0)


def test_every_row_has_its_file():
    for row in TABLE:
        code = code_of(row.name)
        assert callable(code.run)
        assert hasattr(code, "rehearse") == bool(row.section)
