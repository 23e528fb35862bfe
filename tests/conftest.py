"""Runs before every test module, and what integration tests and fault tests share: warm ranks, one finished chain."""

import models  # noqa: F401  isort: skip  first: torchvision's cure must come before anything imports timm or transformers

import pytest

from tests.launch import TINY, launch
from tests.warm_python import WarmPython


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
