"""The connection between the ranks, and the few collectives that the training loop needs.

In: this process's :class:`Place` (berth/ranks.py) and its device. Out: a :class:`Communicator`, with a store that all ranks reach beside the
collectives (the watchdog's heartbeats go through it) and the host of every rank. How they find each other: berth/training/meeting.py.
"""

from __future__ import annotations

import datetime
import os
import re
import socket
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from berth.errors import LaunchError, LostRankError
from berth.ranks import UNKNOWN, Place, discover, master_address
from berth.training.meeting import join_errors, meet, no_longer_than, open_store, prefix, some_ranks

__all__ = ["UNKNOWN", "Communicator", "Place", "Rank", "choose_device", "discover_rank", "some_ranks"]

Rank, discover_rank = Place, discover  # the names the training code knows

# What NCCL's side of torch does when a collective fails or exceeds its timeout. 3: end the process (SIGABRT, 134) without taking the communicators
# down first, which can hang. That is the last resort for a process whose watchdog (berth/training/watchdog.py) cannot act; 0 would let the GPU wait
# for ever, 1 and 2 tidy up. Monitoring ends a process whose NCCL thread is itself stuck. A user's own settings stay.
_NCCL = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3", "TORCH_NCCL_ENABLE_MONITORING": "1", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "600"}
_BROKEN = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Timed out waiting|Broken pipe")
_SLACK_SECONDS = 10.0  # beyond a timeout before the process gives up on what should have ended by itself
_GROUP_SECONDS = 600.0  # for all ranks, which are all there, to connect to each other
# Beyond the watchdog's patience, before a collective gives up by itself: the watchdog speaks first, names the rank, and has time for its
# heartbeats and to let a checkpoint be finished (120 s).
_WATCHDOG_FIRST = datetime.timedelta(seconds=180)


class Communicator:
    """The collectives of the training loop; with one process every call returns at once.

    Args:
        place: this process among all.
        device: where collectives on NCCL must live; gloo uses the CPU.
        timeout: how long the ranks may take to find each other, and how long the watchdog lets one stand still; a collective gives up 180 s
            after that, for NCCL's own way to give up is to abort, before anybody is named.
        connect: whether to :meth:`connect`, too; without it the ranks have met, so that a watchdog can begin before they do.
        stopped: the number of the signal that asked this process to stop, 0 for none; asked while the ranks find each other.

    Attributes: ``hosts``, the host name of every rank; ``store``, a client of the store that all ranks share (``None`` in a world of one).

    Raises :class:`LaunchError` when nothing says where the ranks meet, :class:`JoinError` when they do not, ``SystemExit`` with
    128 + signal when ``stopped`` says so (where C++ waits, the process is ended with that code).
    """

    def __init__(
        self,
        place: Place,
        device: torch.device,
        timeout: datetime.timedelta,
        connect: bool = True,
        stopped: Callable[[], int] | None = None,
    ) -> None:
        self.rank, self.world_size, self.local_rank = place.rank, place.world_size, place.local_rank
        self.backend = "none"
        self.device = device
        self.hosts = [socket.gethostname()]
        self.store: dist.Store | None = None
        if place.world_size == 1:
            return
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        address = master_address(os.environ, place)
        os.environ.update(_variables(place, address))
        for name, value in _NCCL.items():
            os.environ.setdefault(name, value)
        self._place, self._address, self._timeout, self._stopped = place, address, timeout, stopped
        with join_errors(place, address), no_longer_than(timeout.total_seconds() + _SLACK_SECONDS, place, "meet the others", stopped):
            self._base = open_store(address, place, timeout, stopped)
            self._prefix = prefix(place)
            self.store = dist.PrefixStore(self._prefix, self._base)
            self.hosts = meet(self.store, place, timeout, stopped)
        if connect:
            self.connect()

    def connect(self) -> None:
        """Connect to the other ranks; collectives need it. Raises :class:`JoinError`."""
        if self.world_size == 1:
            return
        seconds = min(self._timeout.total_seconds(), _GROUP_SECONDS) + _SLACK_SECONDS
        with join_errors(self._place, self._address), no_longer_than(seconds, self._place, "connect to the others", self._stopped):
            assert self.store is not None
            dist.init_process_group(
                self.backend,
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=self._timeout + _WATCHDOG_FIRST,
                device_id=self.device if self.backend == "nccl" else None,
            )

    def new_store(self, timeout: datetime.timedelta) -> dist.Store:
        """Another client of the shared store, with a connection of its own, so that threads do not wait for each other; several ranks only.

        Raises torch's ``DistError`` when the store does not answer.
        """
        client = dist.TCPStore(self._base.host, self._base.port, self.world_size, False, timeout=timeout, wait_for_workers=False)
        return dist.PrefixStore(f"{self._prefix}/beats", client)

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

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` (on the device of the collectives: the GPU under NCCL) becomes its sum over ranks, in place, and is returned."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_floats(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's values (float64, the same number on each), in rank order, on every rank."""
        if self.world_size == 1:
            return [[float(value) for value in values]]
        return [part.tolist() for part in self._gather(torch.tensor(list(values), dtype=torch.float64))]

    def gather_texts(self, text: str) -> list[str]:
        """Every rank's text, in rank order, on every rank."""
        if self.world_size == 1:
            return [text]
        data = text.encode()
        sizes = [int(size) for (size,) in self.gather_floats([len(data)])]
        padded = torch.frombuffer(bytearray(data.ljust(max(*sizes, 1), b"\0")), dtype=torch.uint8)
        parts = self._gather(padded)
        return [bytes(part[:size].tolist()).decode() for part, size in zip(parts, sizes, strict=True)]

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

    def failure(self, error: BaseException) -> LostRankError | None:
        """``error`` as the loss of a connection between ranks, which a collective or the store raised; ``None`` when it is something else.

        It cannot say which rank is lost: :meth:`berth.training.watchdog.Watchdog.explain` does.
        """
        if self.world_size == 1 or not isinstance(error, RuntimeError):
            return None
        if not isinstance(error, dist.DistError) and not _BROKEN.search(str(error)):
            return None
        return LostRankError(
            f"rank {self.rank} on {self.hosts[self.rank]} lost its connection to another rank: {str(error).splitlines()[0]}"
        )

    def close(self) -> None:
        """Leave the process group. Gloo's is left to the end of the process: taking it down aborts at times when a peer has gone first."""
        if self.backend == "nccl" and dist.is_initialized():
            dist.destroy_process_group()

    def _collective_device(self) -> torch.device:
        return self.device if self.backend == "nccl" else torch.device("cpu")

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        tensor = tensor.to(self._collective_device())
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return [part.cpu() for part in parts]

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self._collective_device())
        dist.all_reduce(tensor, op=operation)
        return [float(value) for value in tensor.tolist()]


def _variables(place: Place, address: tuple[str, int]) -> dict[str, str]:
    """What libraries that look for themselves (DeepSpeed) must find."""
    found = {"RANK": place.rank, "WORLD_SIZE": place.world_size, "MASTER_ADDR": address[0], "MASTER_PORT": address[1]}
    known = {"LOCAL_RANK": place.local_rank, "LOCAL_WORLD_SIZE": place.local_world_size}
    return {name: str(value) for name, value in {**found, **known}.items() if value != UNKNOWN}


def choose_device(requested: str | None, place: Place) -> torch.device:
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
