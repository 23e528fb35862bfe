"""A token on the command line, in a recipe or in the environment shows up nowhere.

Every case of this suite runs with TOKEN in HF_TOKEN and is searched for it; these are the ones that bring their own.
"""

import pytest

from tests.hostile.driver import TOKEN, cases, holds_token
from tests.launch import TINY

OTHER = "hf_" + "AnotherFakeToken" + "ZyXwVuTs"  # of someone else: known by its shape alone
CASES = {
    "as a repository": ["--phase", "teacher", "hub.repo={}"],
    "as a flag": ["--phase", "teacher", "--token={}"],
    "as a value of a flag": ["--phase", "{}"],
    "as an unknown key": ["--phase", "teacher", "hub.token={}"],
    "as the name of a key": ["--phase", "teacher", "hub.{}=1"],
    "in an address of data": ["--phase", "teacher", "data.source=hub", "data.path=https://user:{}@127.0.0.1/x"],
    "in an address of a teacher": ["--phase", "meta", "teacher.source=https://{}@127.0.0.1/owner/name"],
    "in the DeepSpeed JSON": ["--phase", "teacher", "ds.wandb.api_key={}"],
}


@pytest.mark.parametrize("token", [TOKEN, OTHER], ids=["own", "other"])
@pytest.mark.parametrize("name", cases(CASES))
def test_command_line(hostile, tmp_path, name, token):
    arguments = [text.format(token) for text in CASES[name]]
    error = hostile.refuse(f"tokens: {name}, {'own' if token == TOKEN else 'other'}", tmp_path, arguments)
    assert token not in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def test_recipe(hostile, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"extends: {TINY[3]}\nhub: {{repo: {OTHER}}}\n")
    arguments = ["--recipe", tmp_path / "recipe.yaml", "--phase", "teacher"]
    error = hostile.refuse("tokens: in a recipe", tmp_path, arguments)
    assert OTHER not in error
    assert not any(OTHER.encode() in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_environment(hostile, tmp_path):
    """A whole phase, with checkpoints and trackers: no file and no line holds the token."""
    arguments = [*TINY, "--phase", "teacher", "teacher.epochs=1", "--out", tmp_path / "out"]
    finished = hostile.warm.run(arguments)
    assert finished.code == 0, finished.output
    assert TOKEN not in finished.output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("checkpoints" in path.parts for path in files)
    assert not [path for path in files if holds_token(path)]
