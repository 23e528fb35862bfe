"""Who a launcher says this process is: rank, world and place on the node, from its environment variables. No torch.

torchrun and the deepspeed launcher set RANK, srun sets SLURM_PROCID, the MPI launchers set variables of their own, and
plain python sets nothing and is a world of one. What contradicts itself is refused by name: a process that takes itself
for the only one would train alone, into the same folder as the others.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

START = "start through deepspeed, torchrun or srun"
# any of these says that a launcher of processes set RANK, and not srun's own task
SETTERS_OF_RANK = ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE")


@dataclass(frozen=True)
class Mpi:
    """The variables of an MPI launcher, in the order of preference; the same variable may serve several launchers."""

    name: str
    rank: str
    world: str
    local_rank: tuple[str, ...]
    local_world: tuple[str, ...]


MPI = (
    Mpi(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Mpi(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Mpi(
        "jsrun",
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_SIZE",
        ("JSM_NAMESPACE_LOCAL_RANK",),
        ("JSM_NAMESPACE_LOCAL_SIZE",),
    ),
    Mpi("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", ("FLUX_TASK_LOCAL_ID",), ()),
    Mpi(
        "MPICH or Intel MPI",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS",),
    ),
)
# of launchers that say which process this is, but not of how many
RANK_ALONE = {"PMIX_RANK": "a PMIx launcher", "PALS_RANKID": "PALS"}


def ranks_from_environment(environ: Mapping[str, str] = os.environ) -> dict[str, int]:
    """This process among the ranks.

    The order: RANK (torchrun, deepspeed), an MPI launcher inside of a Slurm job, srun, any other MPI launcher, alone.

    Returns:
        rank, world, local_rank, local_world. local_world is the ranks of a node; where srun tells that nodes differ,
        the largest number that divides the ranks of every node.

    Raises:
        ValueError: a variable that is no number, numbers that contradict each other, or a launcher that does not say
            enough. The variable is named.
    """
    if "RANK" in environ:
        ranks = _of_rank(environ)
    elif (mpi := _mpi(environ)) is not None:
        ranks = _of_mpi(mpi, environ)
    elif _in_slurm_step(environ):
        ranks = _of_slurm(environ)
    else:
        ranks = _alone(environ)
    rank, world = ranks["rank"], ranks["world"]
    if rank >= world:
        raise ValueError(
            f"this process is rank {rank} of {world}, expected a rank from 0 to {world - 1}: {START}, or unset the "
            "variables that are left over in this shell (RANK, WORLD_SIZE, ...)"
        )
    return ranks


def spokesman_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The rank as far as a variable says one, however odd the rest is: 0 is who says what all ranks would say alike."""
    for name in ("RANK", *(mpi.rank for mpi in MPI), "SLURM_PROCID"):
        text = environ.get(name, "")
        if text.isascii() and text.isdecimal():
            return int(text)
    return 0


def ranks_on_this_node(environ: Mapping[str, str] = os.environ) -> int:
    """Processes that share the cores of this node."""
    if "RANK" not in environ and _mpi(environ) is None and _in_slurm_step(environ):
        counts = _slurm_counts(environ)
        node = _number(environ, "SLURM_NODEID", 0)
        return counts[node] if node < len(counts) else counts[0]
    return ranks_from_environment(environ)["local_world"]


def started_by_hand(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether RANK and WORLD_SIZE were set by no launcher known here: by a user, or left over in a shell."""
    return "RANK" in environ and not any(name in environ for name in SETTERS_OF_RANK) and not _in_slurm_step(environ)


def rendezvous_address(environ: Mapping[str, str] = os.environ) -> str:
    """HOST:PORT where several ranks meet.

    Raises:
        ValueError: MASTER_ADDR or MASTER_PORT is not set, or the port is none.
    """
    host, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if not host or not port:
        ranks = ranks_from_environment(environ)
        raise ValueError(
            f"{ranks['world']} ranks but MASTER_ADDR or MASTER_PORT is not set, so they cannot meet: {START} "
            "(slurm/phase.sbatch sets both), or set both to the same values for every rank"
        )
    if not port.isascii() or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"MASTER_PORT is {port!r}, expected a port from 1 to 65535: set it, or {START}")
    return f"{host}:{port}"


def _of_rank(environ: Mapping[str, str]) -> dict[str, int]:
    world = _number(environ, "WORLD_SIZE", 1, least=1)
    rank = _number(environ, "RANK")
    local_world = _number(environ, "LOCAL_WORLD_SIZE", None, least=1)
    if local_world is None:
        local_world = _number(environ, "LOCAL_SIZE", world, least=1)
    local_rank = _number(environ, "LOCAL_RANK", 0)
    if local_world > world or local_rank >= local_world:
        raise ValueError(
            f"LOCAL_RANK {local_rank} of {local_world} on this node does not fit WORLD_SIZE {world}: unset RANK, "
            f"WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, which may be left over in this shell, and {START}"
        )
    if not any(name in environ for name in SETTERS_OF_RANK):
        _refuse_other_launcher(rank, world, environ)
    return {"rank": rank, "world": world, "local_rank": local_rank, "local_world": local_world}


def _refuse_other_launcher(rank: int, world: int, environ: Mapping[str, str]) -> None:
    """RANK left over in the shell that srun or mpirun was started in is the same for all of their processes."""
    others = []
    if _in_slurm_step(environ):
        others.append(("srun", _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS", 1)))
    for mpi in MPI:
        if mpi.rank in environ and mpi.world in environ:
            others.append((mpi.name, _number(environ, mpi.rank), _number(environ, mpi.world)))
    for name, their_rank, their_world in others:
        if their_world > 1 and (their_rank, their_world) != (rank, world):
            raise ValueError(
                f"RANK is {rank} of WORLD_SIZE {world}, but {name} says that this is process {their_rank} of "
                f"{their_world}: unset RANK and WORLD_SIZE, which seem to be left over in the shell"
            )


def _mpi(environ: Mapping[str, str]) -> Mpi | None:
    """The MPI launcher that started this process, if one did and srun does not say the same."""
    for mpi in MPI:
        if mpi.rank in environ and mpi.world in environ:
            if not _in_slurm_step(environ):
                return mpi
            theirs = (environ[mpi.rank], environ[mpi.world])
            slurms = (environ["SLURM_PROCID"], environ["SLURM_STEP_NUM_TASKS"])
            if theirs != slurms:  # else srun itself set them, for MPI programs
                return mpi
    return None


def _of_mpi(mpi: Mpi, environ: Mapping[str, str]) -> dict[str, int]:
    world = _number(environ, mpi.world, least=1)
    rank = _number(environ, mpi.rank)
    if world == 1:
        return _single()
    local_rank = _first(environ, mpi.local_rank)
    local_world = _first(environ, mpi.local_world)
    if local_rank is None or local_world is None:
        raise ValueError(
            f"{mpi.name} says that this is process {rank} of {world} ({mpi.rank}, {mpi.world}), but not which of how "
            f"many on its node: {START}, one process per GPU"
        )
    if not environ.get("MASTER_ADDR") or not environ.get("MASTER_PORT"):
        raise ValueError(
            f"{mpi.name} says that this is process {rank} of {world} ({mpi.rank}, {mpi.world}), but MASTER_ADDR and "
            f"MASTER_PORT are not set, so they cannot meet: {START}, or set both to the same values for every process"
        )
    return {"rank": rank, "world": world, "local_rank": local_rank, "local_world": local_world}


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script and the shell of salloc have SLURM_PROCID without a step."""
    return "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ


def _of_slurm(environ: Mapping[str, str]) -> dict[str, int]:
    return {
        "rank": _number(environ, "SLURM_PROCID"),
        "world": _number(environ, "SLURM_STEP_NUM_TASKS", least=1),
        "local_rank": _number(environ, "SLURM_LOCALID", 0),
        "local_world": math.gcd(*_slurm_counts(environ)),
    }


def _slurm_counts(environ: Mapping[str, str]) -> list[int]:
    """Tasks of every node of the step: "4(x2),3" is 4 tasks on two nodes and 3 on another."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ["SLURM_STEP_NUM_TASKS"]
    counts = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not found or not int(found[1]):
            raise ValueError(
                f'SLURM_STEP_TASKS_PER_NODE is {text!r}, expected something like "4(x2),3": start through srun, or '
                "unset the SLURM_ variables that are left over in this shell"
            )
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _alone(environ: Mapping[str, str]) -> dict[str, int]:
    """A world of one, unless something says that there are others."""
    world = _number(environ, "WORLD_SIZE", 1)
    if world > 1:
        raise ValueError(
            f"WORLD_SIZE is {world} but RANK is not set, so this process does not know which of them it is: {START}, "
            "or unset WORLD_SIZE, which may be left over in this shell, to train with one process"
        )
    for variable, launcher in RANK_ALONE.items():
        if variable in environ and _number(environ, variable) > 0:
            raise ValueError(
                f"{launcher} says that this is process {environ[variable]} ({variable}), but not of how many: {START}"
            )
    return _single()


def _single() -> dict[str, int]:
    return {"rank": 0, "world": 1, "local_rank": 0, "local_world": 1}


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        if name in environ:
            return _number(environ, name)
    return None


def _number(environ: Mapping[str, str], name: str, otherwise: int | None = None, least: int = 0) -> int | None:
    """A variable as a whole number; `otherwise` where it is not set."""
    text = environ.get(name)
    if text is None:
        return otherwise
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        what = "empty" if not text else repr(text)
        raise ValueError(
            f"the environment variable {name} is {what}, expected a whole number from {least}: unset it, or {START}"
        )
    return int(text)
