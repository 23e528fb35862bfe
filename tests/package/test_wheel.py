"""What the wheel and the sdist hold, and that importing what is in the wheel reaches neither DeepSpeed nor datasets."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.launch import ROOT
from tests.package.environments import build_sdist, build_wheel

SOURCES = {path.relative_to(ROOT / "models").as_posix() for path in (ROOT / "models").rglob("*.py")}
# every module but DeepSpeed's layer, which is imported by who trains over ranks
IMPORT_ALL = """
import pkgutil, importlib, sys
for name in ("deepspeed", "datasets", "models", "trainer", "transformers"):
    sys.modules[name] = None  # importing it fails
sys.path.insert(0, {wheel!r})
import m2mkd
for module in pkgutil.walk_packages(m2mkd.__path__, "m2mkd."):
    if module.name not in ("m2mkd.moe.deepspeed_layer", "m2mkd.auto"):
        importlib.import_module(module.name)
print(m2mkd.__version__, m2mkd.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_models_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = {name.split("/")[0] for name in names} - {"m2mkd"}
        assert {name.removeprefix("m2mkd/") for name in names if name.startswith("m2mkd/")} == SOURCES
        metadata = archive.read(f"{about}/METADATA").decode()
        assert "m2mkd = m2mkd.cli:main" in archive.read(f"{about}/entry_points.txt").decode()
    assert wheel.stat().st_size < 300_000
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line]
    assert {re.split(r"[<>=]", line.split()[1])[0] for line in required} == {
        "torch",
        "timm",
        "huggingface_hub",
        "safetensors",
        "numpy",
        "pillow",
        "packaging",
        "networkx",
    }


def test_the_sdist_builds_the_same_and_holds_no_trainer(tmp_path):
    with tarfile.open(build_sdist(tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"models/{name}" for name in SOURCES} <= names and {"LICENSE", "pyproject.toml"} <= names
    assert not any(name.startswith(("trainer", "tests", "recipes", "ds_configs", "slurm")) for name in names)


def test_all_of_it_is_imported_without_deepspeed_datasets_and_transformers(wheel, tmp_path):
    code = IMPORT_ALL.format(wheel=str(wheel))
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(wheel) in done.stdout


def test_the_package_requires_no_less_than_the_project():
    """Floors and ceilings of pyproject.toml are those of requirements.txt, which make test-lowest tries."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = project["dependencies"] + project["optional-dependencies"]["transformers"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    tried = {line.split(">")[0]: line for line in lines if line and not line.startswith("#")}
    for line in ours:
        name = line.split(">")[0]
        if name != "packaging":
            assert tried[name].startswith(line), line
