"""Who am I among the ranks, and the few collective helpers the phases need.

What launchers put into the environment is read in launchers.py.
"""

from __future__ import annotations

import logging
import math
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist

from trainer.config.load import one_line
from trainer.distributed.launchers import (
    ranks_from_environment,
    ranks_on_this_node,
    rendezvous_address,
    started_by_hand,
)

log = logging.getLogger(__name__)

WAIT = 600  # seconds for the other ranks of a launcher: nodes start, and import torch, at different speeds
FIRST_WORD = 15  # seconds after which rank 0 says whom it waits for
WAIT_BY_HAND = 60  # ... of ranks that no launcher set, where nobody else may ever come


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

    def share(self, value: Any) -> Any:
        """Rank 0's picklable value on every rank (collective); what the others give is not looked at."""
        values = [value if self.main else None]
        if self.world > 1:
            torch_dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

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


def start() -> Dist:
    """Join the process group (NCCL on GPUs, gloo on CPU) and return who this process is.

    Raises:
        ValueError: what the environment says contradicts itself, more ranks on this node than GPUs, several ranks on
            one GPU, several ranks without a rendezvous address.
        OSError: the other ranks did not come in time.
    """
    ranks = ranks_from_environment()
    cuda = torch.cuda.is_available()
    gpu = ranks["local_rank"]
    if cuda:
        visible = torch.cuda.device_count()
        if visible == 1:
            gpu = 0  # srun --gpus-per-task=1 shows every rank a GPU of its own; that they differ is checked below
        elif gpu >= visible:
            raise ValueError(
                f"local rank {gpu} on a node with {visible} GPUs: "
                "start one process per GPU (deepspeed --num_gpus N, or srun --ntasks-per-node N)"
            )
    if ranks["world"] > 1:
        rendezvous_address()  # refused here, before anything is waited for
    _export(ranks | {"local_rank": gpu})  # DeepSpeed takes LOCAL_RANK for the number of the GPU
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", gpu)
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:  # ranks of one node share its cores instead of fighting for them
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_on_this_node()))
    _init_process_group("nccl" if cuda else "gloo")
    dist = Dist(device=device, **ranks)
    if torch_dist.is_initialized():
        # nodes with different numbers of ranks: what divides all of them, so that every rank spreads experts alike
        dist = replace(dist, local_world=math.gcd(*dist.gather(dist.local_world)))
    return dist


def start_light() -> Dist:
    """The same for work that no engine does: a process on its own joins no group, and so waits for no DeepSpeed.

    Raises:
        ValueError, OSError: see start.
    """
    if ranks_from_environment()["world"] > 1:
        return start()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return Dist(rank=0, world=1, local_rank=0, local_world=1, device=device)


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
    """Write the ranks where DeepSpeed and torch look for them."""
    os.environ["RANK"] = str(ranks["rank"])
    os.environ["WORLD_SIZE"] = str(ranks["world"])
    os.environ["LOCAL_RANK"] = str(ranks["local_rank"])


def _init_process_group(backend: str) -> None:
    import deepspeed

    if backend == "gloo":
        # On CPU DeepSpeed would compile this operator (45 s, needs g++; a killed build leaves a lock that hangs later
        # runs). It only serves an inference all-reduce, which we never call.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch_dist.is_initialized():  # a second run_phase of one process finds the group of the first
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _meet(rank, world)
        if backend == "nccl":
            _refuse_shared_gpus(store, rank, world)
        torch_dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _meet(rank: int, world: int) -> torch_dist.Store:
    """The store through which the ranks find each other, once all of them are there.

    Raises:
        OSError: they are not, after a while; rank 0 names those that are missing.
    """
    if world == 1:
        return torch_dist.HashStore()  # no network: an address that is left over in the shell is not asked
    address = rendezvous_address()
    limit = WAIT_BY_HAND if started_by_hand() else WAIT
    served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, _, port = address.rpartition(":")
    try:
        server = torch_dist.TCPStore(
            host,
            int(port),
            world,
            is_master=rank == 0 and not served_by_torchrun,
            timeout=timedelta(seconds=limit),
            wait_for_workers=False,  # so that the missing ones can be named
            multi_tenant=True,
        )
        store = torch_dist.PrefixStore(f"m2mkd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", server)
        store.set(f"here/{rank}", "")
        if rank == 0:
            _wait_for_all(store, world, address, limit)
            store.set("all here", "")
        store.wait(["all here"], timedelta(seconds=limit + 5))
    except (torch_dist.DistError, RuntimeError) as error:  # nobody listens there, or rank 0 has given up
        raise OSError(
            f"rank {rank} of {world} did not meet the others at {address} within {limit} s "
            f"({one_line(error)[:200]}). {_check_the_ranks()}"
        ) from error
    store.set_timeout(torch_dist.default_pg_timeout)
    return store


def _wait_for_all(store: torch_dist.Store, world: int, address: str, limit: float) -> None:
    """Rank 0: until every rank is there; says after a while whom it waits for."""
    begun = time.monotonic()
    has_said = False
    missing = list(range(world))
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        waited = time.monotonic() - begun
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        if waited > limit:
            raise OSError(
                f"{len(missing)} of {world} ranks did not come to {address} within {limit} s: {names}. "
                f"{_check_the_ranks()}"
            )
        if waited > FIRST_WORD and not has_said:
            log.warning("waiting at %s for %d of %d ranks: %s", address, len(missing), world, names)
            has_said = True
        time.sleep(0.05)


def _check_the_ranks() -> str:
    advice = "Check that every rank was started, with the same MASTER_ADDR and MASTER_PORT"
    if started_by_hand():
        advice += "; RANK and WORLD_SIZE may be left over in this shell: unset them to train with one process"
    return advice


def _refuse_shared_gpus(store: torch_dist.Store, rank: int, world: int) -> None:
    """Raise a ValueError on every rank when two of them have the same GPU: NCCL would fail, or wait, only later."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    store.set(f"m2mkd/gpu/{rank}", f"{socket.gethostname()} {getattr(gpu, 'uuid', rank)}")
    owners: dict[bytes, int] = {}
    # one question for all: a thousand ranks that each ask a thousand times keep the one server busy for minutes
    places = store.multi_get([f"m2mkd/gpu/{other}" for other in range(world)])
    for other, where in enumerate(places):
        if where in owners:
            host = where.decode().split()[0]
            raise ValueError(
                f"ranks {owners[where]} and {other} have the same GPU of {host}: start one process per GPU "
                "(deepspeed --num_gpus N, srun --gpus-per-task=1, or CUDA_VISIBLE_DEVICES with all of them)"
            )
        owners[where] = other
