"""The hand-over between phases: complete or refused, of this recipe or refused, whole or refused."""

import hashlib
import json
import re
import subprocess

import pytest
import torch
import yaml
from safetensors.torch import save_file

from trainer import artifacts, disk, origin
from trainer.artifacts import open_folder, require, write_result
from trainer.config.load import build, to_dict
from trainer.config.recipe import Recipe
from trainer.disk import write_json
from trainer.request import graph
from trainer.request.graph import artifact_name

COMMIT = "0123abc"
RUN = {"phase": "meta", "module": None, "command": "trainer/run.py ...", "ds_config": {"train_batch_size": 64}}
WEIGHTS = b"weights of the meta model"


@pytest.fixture(autouse=True)
def quick_commit(monkeypatch):
    """Two processes of git per artifact would be most of the time these tests take."""
    monkeypatch.setattr(artifacts, "git_commit", lambda: COMMIT)


def recipe(**sections) -> Recipe:
    return build(Recipe, sections)


def finished(out, name="meta", made_with=None):
    """A complete artifact; returns its folder."""
    folder, done = open_folder(out, name, made_with or recipe(), RUN)
    assert not done
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    write_result(folder, {"phase": name, "metrics": {"accuracy": 0.5}})
    return folder


@pytest.mark.parametrize(
    "arguments, name",
    [
        (("teacher",), "teacher"),
        (("distill", 0), "distill_0"),
        (("distill", 11), "distill_11"),
        (("train",), "train"),
        (("train", None, "scratch"), "train_scratch"),
        (("train", None, "scratch_equal_cost"), "train_scratch_equal_cost"),
        (("evaluate", None, "scratch"), "evaluate_scratch"),
    ],
)
def test_names(arguments, name):
    assert artifact_name(*arguments) == name


def test_a_finished_artifact_is_found_again(tmp_path):
    folder = finished(tmp_path)
    (folder / "checkpoints").mkdir()
    (folder / "metrics.jsonl").write_text("grows after the result, too")
    (folder / "model.safetensors.tmp").write_text("left by a kill")
    found, result = require(tmp_path, "meta", recipe(), "--phase distill")
    assert found == folder == tmp_path / "meta"
    assert result["metrics"] == {"accuracy": 0.5}
    assert result["files"]["model.safetensors"] == {"bytes": 25, "sha256": hashlib.sha256(WEIGHTS).hexdigest()}
    assert set(result["files"]) == {"config.yaml", "model.safetensors"}
    assert result["versions"]["torch"] and result["versions"]["python"]
    assert result["git_commit"] == COMMIT
    assert open_folder(tmp_path, "meta", recipe(), RUN) == (folder, True)


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert origin.commit(tmp_path) is None
    (tmp_path / "x").write_text("1")
    for command in (["init"], ["add", "x"], ["commit", "-m", "m"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    commit = origin.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "untracked").write_text("1")
    assert origin.commit(tmp_path) == commit
    (tmp_path / "x").write_text("2")
    assert origin.commit(tmp_path) == commit + "+changes"


def test_config_yaml_repeats_the_run(tmp_path):
    made_with = recipe(train={"eps": 1e-8, "lr": "3e-4"}, teacher={"depths": [6, 6, 6, 6]})
    folder, _ = open_folder(tmp_path, "meta", made_with, RUN)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: saved[key] for key in RUN} == RUN
    assert build(Recipe, saved["recipe"]) == made_with


@pytest.mark.parametrize(
    "name, command",
    [
        ("meta", "--phase meta"),
        ("distill_2", "--phase distill --module 2"),
        ("train_scratch", "--phase train train.start=scratch"),
        ("train_scratch_equal_cost", "--phase train train.start=scratch_equal_cost"),
    ],
)
def test_missing_and_unfinished_artifacts_name_the_command(tmp_path, name, command):
    expected = f"--phase train needs {tmp_path / name}, which does not exist: run {command} --out {tmp_path} first"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        require(tmp_path, name, recipe(), "--phase train")
    folder, _ = open_folder(tmp_path, name, recipe(), RUN)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    expected = f"--phase train needs {folder}, which is unfinished (no result.json): run {command} again"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        require(tmp_path, name, recipe(), "--phase train")
    assert open_folder(tmp_path, name, recipe(), RUN) == (folder, False)


def write_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_one_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [write_half, flip_one_bit, lambda path: path.unlink()])
def test_damaged_weights_are_refused(tmp_path, damage):
    folder = finished(tmp_path)
    damage(folder / "model.safetensors")
    message = r"model\.safetensors is missing, truncated or altered .*delete .*meta and run --phase meta again"
    with pytest.raises(ValueError, match=message):
        require(tmp_path, "meta", recipe(), "--phase distill")


def test_an_altered_config_is_refused_even_where_the_recipe_stays_the_same(tmp_path):
    folder = finished(tmp_path)
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("train_batch_size: 64", "train_batch_size: 65"))
    with pytest.raises(ValueError, match=r"config\.yaml is missing, truncated or altered"):
        require(tmp_path, "meta", recipe(), "--phase distill")
    path.unlink()
    with pytest.raises(ValueError, match=r"config\.yaml is missing, truncated or altered"):
        require(tmp_path, "meta", recipe(), "--phase distill")


@pytest.mark.parametrize("text", ["", "{", "recipe: [1", "recipe: 3", "[]"])
@pytest.mark.parametrize("name", ["config.yaml", "result.json"])
def test_a_truncated_record_is_refused_by_name(tmp_path, name, text):
    (finished(tmp_path) / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is truncated or altered: .*run --phase meta again") as e:
        require(tmp_path, "meta", recipe(), "--phase distill")
    assert "\n" not in str(e.value)


# a change of the recipe -> the artifacts it makes invalid, and the key named
CHANGES = [
    ({"seed": 1}, {"teacher", "meta", "distill_0", "train", "train_scratch", "evaluate"}, "seed: 0 there, 1 here"),
    ({"teacher": {"lr": 0.5}}, {"teacher", "meta", "distill_0", "train", "train_scratch", "evaluate"}, "teacher.lr: "),
    ({"modules": 2}, {"meta", "distill_0", "train", "evaluate"}, "modules: 4 there, 2 here"),
    ({"meta": {"epochs": 3}}, {"meta", "distill_0", "train", "evaluate"}, "meta.epochs: 100 there, 3 here"),
    ({"distill": {"alpha": 0.25}}, {"distill_0", "train", "evaluate"}, "distill.alpha: 0.5 there, 0.25 here"),
    ({"student": {"variant": "m2mkd-B/16", "moe": {"k": 1}}}, {"distill_0", "train", "train_scratch", "evaluate"},
     "student.moe.k: 2 there, 1 here"),
    ({"train": {"stitches": "keep"}}, {"train", "train_scratch", "evaluate"}, "train.stitches: drop there, keep here"),
    ({"data": {"limit": 9}}, {"teacher", "meta", "distill_0", "train", "train_scratch", "evaluate"}, "data.limit: 0 "),
    # neither where the work is done, nor what is logged, nor what else is trained makes it another recipe
    ({"data": {"workers": 3}}, set(), ""),
    ({"train": {"start": "scratch", "baselines": ["scratch"]}}, set(), ""),
    ({"run": {"log_every": 1, "eval_batch": 16, "keep": 9}}, set(), ""),
]  # fmt: skip


@pytest.mark.parametrize("change, invalid, key", CHANGES)
def test_another_recipe_is_refused_by_the_key_that_differs(tmp_path, change, invalid, key):
    for name in ("teacher", "meta", "distill_0", "train", "train_scratch", "evaluate"):
        folder = finished(tmp_path, name)
        before = (folder / "config.yaml").read_text()
        if name in invalid:
            with pytest.raises(ValueError, match=re.escape(f"{folder}, which was made with another recipe ({key}")):
                require(tmp_path, name, recipe(**change), "--phase x")
            with pytest.raises(ValueError, match=re.escape(f"{folder} belongs to another run ({key}")):
                open_folder(tmp_path, name, recipe(**change), RUN)
        else:
            assert require(tmp_path, name, recipe(**change), "--phase x")[0] == folder
            assert open_folder(tmp_path, name, recipe(**change), RUN) == (folder, True)
        assert (folder / "config.yaml").read_text() == before


def test_every_section_of_the_recipe_counts_somewhere():
    counted = {section for row in graph.TABLE for section in row.defined_by}
    assert counted == set(to_dict(Recipe())) - {"run", "hub", "evaluate"}  # phase evaluate always measures anew


def test_an_unfinished_folder_of_another_recipe_is_not_touched(tmp_path):
    folder, _ = open_folder(tmp_path, "meta", recipe(), RUN)
    (folder / "metrics.jsonl").touch()  # it has begun
    with pytest.raises(ValueError, match=r"belongs to another run \(seed: 0 there, 5 here\): use another --out"):
        open_folder(tmp_path, "meta", recipe(seed=5), RUN)


def test_a_start_that_was_refused_does_not_stand_in_the_way(tmp_path):
    open_folder(tmp_path, "meta", recipe(), RUN)
    folder, done = open_folder(tmp_path, "meta", recipe(seed=5), RUN)
    assert not done and yaml.safe_load((folder / "config.yaml").read_text())["recipe"]["seed"] == 5


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_the_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch, call):
    folder, _ = open_folder(tmp_path, "meta", recipe(), RUN)
    (folder / "model.safetensors").write_bytes(WEIGHTS)

    def disk_full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, call, disk_full)
        with pytest.raises(OSError, match="No space left"):
            write_result(folder, {"phase": "meta"})
    assert not (folder / "result.json").exists()
    with pytest.raises(ValueError, match="unfinished"):
        require(tmp_path, "meta", recipe(), "--phase distill")
    write_result(folder, {"phase": "meta"})
    whole = (folder / "result.json").read_text()
    monkeypatch.setattr(disk.os, call, disk_full)
    with pytest.raises(OSError):
        write_result(folder, {"phase": "meta", "metrics": {"accuracy": 1.0}})
    assert (folder / "result.json").read_text() == whole
    assert "result.json" not in json.loads(whole)["files"]


def test_a_value_that_is_not_finite_is_an_error_and_leaves_the_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"loss": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": 1.5}


def test_a_key_that_came_later_has_its_default(tmp_path):
    """A run folder of an earlier release, whose config.yaml does not know the key, stays in use."""
    folder = finished(tmp_path)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["recipe"]["data"]["max_pixels"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="max_pixels: 100000000 there, 5 here"):
        require(tmp_path, "meta", recipe(data={"max_pixels": 5}), "--phase distill")


def test_another_artifact_in_the_folder_is_refused(tmp_path):
    folder, _ = open_folder(tmp_path, "distill_0", recipe(), RUN)
    write_result(folder, {"phase": "distill", "module": 1})
    with pytest.raises(ValueError, match=r"distill_0 holds the result of distill_1: delete .* --phase distill --mod"):
        require(tmp_path, "distill_0", recipe(), "--phase train")


@pytest.mark.parametrize("name", ["/etc/hostname", "../meta/config.yaml", "checkpoints/x"])
def test_a_result_names_files_of_its_own_folder_only(tmp_path, name):
    folder = finished(tmp_path)
    result = json.loads((folder / "result.json").read_text())
    result["files"][name] = {"bytes": 1, "sha256": ""}
    write_json(folder / "result.json", result)
    with pytest.raises(ValueError, match=f"result.json names '{name}'"):
        require(tmp_path, "meta", recipe(), "--phase distill")


def test_a_token_is_not_written(tmp_path):
    token = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx"
    for made_with, run in ((recipe(), {**RUN, "command": f"run.py {token}"}), (recipe(hub={"repo": token}), RUN)):
        with pytest.raises(ValueError, match=r"holds a token or password .*\*\*\*.* HF_TOKEN") as caught:
            open_folder(tmp_path, "meta", made_with, run)
        assert token not in str(caught.value) and not list(tmp_path.rglob("*"))


def test_weights_that_do_not_fit_name_the_tensor_and_the_command(tmp_path):
    good = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    for bad, message in (
        ({"b": torch.zeros(4)}, r"b with shape \(4,\)"),
        ({"b": torch.zeros(2, dtype=torch.int32)}, "b as I32"),
        ({"b": torch.tensor([0.0, float("nan")])}, "1 values in b that are NaN"),
        ({"c": torch.zeros(1)}, "has c"),
    ):
        save_file(good | bad, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message) as caught:
            artifacts.load_weights(tmp_path, good)
        assert f"delete {tmp_path} and run" in str(caught.value)
    save_file(good, tmp_path / "model.safetensors")
    assert artifacts.load_weights(tmp_path, good).keys() == good.keys()


def test_where_a_teacher_is_cut_does_not_define_it():
    plain, cut = (to_dict(recipe(teacher={"depths": depths})) for depths in ([], [1, 2, 2, 3]))
    assert graph.defining(plain, "teacher") == graph.defining(cut, "teacher")
    assert graph.defining(plain, "distill_0") != graph.defining(cut, "distill_0")


# what an older version recorded


def recorded(folder, **sections):
    """Rewrite the recipe in an artifact's config.yaml as another version would have."""
    path = folder / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    for name, changes in sections.items():
        for key, value in changes.items():
            if value == "absent":
                del saved["recipe"][name][key]
            else:
                saved["recipe"][name][key] = value
    path.write_text(yaml.safe_dump(saved))


@pytest.mark.parametrize(
    "now, then",
    [
        ({}, {"source": "digits", "val_share": 0.0}),
        ({"path": "images"}, {"source": "folder", "val_share": 0.0}),
        ({"path": "owner/name"}, {"source": "hub", "val_share": 0.0}),
        ({"path": "owner/name", "source": "hub"}, {"source": "hub", "val_share": 0.1}),
    ],
)
def test_a_result_whose_images_an_older_version_named_otherwise_is_recognised(tmp_path, now, then):
    recorded(finished(tmp_path, made_with=recipe(data=now)), data=then)
    assert open_folder(tmp_path, "meta", recipe(data=now), RUN)[1]


def test_a_result_of_other_images_is_not(tmp_path):
    recorded(finished(tmp_path), data={"source": "fractals"})
    with pytest.raises(ValueError, match=r"data\.source: fractals there, digits here"):
        open_folder(tmp_path, "meta", recipe(), RUN)
    with pytest.raises(ValueError, match=r"data\.source: fractals there, the images of data\.path here"):
        open_folder(tmp_path, "meta", recipe(data={"path": "images"}), RUN)


def test_the_image_size_of_a_teacher_defines_a_result_and_null_is_what_it_was_before(tmp_path):
    finished(tmp_path / "trained")
    require(tmp_path / "trained", "meta", recipe(teacher={"image_size": 32}), "--phase train")
    with pytest.raises(ValueError, match=r"teacher\.image_size: 32 there, 64 here"):
        require(tmp_path / "trained", "meta", recipe(teacher={"image_size": 64}), "--phase train")
    given = {"source": "owner/name"}
    folder = finished(tmp_path / "given", made_with=recipe(teacher=given))
    with pytest.raises(ValueError, match=r"teacher\.image_size: None there, 224 here"):
        require(tmp_path / "given", "meta", recipe(teacher=given | {"image_size": 224}), "--phase train")
    # an older version wrote the default of a trained teacher, which a given one never had
    recorded(folder, teacher={"image_size": 32, "head": "absent"})
    assert open_folder(tmp_path / "given", "meta", recipe(teacher=given), RUN)[1]
