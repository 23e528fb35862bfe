"""slurm/m2mkd_vmoe.sh itself: which python it takes, and what the environment of a driver job hands to the chain."""

import shutil
import subprocess
import sys

import pytest

from tests.unit.test_slurm_chain import DS_CONFIG, RECIPE, ROOT
from trainer.chain import settings as chain_settings

GIVEN = {"RECIPE": RECIPE, "DS_CONFIG": DS_CONFIG, "OUT": "/no/such/run"}


@pytest.fixture
def bare_path(tmp_path):
    """A PATH with what the driver needs, and without python."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "readlink", "hostname"):
        (programs / name).symlink_to(shutil.which(name))
    return str(programs)


def status(bare_path, *flags, **environ):
    command = [shutil.which("bash"), ROOT / "slurm/m2mkd_vmoe.sh", "status", *flags]
    return subprocess.run(command, env={"PATH": bare_path} | GIVEN | environ, capture_output=True, text=True)


@pytest.mark.parametrize("style", ["env-file", "env-file=", "python", "python=", "environment"])
def test_flags_decide_which_python_reads_them(tmp_path, bare_path, style):
    env_file = tmp_path / "env.sh"
    env_file.write_text(f'PATH="{tmp_path}/venv:$PATH"\n')
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/python").symlink_to(sys.executable)
    assert "no python on" in status(bare_path).stderr
    value = str(env_file) if style.startswith("env-file") else sys.executable
    environ = {"ENV_FILE": str(env_file)} if style == "environment" else {}
    flags = [f"--{style}{value}"] if style.endswith("=") else [f"--{style}", value]
    done = status(bare_path, *([] if environ else flags), **environ)
    assert done.returncode == 2 and done.stderr.startswith("error: nothing was submitted for /no/such/run yet")


def test_the_account_of_a_driver_job_is_the_chains():
    assert chain_settings.read(["plan"], GIVEN | {"SLURM_JOB_ACCOUNT": "mine"})[1].account == "mine"
    given = GIVEN | {"SLURM_JOB_ACCOUNT": "mine", "ACCOUNT": "ours"}
    assert chain_settings.read(["plan"], given)[1].account == "ours"
    assert chain_settings.read(["plan"], GIVEN)[1].account == ""
