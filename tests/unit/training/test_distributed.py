"""Rank discovery: every launcher's variables, and no silent world of one."""

import datetime

import pytest
import torch

from berth.errors import LaunchError
from berth.training.distributed import Communicator, Rank, choose_device, discover_rank

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}


@pytest.mark.parametrize(("variables", "source"), [(TORCHRUN, "torchrun"), (SLURM, "Slurm"), (OPEN_MPI, "Open MPI"), (PMI, "MPICH/PMI")])
def test_each_launcher(variables, source):
    assert discover_rank(variables) == Rank(3, 8, 1, source)


def test_nothing_set_is_one_process():
    assert discover_rank({"PATH": "/bin"}) == Rank(0, 1, 0, "single process")


def test_families_that_agree():
    assert discover_rank({**SLURM, **PMI, **TORCHRUN}).world_size == 8


def test_torchrun_below_a_single_slurm_task():
    assert discover_rank({**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", **TORCHRUN}) == Rank(3, 8, 1, "torchrun")


def test_an_allocation_without_srun_is_no_launch():
    shell = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}
    assert discover_rank(shell).world_size == 1
    assert discover_rank({**SLURM, "SLURM_STEP_ID": "batch"}).world_size == 1


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({**SLURM, **OPEN_MPI, "OMPI_COMM_WORLD_RANK": "4"}, "rank 3 of 8.*rank 4 of 8"),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "1"}, "rank 0 of 1"),
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"RANK": "8", "WORLD_SIZE": "8"}, "outside"),
        ({"RANK": "one", "WORLD_SIZE": "8"}, "whole numbers"),
    ],
)
def test_contradictions_are_errors(variables, words):
    with pytest.raises(LaunchError, match=words):
        discover_rank(variables)


def test_single_process_collectives_return_at_once():
    alone = Communicator(Rank(), torch.device("cpu"), datetime.timedelta(seconds=1))
    assert alone.sum([1, 2.5]) == [1.0, 2.5] and alone.broadcast_ints([4]) == [4] and alone.is_main
    alone.barrier()
    alone.close()


def test_slurm_without_an_address_is_explained(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        Communicator(Rank(0, 2, 0, "Slurm"), torch.device("cpu"), datetime.timedelta(seconds=1))


def test_demanding_a_gpu_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert choose_device(None, Rank()).type == "cpu"
    with pytest.raises(LaunchError, match="--device cpu"):
        choose_device("cuda", Rank())
