"""One real cluster per session; without root or Slurm's packages these tests skip with the reason, in CI they fail."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.chain import DS_CONFIG, EP2, RECIPE, ROOT
from tests.slurm.cluster import Cluster, missing
from tests.warm_python import WarmPython


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
def warm_ranks(cluster: Cluster) -> Iterator[dict[str, str]]:
    """Settings of a chain whose ranks start in a second (warm_rank)."""
    place = cluster.state / "run/warm_ranks"
    command = cluster.inside([sys.executable, str(ROOT / "tests/slurm/warm_ranks.py"), str(place)], ROOT)
    environ = cluster.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with (cluster.state / "log/warm_ranks.log").open("w") as log:
        server = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    try:
        cluster.wait_for(lambda: place.exists() or server.poll() is not None, 120, "the server of warm ranks")
        assert place.exists(), (cluster.state / "log/warm_ranks.log").read_text()
        yield {"PYTHON": str(ROOT / "tests/slurm/warm_rank"), "WARM_RANKS": str(place)}
    finally:
        server.kill()


@pytest.fixture(scope="session")
def reference(warm: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe by --phase all on two ranks, without Slurm."""
    out = tmp_path_factory.mktemp("reference") / "run"
    arguments = ["--recipe", ROOT / RECIPE, "--ds_config", ROOT / DS_CONFIG, "--phase", "all", "--out", out, EP2]
    done = warm.run(arguments, ranks=2, timeout=300)
    assert done.code == 0, done.output
    return out
