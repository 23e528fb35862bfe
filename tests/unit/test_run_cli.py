"""The command line as users type it: what is refused, with which words and exit code, and without loading torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer.config import load_recipe, to_dict
from trainer.ds_config import read_ds_config
from trainer.run import PHASES, _parse, _read

ROOT = Path(__file__).resolve().parents[2]
RECIPE, DS_CONFIG = str(ROOT / "recipes/demo.yaml"), str(ROOT / "ds_configs/cpu_debug.json")
START = ["--recipe", RECIPE, "--ds_config", DS_CONFIG]
HEAVY = ("torch", "numpy", "timm", "transformers", "deepspeed", "datasets", "matplotlib", "models")
# ends like `python trainer/run.py`, but first says which of the heavy packages were loaded
WRAPPER = f"""
import runpy, sys
sys.argv[0] = {str(ROOT / "trainer/run.py")!r}
sys.path.insert(0, "what python puts there for a script: its folder")
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("loaded:", *[name for name in {HEAVY!r} if name in sys.modules])
"""


def command_line(arguments, folder, **environment):
    """Run trainer/run.py in another folder than the repository; returns (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-c", WRAPPER, *map(str, arguments)],
        capture_output=True, text=True, cwd=folder, timeout=60, env={"PATH": "", **environment},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def refused(arguments, folder, **environment):
    """The one line said about arguments that are refused before torch is loaded."""
    code, out, err = command_line(arguments, folder, **environment)
    assert code == 2, err
    assert out == "loaded:\n"
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert not any(folder.iterdir())
    return err.removeprefix("error: ").rstrip("\n")


def test_help_names_every_phase_and_loads_nothing_heavy(tmp_path):
    code, out, err = command_line(["--help"], tmp_path)
    assert (code, err) == (0, "")
    assert out.endswith("loaded:\n")
    assert all(phase in out for phase in PHASES)
    assert "--local_rank" not in out


def test_a_misspelt_flag(tmp_path):
    assert refused([*START, "--phase", "meta", "--outt", "x"], tmp_path) == "unknown flag --outt. Did you mean --out?"


def test_an_unknown_key_names_the_close_ones(tmp_path):
    said = refused([*START, "--phase", "meta", "--out", "x", "train.epoch=3"], tmp_path)
    assert said == "unknown key train.epoch. Did you mean train.epochs?"


def test_a_module_out_of_range(tmp_path):
    said = refused([*START, "--phase", "distill", "--module", "4", "--out", "x"], tmp_path)
    assert said == "--phase distill needs --module 0..3 or all, got 4"


def test_a_missing_recipe_lists_the_ones_there(tmp_path):
    said = refused(["--recipe", ROOT / "recipes/dmeo.yaml", *START[2:], "--phase", "meta", "--out", "x"], tmp_path)
    assert "no recipe at " in said and "demo.yaml" in said.split("Recipes there:")[1]


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID"])
def test_only_the_first_rank_says_it(tmp_path, name):
    arguments = [*START, "--phase", "distill", "--module", "4", "--out", "x"]
    assert command_line(arguments, tmp_path, **{name: "1"}) == (2, "loaded:\n", "")
    assert refused(arguments, tmp_path, **{name: "0"})


def bad(arguments):
    """The same without a process of its own: the message."""
    with pytest.raises(ValueError) as error:
        _read(_parse([str(a) for a in arguments]))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--out is missing: give the folder of the run"),
        (["--out", "x"], "--recipe, --ds_config and --phase are needed (or --config"),
        (["--out", "x", *START], "--recipe, --ds_config and --phase are needed"),
        (["--out", "x", *START, "--phase", "distil"], "argument --phase: invalid choice: 'distil' (choose from"),
        (["--out", "x", *START, "--phase"], "argument --phase: expected one argument"),
        (["--out", "x", *START, "--phase", "meta", "--phas=e"], "unknown flag --phas=e. Did you mean --phase?"),
        (["--out", "x", *START, "--phase", "meta", "--zzzzzz"], "unknown flag --zzzzzz. See --help"),
        (["--out", "x", *START, "--phase", "meta", "epochs"], "cannot read the override 'epochs'"),
        (["--out", "x", *START, "--phase", "meta", "ds.zero=1"], 'unknown key "zero"'),
        (["--out", "x", *START, "--phase", "meta", "ds=1"], "unknown key ds."),
        (["--out", "x", *START, "--phase", "meta", "--module", "1"], "--module 1 has no meaning for --phase meta"),
        (["--out", "x", *START, "--phase", "distill", "--module", "-1"], "needs --module 0..3 or all, got -1"),
        (["--out", "x", *START, "--phase", "distill", "--module", "1.0"], "needs --module 0..3 or all, got 1.0"),
        (["--out", "x", *START, "--phase", "distill", "--module", "²"], "needs --module 0..3 or all, got ²"),
        (["--out", "x", *START, "--phase", "distill", "--module", "2", "modules=2"], "--module 0..1 or all, got 2"),
    ],
)
def test_refused(arguments, said):
    assert said in bad(arguments)


@pytest.mark.parametrize(
    "phase, module, expected",
    [("distill", "3", 3), ("distill", "all", "all"), ("distill", None, "all"), ("train", None, None),
     ("all", "all", None)],
)  # fmt: skip
def test_the_module(phase, module, expected):
    arguments = [*START, "--phase", phase, "--out", "x", *(["--module", module] if module else [])]
    assert _read(_parse(arguments))[2:] == (phase, expected)


def test_overrides_may_stand_anywhere():
    arguments = ["seed=3", *START, "data.workers=1", "--phase", "meta", "ds.trainer.ep_size=2", "--out", "x",
                 "--local_rank=1", "train.epochs=9"]  # fmt: skip
    recipe, ds_values, phase, _ = _read(_parse(arguments))
    assert (recipe.seed, recipe.data.workers, recipe.train.epochs, phase) == (3, 1, 9, "meta")
    assert ds_values["trainer"]["ep_size"] == 2


def saved(folder, **changes):
    """A config.yaml as a run writes it."""
    recipe = load_recipe(RECIPE, ["seed=7", "train.lr=0.5"])
    values = {"phase": "distill", "module": 2, "command": "trainer/run.py ...",
              "ds_config": read_ds_config(DS_CONFIG, ["ds.gradient_accumulation_steps=4"]),
              "recipe": to_dict(recipe)}  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path, recipe


def test_config_repeats_a_saved_phase(tmp_path):
    path, expected = saved(tmp_path)
    recipe, ds_values, phase, module = _read(_parse(["--config", str(path), "--out", "x"]))
    assert (recipe, phase, module) == (expected, "distill", 2)
    assert ds_values["gradient_accumulation_steps"] == 4


def test_config_takes_no_changes(tmp_path):
    path, _ = saved(tmp_path)
    for more in (["seed=1"], ["ds.x=1"], ["--recipe", RECIPE], ["--ds_config", DS_CONFIG]):
        assert "leave out --recipe, --ds_config and overrides" in bad(["--config", path, "--out", "x", *more])


def test_configs_that_are_none(tmp_path):
    assert "no saved configuration at" in bad(["--config", tmp_path / "no.yaml", "--out", "x"])
    path, _ = saved(tmp_path)
    path.write_text("[1")
    assert "is not valid YAML" in bad(["--config", path, "--out", "x"])
    assert "is not a saved configuration" in bad(["--config", RECIPE, "--out", "x"])
    path, _ = saved(tmp_path, recipe={"sed": 1})
    assert "unknown key sed. Did you mean seed" in bad(["--config", path, "--out", "x"])


@pytest.mark.parametrize("start", ["distilled", "scratch"])
def test_what_a_run_writes_repeats_its_own_start(tmp_path, start):
    """--phase all trains the baselines as well, under a recipe whose own start is another."""
    import torch

    from trainer.context import Run
    from trainer.dist import Dist

    recipe = load_recipe(RECIPE)
    assert recipe.train.start == "distilled"
    run = Run(recipe, read_ds_config(DS_CONFIG), tmp_path, Dist(0, 1, 0, 1, torch.device("cpu")), "trainer/run.py")
    folder, done = run.open("train", start=start)
    repeated, ds_values, phase, module = _read(_parse(["--config", str(folder / "config.yaml"), "--out", "x"]))
    assert not done and (repeated.train.start, phase, module) == (start, "train", None)
    assert ds_values == run.ds_values
    assert run.open("train", start=start) == (folder, False)
