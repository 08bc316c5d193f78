"""Which rank am I, and the few collectives the training loop needs.

Rank discovery lives here and nowhere else. Four families of variables are understood: torchrun (``RANK``, ``WORLD_SIZE``,
``LOCAL_RANK``), Slurm (``SLURM_PROCID``, ``SLURM_NTASKS``, ``SLURM_LOCALID``), Open MPI (``OMPI_COMM_WORLD_*``) and
MPICH/PMI (``PMI_RANK``, ``PMI_SIZE``). None of them means one process. Two families that disagree are an error, never a
silent world of one.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import socket
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from berth.errors import JoinError, LaunchError

# family -> (rank, world size, local rank)
_FAMILIES: dict[str, tuple[str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH/PMI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


UNKNOWN = -1


@dataclasses.dataclass(frozen=True)
class Rank:
    """Place of this process among all: ``rank`` in ``[0, world_size)``, ``local_rank`` on its host (or ``UNKNOWN``); who said so."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    source: str = "single process"


def discover_rank(environment: Mapping[str, str]) -> Rank:
    """Read the place of this process from the variables a launcher sets.

    Slurm's variables alone, in a shell that sits inside an allocation without ``srun`` (no ``SLURM_STEP_ID``), are not a
    launch and are ignored. Raises :class:`LaunchError` when a family is incomplete or two families disagree.
    """
    found: list[Rank] = []
    for family, (rank_key, size_key, local_key) in _FAMILIES.items():
        if family == "Slurm" and not environment.get("SLURM_STEP_ID", "").isdigit():
            continue
        if rank_key not in environment and size_key not in environment:
            continue
        found.append(_parse_family(family, environment, rank_key, size_key, local_key))
    several = [place for place in found if place.world_size > 1]
    if not several:
        return found[0] if found else Rank()
    first = several[0]
    for other in found:
        # `srun -n1 torchrun ...`: a step of one task that starts a bigger world below itself is no contradiction
        wraps = other.source != "torchrun" and first.source == "torchrun" and other.world_size == 1
        if (other.rank, other.world_size) != (first.rank, first.world_size) and not wraps:
            raise LaunchError(
                f"{first.source} says rank {first.rank} of {first.world_size}, {other.source} says rank {other.rank} of "
                f"{other.world_size}; start the program with one launcher only, or unset the other's variables"
            )
    return first


def _parse_family(family: str, environment: Mapping[str, str], rank_key: str, size_key: str, local_key: str) -> Rank:
    values = {key: environment.get(key) for key in (rank_key, size_key)}
    if None in values.values():
        missing = next(key for key, value in values.items() if value is None)
        raise LaunchError(f"{family} set one of {rank_key} and {size_key} but not {missing}; both are needed")
    try:
        rank, size = int(values[rank_key] or ""), int(values[size_key] or "")
        local = int(environment.get(local_key) or (rank if size == 1 else UNKNOWN))
    except ValueError as error:
        raise LaunchError(f"{family} variables {rank_key}, {size_key}, {local_key} must be whole numbers: {error}") from error
    if not 0 <= rank < size:
        raise LaunchError(f"{rank_key}={rank} is outside 0..{size - 1} ({size_key}={size})")
    return Rank(rank, size, local, family)


class Communicator:
    """The collectives of the training loop; with one process every call returns at once.

    Args:
        place: this process among all.
        device: where collectives on NCCL must live; gloo uses the CPU.
        timeout: how long a collective may wait for a missing rank before all fail.
    """

    def __init__(self, place: Rank, device: torch.device, timeout: datetime.timedelta) -> None:
        self.rank, self.world_size, self.local_rank = place.rank, place.world_size, place.local_rank
        self.backend = "none"
        self.device = device
        if place.world_size == 1:
            return
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        if place.source != "torchrun" and "MASTER_ADDR" not in os.environ:
            raise LaunchError(
                f"{place.source} started {place.world_size} ranks but MASTER_ADDR and MASTER_PORT are not set; export the first "
                "host's name and a free port before the launch"
            )
        try:
            dist.init_process_group(
                self.backend,
                rank=place.rank,
                world_size=place.world_size,
                timeout=timeout,
                device_id=device if self.backend == "nccl" else None,
            )
        except (RuntimeError, ValueError) as error:
            raise JoinError(
                f"rank {place.rank} on {socket.gethostname()} could not join the group of {place.world_size} ranks: {error}"
            ) from error

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and prints."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in float64 (exact for counts below 2**53)."""
        if self.world_size == 1:
            return [float(value) for value in values]
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Element-wise maximum over ranks."""
        if self.world_size == 1:
            return [float(value) for value in values]
        return self._reduce(values, dist.ReduceOp.MAX)

    def broadcast_ints(self, values: Sequence[int]) -> list[int]:
        """Rank 0's integers, on every rank; all must pass the same number of values."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.int64, device=self._collective_device())
        dist.broadcast(tensor, src=0)
        return [int(value) for value in tensor.tolist()]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group. Gloo's is left to the end of the process: taking it down aborts at times when a peer has gone first."""
        if self.backend == "nccl" and dist.is_initialized():
            dist.destroy_process_group()

    def _collective_device(self) -> torch.device:
        return self.device if self.backend == "nccl" else torch.device("cpu")

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self._collective_device())
        dist.all_reduce(tensor, op=operation)
        return [float(value) for value in tensor.tolist()]


def choose_device(requested: str | None, place: Rank) -> torch.device:
    """``cuda:<local_rank>`` where a GPU is there (or demanded), else ``cpu``.

    A process that sees one GPU takes it (a launcher gave it that one). Raises :class:`LaunchError` when ``cuda`` is demanded and
    absent, or there are fewer GPUs than local ranks.
    """
    if requested == "cpu" or (requested is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LaunchError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu or a CUDA build of torch")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else place.rank % count if place.local_rank == UNKNOWN else place.local_rank
    if index >= count:
        raise LaunchError(f"local rank {place.local_rank} has no GPU of its own: torch sees {count}; start one process a GPU")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
