"""Whose share is whose under MPI, Slurm arrays and srun; contradictions are errors, not silent halves of the work."""

from __future__ import annotations

import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.errors import ConfigError, DataError
from berth.records.deal import Share, deal, find_share


class FakeComm:
    """What of MPI's communicator is used."""

    def __init__(self, rank: int = 0, size: int = 1, others: list[list[str]] | None = None) -> None:
        self.rank, self.size, self.others = rank, size, others or []
        self.aborted: list[int] = []

    def gather(self, values: list[str]) -> list[list[str]] | None:
        return [values, *self.others] if self.rank == 0 else None

    def Abort(self, code: int) -> None:
        self.aborted.append(code)


@pytest.fixture
def mpi(monkeypatch):
    def start(rank: int, size: int) -> FakeComm:
        comm = FakeComm(rank, size)
        module = types.ModuleType("mpi4py")
        module.MPI = types.SimpleNamespace(COMM_WORLD=comm)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "mpi4py", module)
        return comm

    return start


@pytest.fixture
def no_mpi(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)


def array(task: int, least: int, most: int, step: int | None = 1, count: int | None = None, **more: str) -> dict[str, str]:
    values = {"ID": task, "MIN": least, "MAX": most, "STEP": step, "COUNT": count}
    return {**{f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items() if value is not None}, **more}


def step(rank: int, size: int, **more: str) -> dict[str, str]:
    return {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size), **more}


BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}  # the shell of sbatch: no srun has started anything
INTERACTIVE = step(0, 8, SLURM_STEP_NUM_TASKS="1")  # the shell of salloc


@pytest.mark.parametrize("env", [{}, BATCH, INTERACTIVE, step(0, 1), {"OMPI_COMM_WORLD_SIZE": "1"}, {"PMI_SIZE": "1"}, {"PMIX_RANK": "0"}])
def test_alone(no_mpi, env):
    assert find_share("auto", env) == Share(0, 1, "none")
    assert find_share("none", {**env, **array(1, 0, 3)}) == Share(0, 1, "none")


@pytest.mark.parametrize(
    "env",
    [
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_SIZE": "4"},
        {"MPI_LOCALNRANKS": "4"},
        step(2, 4, PMIX_RANK="2"),
        step(2, 8, PMIX_RANK="2", SLURM_STEP_NUM_TASKS="4"),
        array(1, 0, 3, OMPI_COMM_WORLD_SIZE="4"),
    ],
)
def test_mpi(mpi, env):
    comm = mpi(2, 4)
    share = find_share("auto", env)
    assert (share.index, share.count, share.kind, share.comm) == (2, 4, "mpi", comm)
    assert not share.first and not share.sees_all
    mpi(0, 4)
    assert find_share("mpi", env).sees_all


def test_mpi_that_sees_one_task_where_there_are_more(mpi):
    mpi(0, 1)
    for env in ({"OMPI_COMM_WORLD_SIZE": "4"}, step(2, 4, PMIX_RANK="2"), {"PMI_SIZE": "4"}):
        with pytest.raises(ConfigError, match=r"started 4 tasks, but MPI sees only one.*--mpi=pmix.*--distributed srun"):
            find_share("auto", env)
    assert find_share("mpi", {}).count == 1
    with pytest.raises(ConfigError, match="PMI_SIZE='many' is not a number"):
        find_share("auto", {"PMI_SIZE": "many"})


def test_mpi_without_mpi4py(no_mpi):
    with pytest.raises(ConfigError, match=r"mpi4py cannot be loaded.*berth\[mpi\].*--distributed none"):
        find_share("auto", {"OMPI_COMM_WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("env", "index", "count"),
    [
        (array(0, 0, 3), 0, 4),
        (array(3, 0, 3, count=4), 3, 4),
        (array(5, 5, 9, step=None), 0, 5),
        (array(8, 0, 12, step=4, count=4), 2, 4),
        (array(8, 0, 15, step=4, count=4), 2, 4),
        (array(7, 7, 7, count=1), 0, 1),
        (array(2, 0, 3, **BATCH), 2, 4),
        (array(2, 0, 3, **INTERACTIVE), 2, 4),
        (array(2, 0, 3, **step(1, 4)), 9, 16),
    ],
)
def test_a_slurm_array(env, index, count):
    assert find_share("auto", env) == find_share("array", env) == Share(index, count, "array")


def test_an_array_with_srun_inside_gives_every_task_another_share():
    shares = [find_share("auto", array(task, 4, 8, 2, 3, **step(rank, 5))) for task in (4, 6, 8) for rank in range(5)]
    assert sorted(share.index for share in shares) == list(range(15))
    assert {share.count for share in shares} == {15}


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (array(5, 1, 7, count=3), r"3 tasks with ids from 1 to 7.*--array=0-6"),
        (array(1, 0, 3, count="x"), "SLURM_ARRAY_TASK_COUNT='x' is not a number"),  # type: ignore[arg-type]
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN is not set"),
        ({"SLURM_ARRAY_TASK_ID": ""}, "SLURM_ARRAY_TASK_ID='' is not a number"),
    ],
)
def test_arrays_that_cannot_be_dealt_to(env, message):
    with pytest.raises(ConfigError, match=message):
        find_share("auto", env)


def test_srun_without_mpi(no_mpi):
    assert find_share("auto", step(3, 8)) == Share(3, 8, "srun")
    assert find_share("srun", step(0, 8, SLURM_STEP_NUM_TASKS="2")) == Share(0, 2, "srun")


@pytest.mark.parametrize(("mode", "env"), [("array", {}), ("srun", {}), ("srun", BATCH), ("srun", {"SLURM_STEP_ID": "0"})])
def test_what_is_asked_for_is_not_there(mode, env):
    with pytest.raises(ConfigError, match=f"--distributed {mode}: not"):
        find_share(mode, env)


# ------------------------------------------------------------------------------------------------------------- dealing


@given(sizes=st.lists(st.integers(0, 1000), max_size=40), count=st.integers(1, 9))
def test_everything_is_dealt_once_and_evenly(sizes, count):
    items = [f"i{number}" for number in range(len(sizes))]
    dealt = deal(items, sizes, count)
    assert dealt == deal(items, sizes, count) and len(dealt) == count
    assert sorted(item for part in dealt for item in part) == sorted(items)
    loads = [sum(sizes[items.index(item)] for item in part) for part in dealt]
    assert max(loads) - min(loads) <= max(sizes, default=0) + len(items)
    for part in dealt:
        assert part == sorted(part, key=items.index)


def test_equal_and_empty_files_are_spread():
    assert [len(part) for part in deal(list("abcdef"), [0] * 6, 3)] == [2, 2, 2]
    assert deal(["small", "large", "middle"], [1, 9, 5], 2) == [["large"], ["small", "middle"]]


# --------------------------------------------------------------------------------------------------- talking to others


def test_gather():
    assert Share(1, 3, "array").gather(["mine"]) == ["mine"]
    assert Share(0, 3, "mpi", FakeComm(0, 3, [["b", "c"], []])).gather(["a"]) == ["a", "b", "c"]
    assert Share(1, 3, "mpi", FakeComm(1, 3)).gather(["b"]) == ["b"]
    assert Share(0, 1, "none").sees_all and not Share(0, 2, "array").sees_all


def test_an_error_of_one_rank_ends_all(capsys):
    def wrong():
        raise DataError("bad text")

    def usage():
        raise ConfigError("bad option")

    def bug():
        raise ZeroDivisionError("a bug")

    for work, code, message in ((wrong, 1, "error: rank 2: bad text\n"), (usage, 2, "bad option"), (bug, 1, "ZeroDivisionError: a bug")):
        comm = FakeComm(2, 4)
        with pytest.raises((DataError, ConfigError, ZeroDivisionError)):
            Share(2, 4, "mpi", comm).guarded(work)
        assert comm.aborted == [code]
        assert message in capsys.readouterr().err
    comm = FakeComm(2, 4)
    assert Share(2, 4, "mpi", comm).guarded(lambda: 5) == 5 and comm.aborted == []
    with pytest.raises(DataError):
        Share(0, 1, "none").guarded(wrong)
    assert capsys.readouterr().err == ""
