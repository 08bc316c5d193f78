"""How the ranks find each other, and the few collectives that the training loop needs.

In: this process's :class:`Place` (berth/ranks.py) and its device. Out: a :class:`Communicator`, with a store that all ranks reach beside the
collectives (the watchdog's heartbeats go through it) and the host of every rank. torch's own rendezvous was rejected: it waits in silence, and
does not say whom for; two processes that claim one rank hang in it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from berth.errors import JoinError, LaunchError, LostRankError, print_error
from berth.ranks import UNKNOWN, Place, discover, master_address

__all__ = ["UNKNOWN", "Communicator", "Place", "Rank", "choose_device", "discover_rank"]

Rank, discover_rank = Place, discover  # the names the training code knows

# What NCCL's side of torch does when a collective fails or exceeds its timeout: end the process (its results are garbage), without tidying up
# first, which can hang. The monitor ends a process whose watchdog thread is itself stuck. A user's own settings stay.
_NCCL = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3", "TORCH_NCCL_ENABLE_MONITORING": "1", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "600"}
_BROKEN = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Timed out waiting|Broken pipe")
_SLACK_SECONDS = 10.0  # beyond a timeout before the process gives up on what should have ended by itself
_GROUP_SECONDS = 600.0  # for all ranks, which are all there, to connect to each other
_WORD_SECONDS = 60.0  # a rank that waits says so this often


class Communicator:
    """The collectives of the training loop; with one process every call returns at once.

    Args:
        place: this process among all.
        device: where collectives on NCCL must live; gloo uses the CPU.
        timeout: how long a collective may wait for a missing rank before all fail, and how long the ranks may take to find each other.
        connect: whether to :meth:`connect`, too; without it the ranks have met, so that a watchdog can begin before they do.

    Attributes: ``hosts``, the host name of every rank; ``store``, a client of the store that all ranks share (``None`` in a world of one).

    Raises :class:`LaunchError` when nothing says where the ranks meet, :class:`JoinError` when they do not.
    """

    def __init__(self, place: Place, device: torch.device, timeout: datetime.timedelta, connect: bool = True) -> None:
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
        with _join_errors(place, address), _no_longer_than(timeout.total_seconds() + _SLACK_SECONDS, place, "meet the others"):
            self._base = _open_store(address, place, timeout)
            self._prefix = _prefix(place)
            self.store = dist.PrefixStore(self._prefix, self._base)
            self.hosts = _meet(self.store, place, timeout)
        self._place, self._address, self._timeout = place, address, timeout
        if connect:
            self.connect()

    def connect(self) -> None:
        """Connect to the other ranks; collectives need it. Raises :class:`JoinError`."""
        if self.world_size == 1:
            return
        seconds = min(self._timeout.total_seconds(), _GROUP_SECONDS) + _SLACK_SECONDS
        with _join_errors(self._place, self._address), _no_longer_than(seconds, self._place, "connect to the others"):
            assert self.store is not None
            dist.init_process_group(
                self.backend,
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=self._timeout,
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


@contextlib.contextmanager
def _join_errors(place: Place, address: tuple[str, int]) -> Iterator[None]:
    """What torch raises in the body as a :class:`JoinError`."""
    try:
        yield
    except JoinError:
        raise
    except (RuntimeError, ValueError) as error:
        raise JoinError(
            f"rank {place.rank} on {socket.gethostname()} could not join the group of {place.world_size} ranks at {address[0]}:{address[1]}: "
            f"{error}"
        ) from error


@contextlib.contextmanager
def _no_longer_than(seconds: float, place: Place, purpose: str) -> Iterator[None]:
    """End the process with a :class:`JoinError`'s words and code when the body takes longer.

    The store's and gloo's own timeouts hold for each of several tries; a rank that dies meanwhile would keep the others for five times as long.
    """
    error = JoinError(
        f"rank {place.rank} on {socket.gethostname()} could not {purpose} within {seconds:.0f} s; see in the log of the other ranks why"
    )

    def give_up() -> None:
        print_error(error)
        os._exit(error.exit_code)

    guard = threading.Timer(seconds, give_up)
    guard.daemon = True
    guard.start()
    try:
        yield
    finally:
        guard.cancel()


def _variables(place: Place, address: tuple[str, int]) -> dict[str, str]:
    """What libraries that look for themselves (DeepSpeed) must find."""
    found = {"RANK": place.rank, "WORLD_SIZE": place.world_size, "MASTER_ADDR": address[0], "MASTER_PORT": address[1]}
    known = {"LOCAL_RANK": place.local_rank, "LOCAL_WORLD_SIZE": place.local_world_size}
    return {name: str(value) for name, value in {**found, **known}.items() if value != UNKNOWN}


def _agent_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent does


def _prefix(place: Place) -> str:
    """Keeps the attempts of one torchrun apart, and worlds of another size that came to this port by mistake."""
    return f"berth/{place.world_size}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _open_store(address: tuple[str, int], place: Place, timeout: datetime.timedelta) -> dist.TCPStore:
    """The store at ``address``: rank 0 keeps it (or torchrun's agent), the others connect, and say once a minute that it does not answer."""
    end = time.monotonic() + timeout.total_seconds()
    serve = place.rank == 0 and not _agent_keeps_store()
    while True:
        patience = datetime.timedelta(seconds=max(1.0, min(_WORD_SECONDS, end - time.monotonic())))
        try:
            store = dist.TCPStore(*address, place.world_size, serve, timeout=patience, wait_for_workers=False, multi_tenant=True)
        except dist.DistError as error:
            if serve:
                raise
            where = f"rank {place.rank} on {socket.gethostname()}: rank 0 does not answer at {address[0]}:{address[1]}"
            if time.monotonic() >= end:
                raise JoinError(
                    f"{where} after {timeout.total_seconds():.0f} s (--timeout_min); see whether it started, and whether this host may connect"
                ) from error
            print(f"{where} yet", file=sys.stderr, flush=True)
        else:
            store.set_timeout(timeout)
            return store


def _meet(store: dist.Store, place: Place, timeout: datetime.timedelta) -> list[str]:
    """Wait until every rank is here; rank 0 says once a minute for whom. The host of every rank.

    Raises :class:`JoinError` when some do not come in time, or two processes claim one rank.
    """
    host = socket.gethostname()
    me = f"{host} {os.getpid()}"
    first = store.compare_set(f"here/{place.rank}", "", me).decode()
    if first != me:
        raise JoinError(
            f"rank {place.rank} of {place.world_size} is there twice: process {me.split()[1]} on {host} and process {first.split()[1]} on "
            f"{first.split()[0]}; give every process a rank of its own, and every job a MASTER_PORT of its own"
        )
    keys = [f"here/{rank}" for rank in range(place.world_size)]
    start = time.monotonic()
    word, pause = start + _WORD_SECONDS, 0.01
    while not store.check(keys):
        late = time.monotonic() >= start + timeout.total_seconds()
        if late or (place.rank == 0 and time.monotonic() >= word):
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            text = f"rank {place.rank} on {host}: {some_ranks(missing)} of {place.world_size} {'has' if len(missing) == 1 else 'have'} not come"
            if late and missing:
                raise JoinError(f"{text} within {timeout.total_seconds():.0f} s (--timeout_min); see in the log why")
            print(f"{text} yet, waiting", file=sys.stderr, flush=True)
            word += _WORD_SECONDS
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)
    return [found.decode().split()[0] for found in store.multi_get(keys)]


def some_ranks(ranks: Sequence[int], most: int = 8) -> str:
    """``rank 3`` or ``ranks 3, 4 and 5``; of many the first ``most``."""
    shown = [str(rank) for rank in ranks[:most]]
    if len(ranks) == 1:
        return f"rank {shown[0]}"
    last = f"{len(ranks) - most} more" if len(ranks) > most else shown.pop()
    return f"ranks {', '.join(shown)} and {last}"


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
