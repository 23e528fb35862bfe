"""Environments without the clone: a new venv, in it what the tested packages need, and nothing else of this one.

Installing torch anew takes minutes and gigabytes, so what is in it are links to what the environment of the tests has:
the packages asked for and what they require, no other one. `make test-wheel` does the same with pip and the registry.
"""

import importlib.metadata as metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from tests.launch import ROOT

MENDED = "torchvision::nms"
WHOLE = ("models", "docs", "trainer", "tests", "recipes", "ds_configs", "slurm", "benchmarks")
FRESH = bool(os.environ.get("FRESH_ENVIRONMENTS"))  # by pip, from the registry


def build_wheel(folder: Path) -> Path:
    """The wheel, from a copy of what goes into it, by the backend that `python -m build` calls."""
    return _build(folder, "build_wheel", "*.whl", ("models", "docs"))


def build_sdist(folder: Path) -> Path:
    """The same of the source archive; its copy is the whole clone, so that what must not be in it could be."""
    return _build(folder, "build_sdist", "*.tar.gz", WHOLE)


def new_environment(folder: Path, packages: Sequence[str]) -> Path:
    """A venv in `folder` with these packages, what they require, and pip; returns its bin folder."""
    if FRESH:
        venv.create(folder, symlinks=True, with_pip=True)
        if packages:
            done = run(folder / "bin", f"pip install -q {' '.join(packages)}", folder)
            assert done.returncode == 0, done.stderr
        return folder / "bin"
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in sorted(_required([*packages, "pip"])):
        _link(name, site)
    pip = folder / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec {folder}/bin/python -m pip "$@"\n')
    pip.chmod(0o755)
    return folder / "bin"


def mend_torchvision(bin_folder: Path) -> None:
    """Make PyPI's torchvision load beside a CPU torch, where that is the pair there is; see models/_torchvision.py.

    For what is tested without our package: transformers and timm import torchvision, and an environment that a user has
    can do so.
    """
    python = bin_folder / "python"
    done = subprocess.run([python, "-c", "import torchvision"], capture_output=True, text=True)
    if MENDED in done.stderr:
        (site,) = bin_folder.parent.glob("lib/python*/site-packages")
        shutil.copyfile(ROOT / "models" / "_torchvision.py", site / "mended_torchvision.py")
        # imported at every start; not sitecustomize.py, of which Debian's Python has one of its own
        (site / "mended_torchvision.pth").write_text("import mended_torchvision\n")


def run(bin_folder: Path, command: str | Sequence[str], cwd: Path, **environ: str) -> subprocess.CompletedProcess:
    """A command, or a line of shell, in the environment, with nothing of the clone in reach."""
    words = ["/bin/sh", "-c", command] if isinstance(command, str) else [str(bin_folder / command[0]), *command[1:]]
    options = clean_environ(bin_folder) | environ
    if not FRESH:
        options["PIP_NO_INDEX"] = "1"  # what is installed finds there what it requires
    return subprocess.run(words, cwd=cwd, env=options, capture_output=True, text=True, timeout=1800)


def clean_environ(bin_folder: Path) -> Mapping[str, str]:
    """Variables of this process without those that lead Python anywhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "HF_"))}
    return kept | {
        "PATH": f"{bin_folder}{os.pathsep}/usr/bin{os.pathsep}/bin",
        "PYTHONNOUSERSITE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _build(folder: Path, hook: str, result: str, folders: Sequence[str]) -> Path:
    """Call the backend of pyproject.toml in a copy of these folders and what lies beside them."""
    copy = folder / "source"
    copy.mkdir()
    for name in folders:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, copy / name)
    code = f"import setuptools.build_meta as backend, sys; backend.{hook}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob(result)
    return built


def _required(packages: Sequence[str]) -> set[str]:
    """The packages and, as far as they are installed here, what they require."""
    found: set[str] = set()
    to_do = list(packages)
    while to_do:
        name = _plain(to_do.pop())
        if name in found:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for line in requires:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                to_do.append(requirement.name)
    return found


def _link(name: str, site: Path) -> None:
    """Link what a package has put into site-packages."""
    files = metadata.distribution(name).files or []
    for top in sorted({file.parts[0] for file in files} - {"..", "__pycache__"}):
        source = Path(metadata.distribution(name).locate_file(top))
        if source.exists() and not (site / top).exists():
            (site / top).symlink_to(source)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
