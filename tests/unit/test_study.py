"""Studies: their cells and artifacts, what is shared, and how they run, resume and fail."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.launch import ROOT
from trainer.config.data import BUILT_IN
from trainer.config.load import load_recipe, to_dict
from trainer.disk import write_json, write_text
from trainer.study import runner as study_runner
from trainer.study.__main__ import main
from trainer.study.plan import cells, flat, key_of, read_study, steps, trials
from trainer.study.report import accuracy_charts
from trainer.study.runner import Runner, link_artifact
from trainer.study.statistics import Summary
from trainer.study.tuning import tuned

TINY = ROOT / "tests/fixtures/tiny.yaml"
STUDIES = sorted((ROOT / "recipes").glob("study_*.yaml"))
BASELINES = sorted((ROOT / "recipes/baselines").glob("*.yaml"))
VARIANTS = """
  scratch: {overrides: {train.start: scratch}, label: from scratch}
  m2mkd: {reference: scratch}
  keep: {overrides: {train: {stitches: keep}}, reference: [m2mkd, scratch]}
"""


def study_file(folder: Path, variants: str = VARIANTS, more: str = "", seeds: str = "[0, 1]") -> Path:
    path = folder / "study_x.yaml"
    ds_config = ROOT / "ds_configs/cpu_debug.json"
    path.write_text(f"base: {TINY}\nds_config: {ds_config}\nseeds: {seeds}\n{more}\nvariants:{variants}")
    return path


def plan(folder: Path, *extra: str, **options) -> list:
    return cells(read_study(study_file(folder, **options), extra), folder / "out")


def result(folder: Path, metrics: dict, rows: list = (), **values) -> None:
    """What a phase leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "result.json", {"metrics": metrics, "seconds": 2.0, "images_seen": 10} | values)


# what a study is made of

FEWEST = {
    "study_ablation": 20,
    "study_baselines": 10,
    "study_fitted": 2,
    "study_images": 21,
    "study_judged": 3,
    "study_meta": 6,
    "study_nac": 12,
    "study_nac_fractals": 3,
    "study_narrow": 36,
    "study_other_classes": 5,
    "study_projected": 9,
    "study_rates": 8,
}  # variants


@pytest.mark.parametrize("path", [p for p in STUDIES if p.name != "study_base.yaml"], ids=lambda p: p.stem)
def test_every_variant_of_every_study_resolves(path, tmp_path):
    study = read_study(path)
    tuned = {variant.name: variant.grid[0] for variant in study.variants if variant.grid}
    made = cells(study, tmp_path, tuned)
    of_variants = [cell for cell in made if not cell.variant.startswith("teachers/")]
    assert len(of_variants) == len(study.variants) * len(study.seeds)
    assert len({len(variant.grid) for variant in study.variants}) == 1, "grids of one size"
    assert len(study.variants) >= FEWEST[path.stem]
    assert study.ds_config.is_file() and len(study.seeds) >= 3
    assert all(cell.recipe.data.source in BUILT_IN for cell in made), "images that everybody has"
    assert f"python -m trainer.study recipes/{path.name} --out runs/{path.stem}\n" in path.read_text()
    keys = [key for cell in made for key in cell.keys.values()]
    if any(len(cell.steps) > 1 for cell in made):
        assert len(set(keys)) < 0.9 * len(keys), "nothing to share"
    of_seed = [tuple(sorted(cell.keys.values())) for cell in made if cell.seed == study.seeds[0]]
    assert len(set(of_seed)) == len(of_seed), "two variants that are the same"


@pytest.mark.parametrize("path", BASELINES, ids=lambda p: p.stem)
def test_every_baseline_differs_from_the_recipe_it_extends(path):
    extended = path
    while "baselines" in str(extended.parent):
        extended = (extended.parent / yaml.safe_load(extended.read_text())["extends"]).resolve()
    ours, base = (to_dict(load_recipe(p)) for p in (path, extended))
    assert {key for key in ours if ours[key] != base[key]} <= {"meta", "distill", "student", "train"}
    assert ours != base and ours["data"] == base["data"]
    # what starts new trains by the published schedule; equal cost counts its epochs itself
    if extended.stem == "vmoe_base_imagenet":
        published = path.stem in ("published", "scratch", "scratch_kd", "dense")
        assert ours["train"]["epochs"] == (100 if published else base["train"]["epochs"])
    assert f"--recipe recipes/baselines/{path.name} " in path.read_text()


def test_the_steps_of_each_start():
    def names(*words, phases=()):
        return [step.name for step in steps(load_recipe(TINY, words), phases)]

    chain = ["teacher", "meta", "distill_0", "distill_1", "train"]
    assert names() == chain
    assert names("refine.epochs=1") == [*chain[:-1], "refine_0", "refine_1", "train"]
    assert names("train.start=scratch") == ["teacher", "train_scratch"]
    assert names("train.start=scratch", "train.border_weight=1") == ["teacher", "meta", "train_scratch"]
    assert names("train.start=scratch_equal_cost") == [*chain[:-1], "train_scratch_equal_cost"]
    assert names("teacher.source=a/b") == ["probe", *chain[1:]]
    assert names("teacher.source=a/b", "teacher.head=own") == chain[1:]
    assert names("train.init=a/b") == ["teacher", "train"]
    assert names(phases=["train", "evaluate", "meta"]) == ["meta", "train", "evaluate"]
    by_expert = names("distill.level=expert", phases=["cluster", "expert"])
    assert by_expert[:3] == ["cluster_0", "expert_0_0", "expert_0_1"]
    with pytest.raises(ValueError, match="phase refine makes nothing in this recipe"):
        names(phases=["refine"])


def test_a_chart_of_a_point_does_not_repeat_it_behind_every_label(tmp_path):
    axes = "axes: {data: {digits: {}, fractals: {data.source: fractals}}}\n"
    path = study_file(tmp_path, "\n  a: {label: from scratch, overrides: {train.start: scratch}}", axes)
    study = read_study(path)
    assert [variant.label for variant in study.variants] == ["from scratch, digits", "from scratch, fractals"]
    curve = [(1e9, Summary(1, 0.5, None)), (2e9, Summary(1, 0.6, None))]
    charts = accuracy_charts(SimpleNamespace(study=study, curve=lambda name: curve))
    assert [chart.title.rpartition(": ")[2] for chart in charts] == ["digits", "fractals"]
    assert [line.name for chart in charts for line in chart.lines] == ["from scratch (n = 1)"] * 2


def test_overrides_may_be_nested_or_dotted():
    given = {"train": {"epochs": 3, "betas": [0.5, 0.9]}, "distill.stitches": "pca", "meta.clip": None}
    assert flat(given, "overrides") == [
        "train.epochs=3", "train.betas=[0.5, 0.9]", 'distill.stitches="pca"', "meta.clip=null",
    ]  # fmt: skip


def test_the_later_layer_wins(tmp_path):
    first = plan(tmp_path, "distill.epochs=7", more="overrides: {train.stitches: fold, distill.epochs: 5}")
    by_name = {cell.name: cell.recipe for cell in first}
    assert by_name["m2mkd/seed1"].train.stitches == "fold"
    assert by_name["keep/seed1"].train.stitches == "keep"  # its own
    assert {recipe.distill.epochs for recipe in by_name.values()} == {7}  # the command line, of every cell
    assert (by_name["keep/seed0"].seed, by_name["keep/seed1"].seed) == (0, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n  a: {overides: {}}", "variants.a has the unknown key overides. Did you mean overrides?"),
        ("\n  a: {reference: b}", "variants.a.reference names b. Known: a"),
        ("\n  a: {phases: [distil]}", "variants.a.phases names 'distil'. Did you mean distill?"),
        ("\n  a: {overrides: {seed: 3}}", "variants.a.overrides sets seed"),
        ("\n  a/b: {}", "variants.a/b names a folder"),
        ("\n  a: {overrides: {train.epoch: 3}}", "variant a: unknown key train.epoch. Did you mean train.epochs?"),
        ("\n  tuning: {}", "variants.tuning names a folder"),
        ("\n  a: {tune: {train.lr: 0.1}}", "variants.a.tune.train.lr is 0.1, expected a list of the values to try"),
        ("\n  a: {tune: {train.lr: [0.1]}}", "variants.a.tune has 1 choices, expected 2 or more"),
        ("\n  a: {tune: [{train.lr: 0.1}, {train.lr: 0.1}]}", "variants.a.tune names a choice twice"),
        ("\n  a: {tune: {seed: [1, 2]}}", "variants.a.tune sets seed"),
        ("\n  a: {at: {half: {}}}", "variants.a.at names half"),
        ("\n  a: 3", "variants.a must be a section of keys, got 3"),
    ],
)
def test_what_a_study_cannot_say(tmp_path, text, said):
    with pytest.raises(ValueError) as error:
        plan(tmp_path, variants=text)
    assert said in str(error.value)


def test_axes_set_every_variant_at_every_combination_of_their_points(tmp_path):
    axes = (
        "axes:\n  size: {wide: {student.width: 32}, narrow: {student.width: 16}}\n"
        "  images: {few: {data.limit: 100}, many: {data: {limit: 200}}}\n"
    )
    variants = """
  a: {overrides: {student.mlp_dim: 64}, group: main, label: A}
  b: {reference: a, overrides: {data.limit: 300}, at: {narrow: {train.epochs: 9}}}
"""
    study = read_study(study_file(tmp_path, variants, axes))
    points = ["wide.few", "wide.many", "narrow.few", "narrow.many"]
    assert [one.name for one in study.variants] == [f"{name}.{point}" for point in points for name in "ab"]
    assert (study.variants[0].label, study.variants[0].group) == ("A, wide, few", "main, wide, few")
    assert study.variants[-1].references == ("a.narrow.many",)
    recipes = {cell.variant: cell.recipe for cell in cells(study, tmp_path)}
    found = [(recipes[f"a.{p}"].student.width, recipes[f"a.{p}"].data.limit) for p in points]
    assert found == [(32, 100), (32, 200), (16, 100), (16, 200)]
    assert {recipes[f"b.{point}"].data.limit for point in points} == {300}, "what a variant says beats the points"
    epochs = [recipes[f"b.{point}"].train.epochs for point in points]
    assert epochs[2:] == [9, 9] and 9 not in epochs[:2]


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ("axes: {size: {}}", "axes.size has no points"),
        ("axes: {a: {x: {}}, b: {x: {}}}", "axes.b.x is there twice"),
        ("axes: {a: {x/y: {}}}", "axes.a.x/y names a folder"),
        ("axes: {a: {x: {train.epoch: 1}}}", "variant scratch.x: unknown key train.epoch"),
        ("tune_share: 1", "tune_share is 1, expected a share above 0 and below 1"),
        ("tune_seeds: 3", "tune_seeds is 3, expected a list of whole numbers"),
    ],
)
def test_what_axes_and_tuning_cannot_say(tmp_path, axes, said):
    with pytest.raises(ValueError) as error:
        plan(tmp_path, more=axes)
    assert said in str(error.value)


TUNE = "tune: {train.lr: [0.1, 0.2, 0.4]}\ntune_overrides: {train.epochs: 1}"


def test_trials_are_judged_on_held_out_training_images(tmp_path):
    variants = """
  a: {}
  b: {tune: [{train.lr: 0.1}, {train: {lr: 0.3, betas: [0.5, 0.9]}}]}
  c: {tune: {}}
"""
    study = read_study(study_file(tmp_path, variants, f"{TUNE}\nshare_teacher: true\ntune_share: 0.25"))
    found = [cell for cell in trials(study, tmp_path) if cell.tunes]
    assert [(cell.tunes, cell.seed, cell.recipe.train.lr) for cell in found] == [
        ("a", 0, 0.1), ("a", 0, 0.2), ("a", 0, 0.4), ("b", 0, 0.1), ("b", 0, 0.3),
    ]  # fmt: skip
    assert {(cell.recipe.data.val_share, cell.recipe.train.epochs) for cell in found} == {(0.25, 1)}
    assert found[4].recipe.train.betas == (0.5, 0.9)
    assert found[0].folder == tmp_path / "tuning/a/train.lr=0.1/seed0"
    assert len({cell.folder for cell in found}) == len(found)
    # until it is chosen, only what is not tuned is planned, by the same teacher, on all training images
    final = cells(study, tmp_path)
    assert [cell.variant.split("/")[0] for cell in final] == ["teachers", "c", "c"]
    assert {cell.teacher for cell in [*found, *final]} == {final[0].teacher}
    final = cells(study, tmp_path, {"a": ("train.lr=0.2",)})
    assert [cell.recipe.train.lr for cell in final if cell.variant == "a"] == [0.2, 0.2]
    assert final[1].recipe.data.val_share is None
    assert key_of(final[1].recipe, "meta") != key_of(found[1].recipe, "meta"), "it has seen other images"


def test_what_cannot_be_tuned_is_refused(tmp_path):
    with pytest.raises(ValueError, match="variant a: it is tuned by its training, which its phases leave out"):
        trials(read_study(study_file(tmp_path, "\n  a: {phases: [teacher]}", TUNE)), tmp_path)
    folder = f"overrides: {{data.path: {tmp_path}}}"
    with pytest.raises(ValueError, match="variant a: tune holds training images of digits, fractals, textures out"):
        trials(read_study(study_file(tmp_path, "\n  a: {}", f"{TUNE}\n{folder}")), tmp_path)


def test_what_is_shared(tmp_path):
    keys = {cell.name: cell.keys for cell in plan(tmp_path)}
    m2mkd, keep, scratch = (keys[f"{name}/seed0"] for name in ("m2mkd", "keep", "scratch"))
    shared = ("teacher", "meta", "distill_0", "distill_1")
    assert all(m2mkd[name] == keep[name] for name in shared)
    assert m2mkd["train"] != keep["train"]
    assert scratch["teacher"] == m2mkd["teacher"]
    assert m2mkd["distill_0"] != m2mkd["distill_1"]
    assert not set(m2mkd.values()) & set(keys["m2mkd/seed1"].values()), "the seed is part of everything"


def test_a_shared_teacher_is_that_of_the_first_seed(tmp_path):
    variants = "\n  a: {}\n  b: {overrides: {distill.alpha: 0}}\n  other: {overrides: {teacher.epochs: 1}}"
    first, second, *rest = plan(tmp_path, variants=variants, more="share_teacher: true")
    assert {cell.variant.split("/")[0] for cell in (first, second)} == {"teachers"}
    assert [step.name for step in first.steps] == ["teacher"] and first.seed == 0
    sources = {cell.name: cell.recipe.teacher.source for cell in rest}
    assert sources["a/seed0"] == sources["b/seed1"] == str(first.folder / "teacher")
    assert sources["other/seed0"] == sources["other/seed1"] == str(second.folder / "teacher")
    assert all("teacher" not in cell.keys for cell in rest)


# running: with a stand-in for the worker, which writes a result.json per artifact


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Replaces the worker; returns a function that reads which artifacts were made, in order."""
    log = tmp_path / "made"
    code = (
        "import pathlib, sys, time\n"
        "cell, ds_config, *names = sys.argv[1:]\n"
        "cell = pathlib.Path(cell)\n"
        "for name in names:\n"
        f"    bad = pathlib.Path({str(tmp_path)!r}) / 'bad'\n"
        "    if bad.is_file() and bad.read_text() == f'{cell.parent.name}/{name}':\n"
        "        print('it broke'); sys.exit(1)\n"
        "    time.sleep(0.05)\n"
        "    (cell / name).mkdir(exist_ok=True)\n"
        "    (cell / name / 'model.safetensors').write_text('weights')\n"
        "    (cell / name / 'result.json').write_text('{}')\n"
        f"    with open({str(log)!r}, 'a') as f: print(cell.parent.name, cell.name, name, file=f)\n"
    )
    monkeypatch.setattr(study_runner, "WORKER", [sys.executable, "-c", code])
    monkeypatch.setattr(study_runner, "POLL", 0.01)

    def made() -> list[str]:
        found = log.read_text().splitlines() if log.is_file() else []
        log.unlink(missing_ok=True)
        return found

    return made


def run(made: list, folder: Path, jobs: int = 2) -> int:
    return Runner(made, ROOT / "ds_configs/cpu_debug.json", folder / "out", jobs, after=lambda: None).run()


def test_each_artifact_is_made_once_and_a_second_start_makes_nothing(stand_in, tmp_path):
    grid = plan(tmp_path)
    assert run(grid, tmp_path) == 0
    made = stand_in()
    keys = {key for cell in grid for key in cell.keys.values()}
    assert len(made) == len(keys) == 14  # per seed: teacher, meta, distill x 2, and three trainings
    assert all(cell.complete for cell in grid)
    one, other = (tmp_path / "out" / name / "seed0/distill_1/model.safetensors" for name in ("m2mkd", "keep"))
    assert one.samefile(other)
    assert run(grid, tmp_path) == 0
    assert stand_in() == []


def test_what_another_study_made_in_the_same_folder_is_used(stand_in, tmp_path):
    assert run(plan(tmp_path, seeds="[0]"), tmp_path) == 0
    stand_in()
    started = tmp_path / "out/m2mkd/seed0/upcycle"  # of no phase: made beside meta where a start is projected
    started.mkdir()
    (started / "result.json").write_text("{}")
    assert run(plan(tmp_path, variants="\n  fold: {overrides: {train.stitches: fold}}", seeds="[0]"), tmp_path) == 0
    assert stand_in() == ["fold seed0 train"]


def test_a_failing_cell_is_reported_and_the_others_go_on(stand_in, tmp_path, capsys):
    grid = plan(tmp_path, seeds="[0]")[::-1]  # keep, m2mkd, scratch; one job, so that keep makes what both need
    (tmp_path / "bad").write_text("keep/distill_1")
    assert run(grid, tmp_path, jobs=1) == 1
    assert "scratch seed0 train_scratch" in stand_in()
    said = capsys.readouterr().err
    assert "keep/seed0: distill_1 ended with code 1\n    it broke" in said
    assert "m2mkd/seed0 failed: it needs distill_1, which failed in keep/seed0" in said
    (tmp_path / "bad").unlink()
    assert run(grid, tmp_path, jobs=1) == 0
    assert stand_in() == ["keep seed0 distill_1", "keep seed0 train", "m2mkd seed0 train"]


def test_artifacts_of_another_recipe_are_named_and_kept(stand_in, tmp_path, capsys):
    run(plan(tmp_path, seeds="[0]"), tmp_path)
    stand_in()
    changed = plan(tmp_path, "train.epochs=1", seeds="[0]")
    assert run(changed, tmp_path) == 1
    assert stand_in() == []
    said = capsys.readouterr().err
    assert f"{tmp_path}/out/keep/seed0/train is of another recipe (train.epochs: 2 there, 1 here): delete it" in said


@pytest.fixture
def rates_are_accuracies(stand_in, monkeypatch):
    """The stand-in leaves the rate itself as the accuracy, so that the largest of a grid is best; stand_in's answer."""
    code = study_runner.WORKER[2].replace(
        "write_text('{}')",
        "write_text('{\"metrics\": {\"accuracy\": %s}, \"flops\": 1e9}' % yaml_of(cell)['train']['lr'])",
    )
    code = "import yaml\nyaml_of = lambda cell: yaml.safe_load((cell / 'recipe.yaml').read_text())\n" + code
    monkeypatch.setattr(study_runner, "WORKER", [sys.executable, "-c", code])
    return stand_in


def test_the_best_choice_is_tried_first_then_run_on_all_seeds(rates_are_accuracies, tmp_path, capsys):
    stand_in = rates_are_accuracies
    variants = "\n  a: {overrides: {train.start: scratch}}\n  b: {tune: {}}"
    path = study_file(tmp_path, variants, TUNE)
    command = [str(path), "--out", str(tmp_path / "out"), "--jobs", "2"]
    assert main([*command, "--only", "a"]) == 0
    made = stand_in()
    tried = [line for line in made if line.startswith("train.lr=")]
    assert [line.split()[-1] for line in tried].count("teacher") == 1 and len(tried) == 4  # one teacher, three rates
    assert [line.split()[0] for line in made[4:]] == ["a"] * 4, "trials first, then two seeds"
    assert load_recipe(tmp_path / "out/a/seed1/recipe.yaml").train.lr == 0.4
    assert (
        "warning: a: the best of its grid lies at the edge, train.lr=0.4: widen tune there" in capsys.readouterr().err
    )
    assert main(command) == 0
    assert {line.split()[0] for line in stand_in()} == {"b"}, "nothing is tried twice"
    numbers = json.loads((tmp_path / "out/study.json").read_text())
    tuning = numbers["tuning"]["a"]
    assert [trial["mean"] for trial in tuning["trials"]] == [0.1, 0.2, 0.4]
    assert (tuning["chosen"], tuning["at_edge"]) == (["train.lr=0.4"], ["train.lr=0.4"])
    assert tuning["flops"] == 3e9 and numbers["missing"] == []  # three trainings; teachers are not counted
    text = (tmp_path / "out/study.md").read_text()
    assert "| a | train.lr=0.4 | 40.0 | chosen, at the edge of the grid: train.lr=0.4 | 3 GFLOP |" in text
    assert main([*command, "--only", "z"]) == 2
    assert "--only z matches no variant. Variants: a, b" in capsys.readouterr().err


def test_what_an_earlier_choice_has_left_is_not_shown_as_the_new_one(rates_are_accuracies, tmp_path, capsys):
    """A grid that is widened, as its warning asks for, may choose anew."""
    command = ["--out", str(tmp_path / "out"), "--jobs", "2"]
    variants = "\n  a: {overrides: {train.start: scratch}}"
    narrow = str(study_file(tmp_path, variants, TUNE, seeds="[0]"))
    assert main([narrow, *command]) == 0
    assert "| a | 1 |" in (tmp_path / "out/study.md").read_text()
    rates_are_accuracies()
    wide = str(study_file(tmp_path, variants, TUNE.replace("0.4]", "0.4, 0.8]"), seeds="[0]"))
    left = f"{tmp_path}/out/a/seed0/train_scratch is of another recipe (train.lr: 0.4 there, 0.8 here): delete it"
    assert main([wide, *command]) == 1
    assert f"a/seed0 failed: {left}" in capsys.readouterr().err
    assert main([wide, *command, "--report"]) == 0
    assert f"warning: left out: {left}" in capsys.readouterr().err
    text = (tmp_path / "out/study.md").read_text()
    assert "Not complete: a/seed0." in text and "| a | 1 |" not in text
    assert "| a | train.lr=0.8 | 80.0 | chosen" in text
    shutil.rmtree(tmp_path / "out/a/seed0/train_scratch")
    assert main([wide, *command]) == 0
    assert rates_are_accuracies() == ["train.lr=0.8 seed0 train_scratch", "a seed0 train_scratch"]
    assert "| a | 1 |" in (tmp_path / "out/study.md").read_text()


def test_trials_of_another_recipe_choose_nothing(rates_are_accuracies, tmp_path):
    variants = "\n  a: {overrides: {train.start: scratch}}"
    path = study_file(tmp_path, variants, TUNE, seeds="[0]")
    assert main([str(path), "--out", str(tmp_path / "out")]) == 0
    for extra, best in (((), 2), (("train.clip=3",), None)):
        study = read_study(path, extra)
        assert [grid.best for grid in tuned(study, trials(study, tmp_path / "out"))] == [best]


def test_a_trial_that_fails_leaves_its_variant_out_and_the_others_go_on(stand_in, tmp_path):
    (tmp_path / "bad").write_text("train.lr=0.2/train_scratch")
    variants = "\n  a: {overrides: {train.start: scratch}}\n  b: {overrides: {train.start: scratch}, tune: {}}"
    command = [str(study_file(tmp_path, variants, TUNE)), "--out", str(tmp_path / "out"), "--jobs", "2"]
    assert main(command) == 1
    made = stand_in()
    assert "b seed1 train_scratch" in made and "a seed0 train_scratch" not in made
    missing = json.loads((tmp_path / "out/study.json").read_text())["missing"]
    assert missing == ["tuning/a/train.lr=0.2/seed0"]


def test_one_runner_at_a_time(stand_in, tmp_path):
    grid = plan(tmp_path)
    first = Runner(grid, Path("unused"), tmp_path / "out", 1, after=lambda: None)
    with pytest.raises(ValueError, match=r"another start of a study.* works in"):
        Runner(grid, Path("unused"), tmp_path / "out", 1, after=lambda: None)
    first.lock.close()
    Runner(grid, Path("unused"), tmp_path / "out", 1, after=lambda: None)


def test_a_linked_artifact_is_complete_with_its_last_file(tmp_path, monkeypatch):
    result(tmp_path / "a", {"accuracy": 0.5})
    (tmp_path / "a/vocabulary.txt").write_text("behind result.json in the alphabet")
    (tmp_path / "a/checkpoints").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/metrics.jsonl").write_text("of a run that was stopped")
    linked = []
    link = os.link
    monkeypatch.setattr(os, "link", lambda source, target: (linked.append(source.name), link(source, target)))
    link_artifact(tmp_path / "a", tmp_path / "b")
    assert linked == ["metrics.jsonl", "vocabulary.txt", "result.json"]
    assert all((tmp_path / "a" / name).samefile(tmp_path / "b" / name) for name in linked)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(linked)


def test_a_linked_artifact_keeps_its_files_when_the_other_is_replaced(tmp_path):
    result(tmp_path / "a", {"accuracy": 0.5})
    link_artifact(tmp_path / "a", tmp_path / "b")
    write_json(tmp_path / "a/result.json", {"metrics": {"accuracy": 0.9}})  # as every phase writes
    assert json.loads((tmp_path / "b/result.json").read_text())["metrics"] == {"accuracy": 0.5}


def test_a_signal_reaches_the_processes_and_the_same_command_goes_on(monkeypatch, tmp_path):
    code = (
        "import pathlib, signal, sys, time\n"
        "cell, ds_config, *names = sys.argv[1:]\n"
        "def save(*_): (pathlib.Path(cell) / 'saved').touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(pathlib.Path(cell) / 'ready').touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(study_runner, "WORKER", [sys.executable, "-c", code])
    monkeypatch.setattr(study_runner, "POLL", 0.01)
    grid = plan(tmp_path, variants="\n  a: {}")

    def interrupt() -> None:
        while sum((cell.folder / "ready").exists() for cell in grid) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert run(grid, tmp_path) == 75
    assert all((cell.folder / "saved").exists() for cell in grid)


def test_a_report_of_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    assert main([str(study_file(tmp_path)), "--out", str(tmp_path / "none"), "--report"]) == 2
    assert f"--out is {tmp_path}/none, where no study was made: without --report" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
