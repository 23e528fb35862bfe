"""Who a process is by what launchers, shells and schedulers put into its environment: right, or one clear line."""

import pytest

from trainer.config.ds_config import _ep_size
from trainer.distributed.launchers import (
    ranks_from_environment,
    ranks_on_this_node,
    rendezvous_address,
    started_by_hand,
)

MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
STEP = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
DAEMON = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
ALONE = {"rank": 0, "world": 1, "local_rank": 0, "local_world": 1}
THIRD_OF_FOUR = {"rank": 3, "world": 4, "local_rank": 1, "local_world": 2}

UNDERSTOOD = {
    "plain python": ({}, ALONE),
    "torchrun": ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, THIRD_OF_FOUR),
    "deepspeed": ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, THIRD_OF_FOUR),
    "srun": (STEP, THIRD_OF_FOUR),
    "srun --mpi=pmi2, which sets PMI_ too": (STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"}, THIRD_OF_FOUR),
    "srun --mpi=pmix": (STEP | {"PMIX_RANK": "3"}, THIRD_OF_FOUR),
    "a batch script, no step": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, ALONE),
    "the shell of salloc": ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, ALONE),
    "mpirun of Open MPI": (OPEN_MPI | MEETING, THIRD_OF_FOUR),
    "mpirun inside a job, its daemons by srun": (
        STEP | OPEN_MPI | MEETING | DAEMON,
        THIRD_OF_FOUR,
    ),
    "mpiexec of MPICH or Intel MPI": (HYDRA | MEETING, THIRD_OF_FOUR),
    "mpiexec -n 1": ({"PMI_RANK": "0", "PMI_SIZE": "1"}, ALONE),
    "prte, one process": ({"PMIX_RANK": "0"}, ALONE),
    "torchrun on each node of srun": (
        STEP | TORCHRUN,
        {"rank": 5, "world": 8, "local_rank": 1, "local_world": 2},
    ),
    "left over WORLD_SIZE=1": ({"WORLD_SIZE": "1"}, ALONE),
    "left over MASTER_ADDR": (MEETING, ALONE),
    "left over LOCAL_RANK of a notebook": ({"LOCAL_RANK": "3"}, ALONE),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_launchers_that_are_understood(case):
    environ, ranks = UNDERSTOOD[case]
    assert ranks_from_environment(environ) == ranks


REFUSED = {
    "RANK=": ({"RANK": ""}, "RANK is empty"),
    "RANK=abc": ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK is 'abc'"),
    "RANK=1.0": ({"RANK": "1.0", "WORLD_SIZE": "2"}, "RANK is '1.0'"),
    "RANK=-1": ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
    "WORLD_SIZE=": ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is empty"),
    "WORLD_SIZE=0": ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    "RANK beyond the world": ({"RANK": "5", "WORLD_SIZE": "2"}, "rank 5 of 2"),
    "RANK alone, above 0": ({"RANK": "1"}, "rank 1 of 1"),
    "LOCAL_RANK beyond the node": ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
                                   "LOCAL_RANK 2 of 2"),
    "a node larger than the world": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"},
                                     "does not fit WORLD_SIZE 2"),
    "WORLD_SIZE=2 without RANK": ({"WORLD_SIZE": "2"}, "RANK is not set"),
    "two MPI processes without an address": (HYDRA, "MASTER_ADDR and MASTER_PORT are not set"),
    "PMI without the place on the node": ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK, PMI_SIZE"),
    "Open MPI without an address": (OPEN_MPI, "MASTER_ADDR and MASTER_PORT are not set"),
    "MVAPICH": ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2"}, "MVAPICH"),
    "jsrun": ({"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "2"}, "jsrun"),
    "Flux": ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2", "FLUX_TASK_LOCAL_ID": "1"}, "Flux"),
    "PMIx without a size": ({"PMIX_RANK": "1"}, "PMIX_RANK"),
    "RANK of the shell under srun": (STEP | {"RANK": "0", "WORLD_SIZE": "1"}, "srun says that this is process 3 of 4"),
    "RANK of the shell under mpirun": (OPEN_MPI | MEETING | {"RANK": "0", "WORLD_SIZE": "4"},
                                       "Open MPI says that this is process 3 of 4"),
    "PMI_RANK=x": ({"PMI_RANK": "x", "PMI_SIZE": "2"}, "PMI_RANK is 'x'"),
    "tasks per node that are none": (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(y2)"}, "SLURM_STEP_TASKS_PER_NODE"),
    "SLURM_PROCID beyond the step": (STEP | {"SLURM_PROCID": "4"}, "rank 4 of 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_itself_is_refused_by_name(case):
    environ, said = REFUSED[case]
    with pytest.raises(ValueError, match=said.replace("(", r"\(")) as error:
        ranks_from_environment(environ)
    assert "\n" not in str(error.value)
    assert "unset" in str(error.value) or "start through" in str(error.value)


@pytest.mark.parametrize("port", ["", "abc", "0", "70000", "-1"])
def test_a_port_that_is_none(port):
    with pytest.raises(ValueError, match="MASTER_PORT"):
        rendezvous_address({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": port})


def test_nodes_with_different_numbers_of_ranks_agree_on_what_divides_all_of_them():
    uneven = STEP | {"SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}
    for procid, node in (("0", "0"), ("10", "2")):
        ranks = ranks_from_environment(uneven | {"SLURM_PROCID": procid, "SLURM_NODEID": node})
        assert ranks["local_world"] == 1
        assert _ep_size("auto", ranks["world"], ranks["local_world"], 8) == 1
    assert ranks_on_this_node(uneven | {"SLURM_NODEID": "2"}) == 3
    assert ranks_from_environment(STEP | {"SLURM_STEP_NUM_TASKS": "12", "SLURM_STEP_TASKS_PER_NODE": "8,4"}
                                  )["local_world"] == 4  # fmt: skip


def test_auto_divides_the_world_too():
    assert _ep_size("auto", world=3, local_world=2, num_experts=4) == 1


def test_ranks_set_by_hand_are_told_from_those_of_a_launcher():
    by_hand = {"RANK": "0", "WORLD_SIZE": "2"} | MEETING
    assert started_by_hand(by_hand)
    assert not started_by_hand(by_hand | {"LOCAL_WORLD_SIZE": "2"})
    assert not started_by_hand({})
