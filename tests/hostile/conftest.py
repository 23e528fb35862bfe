"""What the hostile cases share: a warm python with a token in its environment, a finished run, a line of counts."""

import shutil
from pathlib import Path

import pytest

from tests.hostile.driver import QUICK, TOKEN, Hostile
from tests.launch import TINY
from tests.warm_python import WarmPython

_TABLES: list[Hostile] = []


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """The driver. Offline, with caches of its own and a token that must show up nowhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        warm = WarmPython(tmp_path_factory.mktemp("warm_hostile"))
    warm.call("tests.hostile.driver:limited", ["--help"])  # waits for the imports, which no case should be charged for
    _TABLES.append(Hostile(warm))
    yield _TABLES[-1]
    warm.close()


@pytest.fixture(scope="session")
def finished_run(hostile, tmp_path_factory) -> Path:
    """OUT of a tiny chain up to its trained student. Read only."""
    out = tmp_path_factory.mktemp("finished") / "out"
    for phase in ("teacher", "meta", "distill", "train"):
        finished = hostile.warm.run([*TINY, *QUICK, "--phase", phase, "--out", out])
        assert finished.code == 0, finished.output
    return out


@pytest.fixture
def run_copy(finished_run, tmp_path) -> Path:
    """A copy of it at tmp_path/out, to be damaged."""
    return Path(shutil.copytree(finished_run, tmp_path / "out"))


def pytest_terminal_summary(terminalreporter):
    for driver in _TABLES:
        seconds = {(kind, name): s for kind, cases in driver.seconds.items() for name, s in cases.items()}
        if seconds:
            counts = ", ".join(f"{kind} {len(cases)}" for kind, cases in sorted(driver.seconds.items()))
            (kind, name), slowest = max(seconds.items(), key=lambda item: item[1])
            terminalreporter.write_line(
                f"hostile inputs: {len(seconds)} ({counts}); slowest {slowest:.1f} s ({kind}: {name})"
            )
