"""The ranks in a container: flags of srun for pyxis, a command in front of python for apptainer and its like."""

from __future__ import annotations

import shlex
from pathlib import Path

from trainer.chain.settings import Settings

PYXIS = "pyxis"


def srun_flags(settings: Settings, work: Path) -> list[str]:
    """What pyxis adds to srun; nothing for another runtime, or without a container.

    Args:
        work: the checkout, where relative paths begin.
    """
    if not settings.container or settings.container_runtime != PYXIS:
        return []
    mounts = ",".join(_mounts(settings, work))
    return [f"--container-image={settings.container}", f"--container-mounts={mounts}", f"--container-workdir={work}"]


def command(settings: Settings, work: Path, gpus: bool) -> list[str]:
    """What stands in front of python; nothing for pyxis, or without a container."""
    if not settings.container or settings.container_runtime == PYXIS:
        return []
    words = [*shlex.split(settings.container_runtime), "exec"]
    if gpus:
        words.append("--nv")
    return [*words, "--bind", ",".join(_mounts(settings, work)), "--pwd", str(work), settings.container]


def _mounts(settings: Settings, work: Path) -> list[str]:
    folders = [f"{folder}:{folder}" for folder in (settings.run, work)]
    return [*folders, *(part for part in settings.container_mounts.split(",") if part)]
