"""Runs before every test module, and what integration tests and fault tests share: warm ranks, one finished chain."""

import models  # noqa: F401  isort: skip  first: torchvision's cure must come before anything imports timm or transformers

import logging

import pytest

from tests.launch import TINY, launch
from tests.warm_python import WarmPython


@pytest.fixture(autouse=True)
def logging_as_found():
    """A command run inside of a test sets the root logger up anew, with a stream that ends with the test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers).difference(handlers):
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """Forks ranks that need no imports any more."""
    python = WarmPython(tmp_path_factory.mktemp("warm"))
    yield python
    python.close()


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """OUT of an undisturbed `deepspeed --num_gpus 2 ... --phase all` at ep 2, and what it printed. Read only."""
    out = tmp_path_factory.mktemp("chain") / "out"
    finished = launch("deepspeed", 2, [*TINY, "--phase", "all", "--out", out])
    assert finished.code == 0, finished.output
    return out, finished.output
