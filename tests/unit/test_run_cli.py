"""The command line as users type it: what is refused, with which words and exit code, and without loading torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer.cli import flags as cli
from trainer.config.ds_config import read_ds_config
from trainer.config.load import load_recipe, to_dict
from trainer.request.graph import phase_help

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
    assert all(phase in out for phase in phase_help())
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


def read(arguments):
    """The job behind arguments, without a process of its own."""
    arguments = [str(a) for a in arguments]
    return cli.read_job(cli.parse(arguments), arguments)


def bad(arguments):
    """The message about arguments that are refused."""
    with pytest.raises(ValueError) as error:
        read(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--out is missing: give the folder of the run"),
        (["--out", "x"], "--recipe is needed (or --config"),
        (["--out", "x", *START, "--phase", "distil"], "there is no phase distil. Did you mean distill?"),
        (["--out", "x", *START, "--phase"], "argument --phase: expected one argument"),
        (["--out", "x", *START, "--phase", "meta", "--phas=e"], "unknown flag --phas=e. Did you mean --phase?"),
        (["--out", "x", *START, "--phase", "meta", "--zzzzzz"], "unknown flag --zzzzzz. See --help"),
        (["--out", "x", *START, "--phase", "meta", "epochs"], "cannot read the override 'epochs'"),
        (["--out", "x", *START, "--phase", "meta", "ds.zero=1"], 'unknown key "zero"'),
        (["--out", "x", *START, "--phase", "meta", "ds=1"], "unknown key ds."),
        (
            ["--out", "x", *START, "--phase", "zzz"],
            "there is no phase zzz. Known: teacher, probe, meta, incubate, assemble",
        ),
        (["--out", "x", *START, "--phase", "meta", "--layout", "y"], "--layout has no meaning for a phase"),
        (["inspekt", "x"], "there is no command inspekt. Did you mean inspect?"),
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
    [("distill", "3", 3), ("distill", "all", None), ("distill", None, None), ("train", None, None),
     ("all", "all", None)],
)  # fmt: skip
def test_the_module(phase, module, expected):
    arguments = [*START, "--phase", phase, "--out", "x", *(["--module", module] if module else [])]
    job = read(arguments)
    assert (job.phase, job.module) == (phase, expected)
    assert job.modules == ([3] if expected == 3 else [0, 1, 2, 3])


def test_without_phase_and_ds_config_the_whole_chain_runs_on_one_machine():
    job = read(["--recipe", ROOT / "recipes/demo.yaml", "--out", "x", "ds.bf16.enabled=true"])
    assert job.phase == "all"
    assert job.ds_values == read_ds_config(ROOT / "ds_configs/one_machine.json") | {"bf16": {"enabled": True}}


def test_overrides_may_stand_anywhere():
    arguments = ["seed=3", *START, "data.workers=1", "--phase", "meta", "ds.trainer.ep_size=2", "--out", "x",
                 "--local_rank=1", "train.epochs=9"]  # fmt: skip
    job = read(arguments)
    assert (job.recipe.seed, job.recipe.data.workers, job.recipe.train.epochs, job.phase) == (3, 1, 9, "meta")
    assert job.ds_values["trainer"]["ep_size"] == 2
    assert "--local_rank" not in job.command and job.command.startswith("trainer/run.py seed=3 --recipe ")


def test_all_phases_and_a_given_start():
    """It would train the modules for nothing."""
    said = bad([*START, "--phase", "all", "--out", "x", "train.init=alice/model"])
    assert "use --phase train, then --phase evaluate" in said
    assert read([*START, "--phase", "train", "--out", "x", "train.init=alice/model"]).phases == ["train"]


def test_the_phases_of_all():
    """A given teacher is not trained, and nothing is pushed without a place to push to."""
    start = [*START, "--phase", "all", "--out", "x"]
    assert read(start).phases == ["teacher", "meta", "distill", "train", "evaluate"]
    assert read([*start, "teacher.source=a/b", "hub.repo=c/d"]).phases == [
        "probe",
        "meta",
        "distill",
        "train",
        "evaluate",
        "push",
    ]
    assert read([*START, "--phase", "push", "--out", "x"]).phases == ["push"]


def saved(folder, **changes):
    """A config.yaml as a run writes it."""
    recipe = load_recipe(RECIPE, ["seed=7", "train.lr=0.5"])
    values = {"phase": "distill", "module": 2, "command": "trainer/run.py ...",
              "ds_config": read_ds_config(DS_CONFIG, ["ds.gradient_accumulation_steps=4"]),
              "recipe": to_dict(recipe)}  # fmt: skip
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path, recipe


def test_config_repeats_a_saved_phase(tmp_path):
    path, expected = saved(tmp_path)
    job = read(["--config", path, "--out", "x"])
    assert (job.recipe, job.phase, job.module) == (expected, "distill", 2)
    assert job.ds_values["gradient_accumulation_steps"] == 4
    job = read(["--config", path, "--out", "x", "--module", "0"])
    assert job.module == 0


def test_config_takes_no_changes(tmp_path):
    path, _ = saved(tmp_path)
    for more in (["seed=1"], ["ds.x=1"], ["--recipe", RECIPE], ["--ds_config", DS_CONFIG], ["--profile"]):
        assert "leave out --recipe, --ds_config, --profile and overrides" in bad(
            ["--config", path, "--out", "x", *more]
        )


def test_configs_that_are_none(tmp_path):
    assert "no saved configuration at" in bad(["--config", tmp_path / "no.yaml", "--out", "x"])
    assert "no saved configuration below" in bad(["--config", tmp_path, "--out", "x"])
    path, _ = saved(tmp_path)
    path.write_text("[1")
    assert "is not valid YAML" in bad(["--config", path, "--out", "x"])
    path.write_bytes(b"\xff\xfe\xff")
    assert "is not text" in bad(["--config", path, "--out", "x"])
    assert "is not a saved configuration" in bad(["--config", RECIPE, "--out", "x"])
    path, _ = saved(tmp_path, ds_config=3)
    assert "its ds_config is not a section" in bad(["--config", path, "--out", "x"])
    path, _ = saved(tmp_path, recipe={"sed": 1})
    assert "unknown key sed. Did you mean seed" in bad(["--config", path, "--out", "x"])


def test_config_repeats_a_whole_run_from_its_folder(tmp_path):
    """The start of the run, not of a baseline; and all phases, also when it was stopped in the first one."""
    recipe = to_dict(load_recipe(RECIPE, ["seed=7"]))
    saved(tmp_path / "teacher", phase="teacher", module=None, recipe=recipe, command="run.py --phase=all --out x")
    assert read(["--config", tmp_path, "--out", "x"]).phase == "all"
    for name in ("meta", "evaluate", "train_scratch"):
        start = "scratch" if name == "train_scratch" else "distilled"
        saved(tmp_path / name, phase=name.split("_")[0], module=None,
              recipe={**recipe, "train": {**recipe["train"], "start": start}})  # fmt: skip
    job = read(["--config", tmp_path, "--out", "x"])
    assert (job.phase, job.module, to_dict(job.recipe)) == ("all", None, recipe)
    assert read(["--config", tmp_path, "--out", "x", "--phase", "meta"]).phase == "meta"


def test_a_folder_of_modules_only_repeats_the_modules(tmp_path):
    saved(tmp_path / "distill_2")
    assert read(["--config", tmp_path, "--out", "x"]).module == 2
    saved(tmp_path / "distill_3", module=3)
    job = read(["--config", tmp_path, "--out", "x"])
    assert (job.phase, job.module) == ("distill", None)


def test_a_folder_of_two_recipes_is_refused(tmp_path):
    _, recipe = saved(tmp_path / "distill_2")
    path, _ = saved(tmp_path / "meta", phase="meta", recipe={**to_dict(recipe), "seed": 8})
    said = bad(["--config", tmp_path, "--out", "x"])
    assert "are of different runs (recipe: seed: 8 there, 7 here)" in said and f"--config {path}" in said


def command(*arguments):
    return cli.read_command(cli.parse(arguments))


def test_commands_take_any_path():
    assert command("inspect", "runs/lr=0.1/train") == ("inspect", Path("runs/lr=0.1/train"), None, {})
    assert command("--local_rank=0", "inspect", "x") == ("inspect", Path("x"), None, {})
    assert command("--phase", "inspect", "x") == ("inspect", Path("x"), None, {})
    assert command("--out", "y", "export", "ds.x=1") == ("export", Path("ds.x=1"), Path("y"), {})
    assert command("import", "a.npz", "--layout", "google_vmoe", "--out", "y", "heads=12", "k=1") == (
        "import", Path("a.npz"), Path("y"), {"layout": "google_vmoe", "heads": 12, "k": 1})  # fmt: skip
    assert command("seed=3") is None and command() is None


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["inspect"], "inspect needs a path: trainer/run.py inspect PATH"),
        (["--phase", "inspect"], "inspect needs a path: trainer/run.py inspect PATH"),
        (["inspect", "x", "--out", "y"], "--out has no meaning for inspect"),
        (["inspect", "x", "y"], "'y' behind the path means nothing"),
        (["export", "x"], "--out is missing: trainer/run.py export CHECKPOINT --out DIR"),
        (["export", "x", "--out", "y", "--phase", "meta"], "--phase has no meaning for export"),
        (["export", "x", "--out", "y", "--dry-run"], "--dry-run has no meaning for export"),
        (["export", "x", "--out", "y", "train.lr=3"], "'train.lr=3' behind the path means nothing"),
        (["import", "x", "--out", "y"], "--layout is missing"),
        (["import", "x", "--out", "y", "--layout", "z", "heads=many"], "'heads=many' behind the path means nothing"),
        (["import", "x", "--out", "y", "--layout", "z", "lr=3"], "'lr=3' behind the path means nothing"),
    ],
)
def test_commands_that_are_refused(arguments, said):
    with pytest.raises(ValueError, match="^" + said.replace("(", r"\(")):
        command(*arguments)


@pytest.mark.parametrize("start", ["distilled", "scratch"])
def test_what_a_run_writes_repeats_its_own_start(tmp_path, start):
    """--phase all trains the baselines as well, under a recipe whose own start is another."""
    import torch

    from trainer.context import Run
    from trainer.distributed.ranks import Dist

    recipe = load_recipe(RECIPE)
    assert recipe.train.start == "distilled"
    run = Run(recipe, read_ds_config(DS_CONFIG), tmp_path, Dist(0, 1, 0, 1, torch.device("cpu")), "trainer/run.py")
    folder, done = run.open("train", start=start)
    job = read(["--config", folder / "config.yaml", "--out", "x"])
    assert not done and (job.recipe.train.start, job.phase, job.module) == (start, "train", None)
    assert job.ds_values == run.ds_values
    assert run.open("train", start=start) == (folder, False)
