"""Joining the other ranks: GPUs of tasks that see one each, ranks that never come, one rank without a network."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as torch_dist

from tests.launch import free_port
from trainer.distributed import ranks

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def no_ranks(monkeypatch):
    """No variable of a launcher; what a start writes is taken back."""
    for name in RANK_NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def start_with_gpus(monkeypatch, task: int, visible: int) -> ranks.Dist:
    """ranks.start as a task of `srun --ntasks-per-node=2`, on a node where so many GPUs are visible to it."""
    for name in RANK_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in (STEP | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(ranks, "_init_process_group", lambda backend: None)
    return ranks.start()


@pytest.mark.parametrize("task", [0, 1])
def test_a_task_that_sees_one_gpu_takes_it(no_ranks, task):
    assert start_with_gpus(no_ranks, task, visible=1).device == torch.device("cuda", 0)
    assert os.environ["LOCAL_RANK"] == "0"  # which DeepSpeed takes for the number of the GPU


@pytest.mark.parametrize("task", [0, 1])
def test_a_task_that_sees_all_gpus_takes_its_own(no_ranks, task):
    assert start_with_gpus(no_ranks, task, visible=2).device == torch.device("cuda", task)


def test_more_ranks_than_gpus(no_ranks):
    no_ranks.setitem(STEP, "SLURM_STEP_NUM_TASKS", "4")
    no_ranks.setitem(STEP, "SLURM_STEP_TASKS_PER_NODE", "4")
    with pytest.raises(ValueError, match="local rank 3 on a node with 2 GPUs: start one process per GPU"):
        start_with_gpus(no_ranks, 3, visible=2)


@pytest.mark.parametrize("uuids, shared", [(["a", "a"], True), (["a", "b"], False)])
def test_two_ranks_on_one_gpu_are_refused_on_both(monkeypatch, uuids, shared):
    store = torch_dist.HashStore()
    here = threading.local()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[here.rank]))
    said = {}

    def one(rank):
        here.rank = rank
        try:
            ranks._refuse_shared_gpus(store, rank, 2)
        except ValueError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == ([0, 1] if shared else [])
    for message in said.values():
        assert "ranks 0 and 1 have the same GPU" in message and "start one process per GPU" in message


@pytest.mark.parametrize(
    "rank, said", [(0, "1 of 2 ranks did not come to .* within 1 s: 1"), (1, "rank 1 of 2 did not")]
)
def test_ranks_that_never_come(no_ranks, rank, said):
    """RANK and WORLD_SIZE of an earlier job in the shell: nobody else will start."""
    no_ranks.setattr(ranks, "WAIT_BY_HAND", 1)
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": free_port()}.items():  # fmt: skip
        no_ranks.setenv(name, value)
    with pytest.raises(OSError, match=f"{said}.*left over in this shell: unset them"):
        ranks._meet(rank, 2)


def test_rank_0_says_whom_it_waits_for(no_ranks, caplog):
    no_ranks.setattr(ranks, "FIRST_WORD", 0.1)
    store = torch_dist.HashStore()
    store.set("here/0", "")
    with pytest.raises(OSError, match="2 of 3 ranks did not come"):
        ranks._wait_for_all(store, 3, "node1:29500", 0.3)
    assert "waiting at node1:29500 for 2 of 3 ranks: 1, 2" in caplog.text


def test_one_rank_asks_no_network(no_ranks):
    no_ranks.setenv("MASTER_ADDR", "host.of.an.earlier.job.invalid")
    no_ranks.setenv("MASTER_PORT", "29500")
    assert isinstance(ranks._meet(0, 1), torch_dist.HashStore)
