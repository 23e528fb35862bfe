"""run_phase for real: the example of its documentation in a fresh interpreter, and the same numbers as the command."""

import inspect
import json
import subprocess
import sys
import textwrap

import trainer
from tests.integration.test_bad_input import files
from tests.launch import ROOT, TINY, TINY_RECIPE, environment
from trainer import api, load_recipe, load_results


def test_the_documented_example(tmp_path):
    """On one process, without launcher; called twice, the second call finds the phase complete."""
    code = [line for line in inspect.getdoc(api).splitlines() if line.startswith("    ")]
    code = (
        textwrap.dedent("\n".join(code)).replace("recipes/demo.yaml", TINY_RECIPE).replace("runs/mine", str(tmp_path))
    )
    assert "run_phase(" in code
    script = tmp_path / "script.py"
    script.write_text(f"{code}\n{code}\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, timeout=120,
                          env=environment() | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    accuracy = json.loads((tmp_path / "teacher/result.json").read_text())["metrics"]["accuracy"]
    printed = [line for line in done.stdout.splitlines() if "dict_keys" in line]
    assert printed == [f"{accuracy} dict_keys(['teacher'])"] * 2
    assert done.stderr.count("[teacher] accuracy") + done.stdout.count("[teacher] accuracy") == 1


def phases_one_by_one(out: str) -> None:
    """Part of the chain on this rank, as a script would."""
    recipe = load_recipe(TINY_RECIPE)
    teacher = trainer.run_phase(recipe, "teacher", out=out, ds_config=TINY[1])
    assert teacher["phase"] == "teacher" and teacher["world_size"] == 2
    trainer.run_phase(recipe, "meta", out=out, ds_config=TINY[1])
    modules = trainer.run_phase(recipe, "distill", out=out, ds_config=TINY[1])
    assert list(modules) == ["distill_0", "distill_1"]
    assert trainer.run_phase(recipe, "distill", out=out, ds_config=TINY[1], module=1) == modules["distill_1"]


def test_several_phases_in_one_process_give_what_the_command_gives(warm, chain, tmp_path):
    finished = warm.call("tests.integration.test_api_runs:phases_one_by_one", str(tmp_path), ranks=2)
    assert finished.code == 0, finished.output
    assert load_results(tmp_path).keys() == {"teacher", "meta", "distill_0", "distill_1"}
    for phase in load_results(tmp_path):
        ours, theirs = (files(out / phase)["model.safetensors"] for out in (tmp_path, chain[0]))
        assert ours == theirs, phase


def test_a_whole_run_repeated_from_its_folder(warm, chain, tmp_path):
    finished = warm.run(["--config", chain[0], "--out", tmp_path], ranks=2)
    assert finished.code == 0, finished.output
    expected = {name: digest for name, digest in files(chain[0]).items() if name.endswith("/model.safetensors")}
    assert len(expected) == 6
    assert {name: digest for name, digest in files(tmp_path).items() if name in expected} == expected
