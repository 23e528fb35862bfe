"""Recipes, DeepSpeed JSON and saved configurations that are wrong or made to hurt, and worlds that do not divide."""

from pathlib import Path

import pytest

from tests.hostile.driver import cases
from tests.hostile.payloads import ALIASES
from tests.launch import TINY_RECIPE

RECIPES = {
    "tag that runs code": ("seed: !!python/object/apply:os.system [touch owned]\n", ["recipe.yaml", "python/object"]),
    "tag that reads a file": ("seed: !!python/name:os.environ\n", ["recipe.yaml", "python/name"]),
    "key given twice": ("seed: 1\nseed: 2\n", ["recipe.yaml", "seed", "twice"]),
    "key given twice below": ("train: {lr: 1, lr: 2}\n", ["recipe.yaml", "lr", "twice"]),
    "billion aliases as a key": (ALIASES, ["unknown key"]),
    "billion aliases as a value": (ALIASES.replace("j: ", "seed: "), ["unknown key"]),
    "billion aliases as a section": (ALIASES.replace("j: ", "data: "), ["unknown key"]),
    "lists nested too deeply": ("seed: " + "[" * 100_000, ["recipe.yaml", "nested too deeply"]),
    "sections nested too deeply": ("seed: " + "{a: " * 100_000, ["recipe.yaml", "nested too deeply"]),
    "no text": (b"\xff\xfe\x00\x01", ["recipe.yaml"]),
    "a list": ("- 1\n- 2\n", ["recipe.yaml", "sections"]),
    "not a number": ("train: {lr: .nan}\n", ["train.lr"]),
    "infinite": ("train: {lr: .inf}\n", ["train.lr"]),
    "number of 10,000 digits": ("seed: " + "9" * 10_000 + "\n", ["recipe.yaml"]),
    "date that does not exist": ("seed: 2024-13-45\n", ["recipe.yaml"]),
    "extends itself": ("extends: recipe.yaml\n", ["recipe.yaml extends itself"]),
    "extends a device": ("extends: /dev/zero\n", ["no recipe at /dev/zero"]),
    "extends a list": ("extends: [1]\n", ["no recipe"]),
    "list for a section": ("augment: [1, 2]\n", ["augment"]),
    "text for a number": ("train: {epochs: many}\n", ["train.epochs", "many"]),
    "1e9 modules": (f"extends: {TINY_RECIPE}\nmodules: 1000000000\n", ["modules"]),
    "1e9 experts": (f"extends: {TINY_RECIPE}\nstudent: {{moe: {{num_experts: 1000000000}}}}\n", ["num_experts"]),
    "1e9 blocks": (f"extends: {TINY_RECIPE}\nstudent: {{depth: 1000000000}}\n", ["depth"]),
}  # fmt: skip
GOOD = '"train_batch_size": "auto", "zero_optimization": {"stage": 1}'
JSON = {
    "key given twice": (f'{{{GOOD}, "gradient_clipping": 1, "gradient_clipping": 2}}', ["ds.json", "twice"]),
    "not a number": (f'{{{GOOD}, "gradient_clipping": NaN}}', ["gradient_clipping", "nan"]),
    "infinite": (f'{{{GOOD}, "gradient_clipping": Infinity}}', ["gradient_clipping", "inf"]),
    "nested too deeply": ('{"zero_optimization": ' + "[" * 200_000, ["ds.json"]),
    "no text": (b"\xff\xfe{}", ["ds.json"]),
    "a list": ("[]", ["ds.json", "object"]),
    "empty": ("", ["ds.json"]),
    "cut short": ("{" + GOOD, ["ds.json"]),
    "batch of 1e9": ('{"train_batch_size": 1000000000, "zero_optimization": {"stage": 1}}', ["1000000000"]),
    "batch of nothing": ('{"train_batch_size": 0, "zero_optimization": {"stage": 1}}', ["train_batch_size", "0"]),
    "half an image": ('{"train_micro_batch_size_per_gpu": 2.5, "zero_optimization": {"stage": 1}}', ["2.5"]),
    "stage as text": (f'{{{GOOD.replace("1}", chr(34) + "one" + chr(34) + "}")}}}', ["zero_optimization.stage", "one"]),
    "stage as a list": ('{"train_batch_size": "auto", "zero_optimization": {"stage": [1]}}', ["stage", "[1]"]),
    "ep size of 0": (f'{{{GOOD}, "trainer": {{"ep_size": 0}}}}', ["ep_size", "0"]),
}  # fmt: skip


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", cases(RECIPES))
def test_recipe(hostile, tmp_path, name):
    text, expected = RECIPES[name]
    arguments = ["--recipe", write(tmp_path / "recipe.yaml", text), "--phase", "all"]
    hostile.refuse(f"recipes: {name}", tmp_path, arguments, *expected)


@pytest.mark.parametrize("name", cases(JSON))
def test_deepspeed_json(hostile, tmp_path, name):
    text, expected = JSON[name]
    arguments = ["--ds_config", write(tmp_path / "ds.json", text), "--phase", "all"]
    hostile.refuse(f"DeepSpeed JSON: {name}", tmp_path, arguments, *expected)


WORLDS = {
    "3 ranks for 16 images": (3, ["--phase", "all"], ["16", "world 3"]),
    "ep size 2 for 3 ranks": (3, ["--phase", "all", "teacher.global_batch=18", "meta.global_batch=18",
                                  "distill.global_batch=12", "train.global_batch=12", "ds.trainer.ep_size=2"],
                              ["ep_size", "does not divide 3 ranks"]),
    "ep size 2 for 3 experts": (2, ["--phase", "all", "ds.trainer.ep_size=2", "student.moe.num_experts=3"],
                                ["ep_size", "does not divide 3 experts"]),
}  # fmt: skip


@pytest.mark.parametrize("name", cases(WORLDS))
def test_world(hostile, tmp_path, name):
    ranks, arguments, expected = WORLDS[name]
    hostile.refuse(f"worlds: {name}", tmp_path, arguments, *expected, ranks=ranks)


OVERRIDES = {
    "tag": ("seed=!!python/object/apply:os.system [touch owned]", ["seed", "python/object"]),
    "list nested too deeply": ("seed=" + "[" * 20_000, ["seed", "nested too deeply"]),
    "no key": ("=1", ["expected section.key=value"]),
    "key of dots": ("...=1", ["unknown key"]),
    "attribute of python": ("__class__=1", ["unknown key __class__"]),
    "section of python": ("train.__init__.x=1", ["unknown key"]),
    "line break": ("train.epochs=1\nerror: all is well", ["train.epochs"]),
}


@pytest.mark.parametrize("name", cases(OVERRIDES))
def test_override(hostile, tmp_path, name):
    text, expected = OVERRIDES[name]
    hostile.refuse(f"overrides: {name}", tmp_path, ["--phase", "all", text], *expected)


SAVED = {
    "tag": ("phase: all\nds_config: {}\nrecipe: !!python/object/apply:os.system [touch owned]\n", ["python/object"]),
    "billion aliases": (ALIASES + "phase: all\nds_config: *j\nrecipe: {}\n", []),
    "nested too deeply": ("[" * 100_000, ["nested too deeply"]),
    "no text": (b"\xff\xfe\x00", []),
}


@pytest.mark.parametrize("name", cases(SAVED))
def test_saved_configuration(hostile, tmp_path, name):
    text, expected = SAVED[name]
    saved = write(tmp_path / "config.yaml", text)
    hostile.refuse(f"saved: {name}", tmp_path, ["--config", saved], str(saved), *expected, plain=True)
