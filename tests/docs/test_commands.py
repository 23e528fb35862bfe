"""Every command and python block in README.md, CONTRIBUTING.md and docs/ works, typed in order from a fresh clone.

How each kind of command is run, and what is appended to make trainings small, stands in shell.py.
"""

import json

import pytest
import yaml

from tests.docs.documents import DOCUMENTS, blocks, command_lines
from tests.docs.shell import Shell, make_foreign_files, make_images, seed_teacher
from tests.hub_server import HubServer
from tests.launch import ROOT
from trainer.config.ds_config import read_ds_config
from trainer.config.load import build
from trainer.config.recipe import Recipe

LANGUAGES = ("bash", "python", "yaml", "json", "text")  # text: nothing to run


@pytest.fixture(scope="module")
def demo(warm, tmp_path_factory):
    """What `make demo` leaves, made once by the Makefile's own command line."""
    with HubServer() as hub:
        shell = Shell(tmp_path_factory.mktemp("demo"), warm, hub)
        shell.type("make demo")
    return shell.folder / "runs/demo"


@pytest.fixture
def shell(warm, demo, tmp_path):
    with HubServer() as hub:
        shell = Shell(tmp_path, warm, hub, demo)
        shell.type("make demo")
        make_images(shell.folder / "images")
        make_foreign_files(shell.folder)
        seed_teacher(hub, tmp_path / "teacher")
        yield shell


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_says_works(document, shell):
    for block in blocks(document):
        place = f"{document.relative_to(ROOT)}:{block.line}"
        assert block.language in LANGUAGES, f"{place}: the block says {block.language!r}, expected one of {LANGUAGES}"
        if block.language == "bash":
            for command in command_lines(block.text):
                shell.type(command)
        elif block.language == "python":
            shell.python(block.text, place)
        elif block.language == "yaml":
            build(Recipe, yaml.safe_load(block.text))
        elif block.language == "json":
            read_ds_config(json.loads(block.text))


def test_an_unknown_command_fails(shell):
    for command in ("frobnicate all", "make nothing-of-this-name", "python script.py", "bash slurm/other.sh"):
        with pytest.raises(AssertionError):
            shell.type(command)


def test_a_command_that_fails_fails(shell):
    for command in ("python trainer/run.py inspect runs/nothing", "ls nothing", "python trainer/run.py --help nothing",
                    "python trainer/run.py --recipe recipes/demo.yaml --ds_config ds_configs/cpu_debug.json "
                    "--phase teacher --out runs/x ds.zero_optimisation.stage=2"):  # fmt: skip
        with pytest.raises(AssertionError):
            shell.type(command)
    with pytest.raises(AssertionError):
        shell.python("from models.vmoe import VMoEE\n", "here:1")


def test_blocks_and_command_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n\n```bash\nmake x  # why\n\n  ls \\\n    b\ncat > f <<'EOF'\n# kept\nEOF\n```\n\n"
        "- b\n\n  ```text\n  c\n  ```\n"
    )
    first, second = blocks(page)
    assert (first.language, first.line, second.language, second.text) == ("bash", 4, "text", "c\n")
    assert command_lines(first.text) == ["make x", "ls b", "cat > f <<'EOF'\n# kept\nEOF"]
    page.write_text("```bash\nmake\n")
    with pytest.raises(ValueError, match="not closed"):
        list(blocks(page))
