"""The modelling file that hub.code pushes, the address of the code on the card, and what a push does with both."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

from models.students import CLASSES
from tests.hub_server import HubServer
from tests.run_folder import finish_run, new_nac, new_recipe, new_student
from trainer.config.load import build
from trainer.config.recipe import Recipe
from trainer.hub.address import code_address, install_command, public
from trainer.hub.code import auto_map, file_name, modelling_file
from trainer.hub.push import plan, push

FILE = file_name("vmoe")
NAC = {"modules": 3, "student": {"kind": "nac", "nac": {"preset": "small"}}}  # of a recipe
SOURCES = {
    "auto.py": "from .low import helper\nfrom .pack import twice\n\nREMOTE = {'vmoe': {'AutoModel': 'Model'}}\n\n\n"
    "def _log(x):\n    return x + 1\n\n\nclass Model:\n    def run(self, x):\n        return twice(helper(_log(x)))\n",
    "low.py": "import math\n\n# what log counts in\nBASE = 2\n\n\ndef _log(x):\n    return math.log(x, BASE)\n\n\n"
    "def helper(x):\n    return _log(x)\n\n\ndef unused():\n    return missing\n",
    "pack/__init__.py": "from .part import twice\n",
    "pack/part.py": "from ..low import BASE\n\n\ndef twice(x):\n    return BASE * x\n",
}


@pytest.fixture
def sources(tmp_path) -> Path:
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_what_is_reached_comes_with_its_comments_and_names_stay_apart(sources):
    text = modelling_file("vmoe", "from here", sources)
    assert "from here" in text and "unused" not in text and "import math" in text
    assert "# what log counts in\nBASE = 2" in text
    # two modules have a _log: the first keeps its name, the other one's uses follow
    space: dict = {}
    tree = compile(text, FILE, "exec")
    names = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert sorted(names) == ["Model", "_auto_log", "_log", "helper", "twice"]
    exec(tree, space)
    assert space["Model"]().run(7) == 2 * 3  # log2(7 + 1), twice
    assert auto_map("vmoe", sources) == {"AutoModel": "modeling_vmoe.Model"}


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        (
            "low.py",
            "return _log(x)",
            "from .pack import twice\n    return _log(x)",
            "line 12 imports inside of a function",
        ),
        ("auto.py", "import helper", "import nothing", "nothing is used but not defined there"),
        ("auto.py", "def run(self, x):", "def run(self, _log):", r"argument _log is a name of another module"),
        ("low.py", "math.log(x, BASE)", "math.log(x, BASES)", f"{FILE} would use BASES in line"),
    ],
)
def test_what_does_not_go_into_one_file_is_named(sources, name, old, new, message):
    text = SOURCES[name].replace(old, new)
    if new == "import nothing":
        text = text.replace("helper(", "nothing(")
    (sources / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        modelling_file("vmoe", "", sources)


@pytest.mark.parametrize("model_type", CLASSES)
def test_the_real_one_is_of_the_sources_and_passes_the_linter(tmp_path, model_type):
    text = modelling_file(model_type, "Sources: nowhere.")
    path = tmp_path / file_name(model_type)
    path.write_text(text)
    linted = ["ruff", "check", "--isolated", "--line-length", "120", "--select", "E,F", str(path)]
    done = subprocess.run(linted, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    classes = {node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    assert {name.partition(".")[2] for name in auto_map(model_type).values()} <= classes
    assert classes & {"VMoE", "NAC"} == {CLASSES[model_type].__name__}
    assert "import deepspeed" not in text and text == modelling_file(model_type, "Sources: nowhere.")
    # what transformers refuses to load the file without
    required = {"torch", "timm", "transformers", "safetensors", "huggingface_hub", "packaging", "numpy"}
    assert set(get_imports(path)) - set(sys.stdlib_module_names) <= required


@pytest.mark.parametrize(
    "remote, address",
    [
        ("git@github.com:alice/m2mkd.git", "https://github.com/alice/m2mkd"),
        ("https://alice:hf_secret@github.com/alice/m2mkd.git", "https://github.com/alice/m2mkd"),
        ("ssh://git@git.example.org:2222/alice/m2mkd", "https://git.example.org/alice/m2mkd"),
        ("http://git.example.org:8080/m2mkd/", "http://git.example.org:8080/m2mkd"),
        ("/srv/git/m2mkd.git", None),
        ("file:///srv/git/m2mkd.git", None),
        ("../m2mkd", None),
        ("host:m2mkd", None),
        ("", None),
    ],
)
def test_a_remote_as_an_address_for_others(remote, address):
    assert public(remote) == address


def test_the_address_is_that_of_the_clone_or_the_one_given(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert code_address("", tmp_path) is None
    subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", "git@host.org:a/b.git"], check=True)
    assert code_address("", tmp_path) == "https://host.org/a/b"
    assert code_address("https://me@other.org/code", tmp_path) == "https://other.org/code"
    assert install_command("https://host.org/a/b", "abc") == 'pip install "m2mkd @ git+https://host.org/a/b@abc"'
    assert install_command("https://host.org/m2mkd-1-py3-none-any.whl", "abc") == (
        'pip install "m2mkd @ https://host.org/m2mkd-1-py3-none-any.whl"'
    )


def test_an_address_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"hub.code_url is 'github.com/a/b', expected an address such as https://"):
        build(Recipe, {"hub": {"code_url": "github.com/a/b"}})


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_push_with_code_and_one_without_over_it(tmp_path, monkeypatch, model_type):
    sections, student = ({}, new_student()) if model_type == "vmoe" else (NAC, new_nac())
    file = file_name(model_type)
    finish_run(tmp_path / "run", new_recipe(**sections), student)
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        recipe = new_recipe(hub={"code": True, "code_url": "https://host.org/a/b"}, **sections)
        push(plan(tmp_path / "run", recipe), recipe.hub)
        files = hub.files("alice/model")
        config = json.loads(files["config.json"])
        assert config["auto_map"] == auto_map(model_type) and config["m2mkd_version"]
        assert "Sources: https://host.org/a/b, commit " in files[file].decode()
        assert json.loads(files["preprocessor_config.json"])["image_processor_type"] == "ViTImageProcessor"
        card = files["README.md"].decode()
        assert "trust_remote_code=True" in card and f"`{file}` is the model in one file" in card
        without = new_recipe(hub={"code_url": "https://host.org/a/b"}, **sections)
        push(plan(tmp_path / "run", without), without.hub)
        files = hub.files("alice/model")
        assert file not in files and "preprocessor_config.json" not in files
        assert "auto_map" not in json.loads(files["config.json"])
        assert "trust_remote_code" not in files["README.md"].decode()


def test_without_an_address_the_card_says_so(tmp_path, monkeypatch, caplog):
    finish_run(tmp_path, new_recipe(), new_student())
    monkeypatch.setattr("trainer.hub.push.code_address", lambda url: None)
    card = plan(tmp_path, new_recipe()).card
    assert (
        "its address was not given when this model was pushed (`hub.code_url`)" in card
        and "pip install git" not in card
    )
    assert "the model card names no address of the code: set hub.code_url" in caplog.text
