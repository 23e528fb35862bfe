"""Who am I among the ranks, and the few collective helpers the phases need.

Ranks come from the environment: torchrun and the deepspeed launcher set RANK, srun sets SLURM_PROCID, plain python
sets nothing and is a world of one.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist


class Agreed(Exception):
    """An error that every rank raises alike: rank 0 says it for all."""


class AgreedValueError(Agreed, ValueError):
    """What a user did, found by one rank."""


class AgreedOSError(Agreed, OSError):
    """What the machine did, found by one rank."""


@dataclass(frozen=True)
class Dist:
    """This process: its rank, the world's size, its place on the node and its device."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the one that logs and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            torch_dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the ranks (in place; the same on every rank)."""
        if self.world > 1:
            torch_dist.all_reduce(values)
        return values

    def min(self, value: int) -> int:
        """Smallest of one whole number over the ranks."""
        tensor = torch.tensor(value, device=self.device, dtype=torch.int64)
        if self.world > 1:
            torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MIN)
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        """The small picklable value of every rank, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            torch_dist.all_gather_object(values, value)
        return values

    def agree(self, error: Exception | None) -> None:
        """Raise the same error on every rank when one has failed, so that no rank waits for a dead one (collective)."""
        report = None if error is None else (isinstance(error, ValueError), str(error))
        for failed in self.gather(report):
            if failed is not None:  # the lowest rank that has failed speaks for all
                bad_input, message = failed
                kind = AgreedValueError if bad_input else AgreedOSError
                raise kind(message) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which a ValueError or OSError of one rank becomes the error of all of them (collective)."""
        error = None
        try:
            yield
        except (ValueError, OSError) as problem:
            error = problem
        self.agree(error)


def ranks_from_environment(environ: dict[str, str] | os._Environ = os.environ) -> dict[str, int]:
    """Rank, world, local_rank, local_world: from RANK (torchrun, deepspeed), else SLURM_PROCID (srun), else 0 of 1."""
    if "RANK" in environ:
        world = int(environ.get("WORLD_SIZE", 1))
        local_world = int(environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", world)))
        return {
            "rank": int(environ["RANK"]),
            "world": world,
            "local_rank": int(environ.get("LOCAL_RANK", 0)),
            "local_world": local_world,
        }
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ and int(environ.get("SLURM_NTASKS", 1)) > 0:
        world = int(environ["SLURM_STEP_NUM_TASKS"])
        # like "4(x2),3": 4 tasks on two nodes, 3 on another
        per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", str(world)).split("(")[0].split(",")[0]
        return {
            "rank": int(environ["SLURM_PROCID"]),
            "world": world,
            "local_rank": int(environ.get("SLURM_LOCALID", 0)),
            "local_world": int(per_node),
        }
    return {"rank": 0, "world": 1, "local_rank": 0, "local_world": 1}


def start() -> Dist:
    """Join the process group through DeepSpeed (NCCL on GPUs, gloo on CPU) and return who this process is.

    Raises:
        ValueError: more ranks on this node than GPUs, or several ranks without a rendezvous address.
    """
    ranks = ranks_from_environment()
    cuda = torch.cuda.is_available()
    if cuda and ranks["local_rank"] >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {ranks['local_rank']} on a node with {torch.cuda.device_count()} GPUs: "
            "start one process per GPU (deepspeed --num_gpus N, or srun --ntasks-per-node N)"
        )
    _export(ranks)
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", ranks["local_rank"])
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:  # ranks of one node share its cores instead of fighting for them
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks["local_world"]))
    _init_process_group("nccl" if cuda else "gloo")
    return Dist(device=device, **ranks)


def stop() -> None:
    """Leave the process group, if there is one."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def seed_everything(seed: int, rank: int, deterministic: bool) -> None:
    """Seed random, numpy and torch by (seed, rank): each rank draws its own noise, every run the same."""
    # seed x a prime + rank x a prime: no two ranks or neighbouring seeds share a stream
    mixed = (seed * 1_000_003 + rank * 7919) % 2**31
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
    if deterministic or not torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def seed_draws(seed: int, step: int, place: int) -> None:
    """Seed every generator for one micro-batch: what is drawn there depends on (seed, step, place) and nothing else.

    Dropout, drop path and routing noise are then the same whatever the ranks and the accumulation are, and a resumed
    run needs no generator's state.

    Args:
        seed: of the phase (trainer.data.sampler.phase_seed).
        step: optimiser steps done before.
        place: number of the micro-batch in the step, micro_step x world + rank, as in trainer/data/sampler.py.
    """
    first, second = np.random.SeedSequence([seed, step, place]).generate_state(2)  # 32 bits each
    random.seed(int(first))
    np.random.seed(first)
    # 63 bits for torch: both words, without the last bit of the second
    torch.manual_seed(int(first) << 31 | int(second) >> 1)


def _export(ranks: dict[str, int]) -> None:
    """Write the ranks where DeepSpeed and torch look for them, with a rendezvous address for a world of one."""
    os.environ["RANK"] = str(ranks["rank"])
    os.environ["WORLD_SIZE"] = str(ranks["world"])
    os.environ["LOCAL_RANK"] = str(ranks["local_rank"])
    if ranks["world"] == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    elif "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise ValueError(
            f"{ranks['world']} ranks but MASTER_ADDR or MASTER_PORT is not set: start through deepspeed, torchrun or "
            "slurm/phase.sbatch, which set both"
        )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _init_process_group(backend: str) -> None:
    import deepspeed

    if backend == "gloo":
        # On CPU DeepSpeed would compile this operator (45 s, needs g++; a killed build leaves a lock that hangs later
        # runs). It only serves an inference all-reduce, which we never call.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
