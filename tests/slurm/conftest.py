"""One real cluster per session; without root or Slurm's packages these tests skip with the reason, in CI they fail."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import launch
from tests.slurm.chain import DS_CONFIG, EP2, RECIPE, ROOT
from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with two fake GPUs each."""
    if problem := missing():
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    running = Cluster().start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe by --phase all on two ranks, without Slurm."""
    out = tmp_path_factory.mktemp("reference") / "run"
    arguments = ["--recipe", ROOT / RECIPE, "--ds_config", ROOT / DS_CONFIG, "--phase", "all", "--out", out, EP2]
    done = launch("deepspeed", 2, arguments)
    assert done.code == 0, done.output
    return out
