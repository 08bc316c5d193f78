"""Who makes which records files when several processes or jobs share the work: MPI, a Slurm array, or ``srun`` without MPI.

Every participant sees the same list of jobs and deals them out in the same way, largest text first to whoever has least, so
nobody needs to be asked. Files are independent of each other, and finished ones are skipped; a participant that was killed is
replaced by running the same command again, with any number of participants.
"""

from __future__ import annotations

import dataclasses
import heapq
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from berth.errors import BerthError, ConfigError

MODES = ("auto", "none", "mpi", "array", "srun")
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Share:
    """This process's part of the work: number ``index`` of ``count``. ``comm`` is MPI's communicator if there is one."""

    index: int
    count: int
    kind: str
    comm: Any = None

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def sees_all(self) -> bool:
        """Whether this process learns of everybody's results: it is alone, or rank 0 of an MPI run."""
        return self.count == 1 or (self.comm is not None and self.first)

    def gather(self, values: list[Made]) -> list[Made]:
        """Everybody's values at rank 0, in rank order; elsewhere, and without MPI, only one's own."""
        if self.comm is None:
            return values
        every = self.comm.gather(values)
        return [value for part in every for value in part] if every is not None else values

    def guarded(self, work: Callable[[], int | None]) -> int | None:
        """Run ``work``; under MPI an error of one rank ends all of them at once, instead of leaving them waiting for it."""
        if self.comm is None:
            return work()
        try:
            return work()
        except BaseException as error:
            if isinstance(error, BerthError):
                print(f"error: rank {self.index}: {error}", file=sys.stderr, flush=True)
            else:
                print(f"error: rank {self.index} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            self.comm.Abort(error.exit_code if isinstance(error, BerthError) else 1)
            raise


def find_share(mode: str, environment: Mapping[str, str] | None = None) -> Share:
    """This process's share by ``mode`` and the environment variables of MPI and Slurm.

    ``auto`` takes MPI when started by ``mpirun`` or ``srun --mpi=...``, else a Slurm array task, else the tasks of an ``srun``,
    else everything. Raises :class:`ConfigError` when what is asked for is not there, or the variables contradict MPI.
    """
    env = os.environ if environment is None else environment
    if mode == "mpi" or (mode == "auto" and _under_mpi(env)):
        return _mpi_share(env)
    if mode == "array" or (mode == "auto" and "SLURM_ARRAY_TASK_ID" in env):
        return _array_share(env)
    if mode == "srun" or (mode == "auto" and _step_tasks(env) > 1):
        if not {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS"} <= env.keys():  # a batch script has the last two, without any other task
            raise ConfigError("--distributed srun: not started by srun (SLURM_STEP_ID, SLURM_PROCID and SLURM_NTASKS are not all set)")
        return Share(_number(env, "SLURM_PROCID"), _step_tasks(env), "srun")
    return Share(0, 1, "none")


def _step_tasks(env: Mapping[str, str]) -> int:
    """How many tasks srun started beside this one, itself included; in the shell of salloc SLURM_NTASKS is that of the whole job."""
    if "SLURM_STEP_ID" not in env:
        return 1
    return _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS")


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except KeyError:
        raise ConfigError(
            f"{name} is not set, though Slurm sets it with the others; say --distributed none, or start the task anew"
        ) from None
    except ValueError:
        raise ConfigError(f"{name}={env[name]!r} is not a number") from None


def _under_mpi(env: Mapping[str, str]) -> bool:
    """Whether a launcher of MPI started this process as one of several."""
    sizes = [env[name] for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS") if name in env]
    if any(size != "1" for size in sizes):
        return True
    return "PMIX_RANK" in env and _tasks(env) > 1


def _tasks(env: Mapping[str, str]) -> int:
    """How many tasks the launcher says there are; 1 when it does not say."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        if name in env:
            return _number(env, name)
    return 1


def _mpi_share(env: Mapping[str, str]) -> Share:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            f"started by an MPI launcher, but mpi4py cannot be loaded ({error}): pip install 'berth[mpi]' and load the MPI module of "
            "your system, or say --distributed none (one process does all) or srun"
        ) from None
    comm = MPI.COMM_WORLD
    if comm.size == 1 and _tasks(env) > 1:
        raise ConfigError(
            f"the launcher started {_tasks(env)} tasks, but MPI sees only one: mpi4py uses another MPI than the launcher (for srun try "
            "--mpi=pmix, see 'srun --mpi=list'; or MPI4PY_MPIABI), or say --distributed srun, which needs no MPI"
        )
    return Share(comm.rank, comm.size, "mpi", comm)


def _array_share(env: Mapping[str, str]) -> Share:
    if "SLURM_ARRAY_TASK_ID" not in env:
        raise ConfigError("--distributed array: not a task of a Slurm array (SLURM_ARRAY_TASK_ID is not set); sbatch --array=0-7")
    task, least, most = (_number(env, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX"))
    step = _number(env, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in env else 1
    count = (most - least) // step + 1
    if "SLURM_ARRAY_TASK_COUNT" in env and _number(env, "SLURM_ARRAY_TASK_COUNT") != count:
        raise ConfigError(
            f"the array has {env['SLURM_ARRAY_TASK_COUNT']} tasks with ids from {least} to {most}: the work can only be dealt to an evenly "
            f"numbered array such as --array=0-{count - 1}; finished files are skipped, so run the whole array again"
        )
    inner = _step_tasks(env)  # srun inside every task of the array
    return Share((task - least) // step * inner + (_number(env, "SLURM_PROCID") if inner > 1 else 0), count * inner, "array")


def deal(items: Sequence[Item], sizes: Sequence[int], count: int) -> list[list[Item]]:
    """``items`` to ``count`` lists of about equal size; the same for everybody who asks, each list in the order of ``items``."""
    heap = [(0, number) for number in range(count)]
    chosen: list[list[int]] = [[] for _ in range(count)]
    for place in sorted(range(len(items)), key=lambda place: (-sizes[place], place)):
        load, number = heapq.heappop(heap)
        chosen[number].append(place)
        heapq.heappush(heap, (load + max(1, sizes[place]), number))
    return [[items[place] for place in sorted(places)] for places in chosen]
