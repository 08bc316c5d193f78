"""How the ranks find each other: rank 0 keeps a store, all others connect to it and wait until every rank is there.

In: this process's :class:`Place` and the address of rank 0. Out: the store, and the host of every rank; or an error that says who did not come, who
is there twice, or that rank 0 does not answer. A signal to stop ends the waiting within two seconds. torch's own rendezvous was rejected: it
waits in silence, and does not say whom for; two processes that claim one rank hang in it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist

from berth.errors import JoinError, print_error
from berth.ranks import Place
from berth.training.stop import SIGNALS, exit_code

Stopped = Callable[[], int] | None  # the number of the signal that asked this process to stop, 0 for none
_WORD_SECONDS = 60.0  # a rank that waits says so this often
_LOOK_SECONDS = 0.5  # between two looks of the thread that guards the waiting
_HEED_SECONDS = 1.2  # that the main thread has to notice a signal by itself
_ALL_HERE = "all here"


@contextlib.contextmanager
def join_errors(place: Place, address: tuple[str, int]) -> Iterator[None]:
    """What torch raises in the body as a :class:`JoinError`."""
    try:
        yield
    except JoinError:
        raise
    except (RuntimeError, ValueError) as error:
        raise JoinError(
            f"{_me(place)} could not join the group of {place.world_size} ranks at {address[0]}:{address[1]}: {error}"
        ) from error


@contextlib.contextmanager
def no_longer_than(seconds: float, place: Place, purpose: str, stopped: Stopped = None) -> Iterator[None]:
    """End the process with a :class:`JoinError`'s words and code when the body takes longer, and when it does not heed a signal to stop.

    The store's and gloo's own timeouts hold for each of several tries; a rank that dies meanwhile would keep the others for five times as long.
    """
    done, end = threading.Event(), time.monotonic() + seconds

    def guard(arrived: Callable[[], int]) -> None:
        while not done.wait(max(0.0, min(_LOOK_SECONDS, end - time.monotonic()))):
            number = arrived()
            if number and not done.wait(_HEED_SECONDS):
                os.write(2, f"{_stopped_words(place, purpose, number)}\n".encode())
                os._exit(exit_code(number))
            if time.monotonic() >= end:
                error = JoinError(f"{_me(place)} could not {purpose} within {seconds:.0f} s; see in the log of the other ranks why")
                print_error(error)
                os._exit(error.exit_code)

    with _signals(stopped) as arrived:
        thread = threading.Thread(target=guard, args=(arrived,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


@contextlib.contextmanager
def _signals(stopped: Stopped) -> Iterator[Callable[[], int]]:
    """A function for another thread: the number of the stop signal so far, 0 for none.

    Python's handlers run in the main thread, and not while that is in C++; the interpreter writes a signal's number to a pipe at once.
    """
    if stopped is None:
        yield lambda: 0
        return
    if threading.current_thread() is not threading.main_thread():  # only the main thread may have the pipe
        yield stopped
        return
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def arrived() -> int:
        try:
            numbers = os.read(read_end, 4096)
        except BlockingIOError:
            numbers = b""
        return stopped() or next((number for number in numbers if number in SIGNALS), 0)

    try:
        yield arrived
    finally:
        signal.set_wakeup_fd(before)
        os.close(read_end)
        os.close(write_end)


def _heed(stopped: Stopped, place: Place) -> None:
    """Raise ``SystemExit`` when a signal asked this process to stop."""
    if stopped is not None and stopped():
        print(_stopped_words(place, "meet the others", stopped()), file=sys.stderr, flush=True)
        raise SystemExit(exit_code(stopped()))


def _stopped_words(place: Place, purpose: str, number: int) -> str:
    return f"{_me(place)}: stopped by {signal.Signals(number).name} before it could {purpose}"


def _me(place: Place) -> str:
    return f"rank {place.rank} on {socket.gethostname()}"


def _agent_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent does


def prefix(place: Place) -> str:
    """Keeps the attempts of one torchrun apart, and worlds of another size that came to this port by mistake."""
    return f"berth/{place.world_size}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def open_store(address: tuple[str, int], place: Place, timeout: datetime.timedelta, stopped: Stopped = None) -> dist.TCPStore:
    """The store at ``address``: rank 0 keeps it (or torchrun's agent), the others connect, and say once a minute that it does not answer."""
    end = time.monotonic() + timeout.total_seconds()
    serve = place.rank == 0 and not _agent_keeps_store()
    if serve:
        _allow_many_sockets()
    while True:
        _heed(stopped, place)
        patience = datetime.timedelta(seconds=max(1.0, min(_WORD_SECONDS, end - time.monotonic())))
        try:
            store = dist.TCPStore(*address, place.world_size, serve, timeout=patience, wait_for_workers=False, multi_tenant=True)
        except dist.DistError as error:
            if serve:
                raise
            where = f"{_me(place)}: rank 0 does not answer at {address[0]}:{address[1]}"
            if time.monotonic() >= end:
                raise JoinError(
                    f"{where} after {timeout.total_seconds():.0f} s (--timeout_min); see whether it started, and whether this host may connect"
                ) from error
            print(f"{where} yet", file=sys.stderr, flush=True)
        else:
            store.set_timeout(timeout)
            return store


def _allow_many_sockets() -> None:
    """Every rank has two connections to the process that keeps the store: the usual limit of 1024 open files is 500 ranks."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # a system that does not let its own limit be set
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def meet(store: dist.Store, place: Place, timeout: datetime.timedelta, stopped: Stopped = None) -> list[str]:
    """Wait until every rank is here; rank 0 says once a minute for whom. The host of every rank.

    Only rank 0 asks for every rank; the others wait for the one key in which it tells all hosts.
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
    while not store.check(keys if place.rank == 0 else [_ALL_HERE]):
        _heed(stopped, place)
        late = time.monotonic() >= start + timeout.total_seconds()
        missing = _missing(store, range(place.world_size)) if late or (place.rank == 0 and time.monotonic() >= word) else []
        if missing:
            text = f"{_me(place)}: {some_ranks(missing)} of {place.world_size} {'has' if len(missing) == 1 else 'have'} not come"
            if late:
                raise JoinError(f"{text} within {timeout.total_seconds():.0f} s (--timeout_min); see in the log why")
            print(f"{text} yet, waiting", file=sys.stderr, flush=True)
            word += _WORD_SECONDS
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)
    if place.rank == 0:
        store.set(_ALL_HERE, "\n".join(found.decode().split()[0] for found in store.multi_get(keys)))
    return store.get(_ALL_HERE).decode().split("\n")


def _missing(store: dist.Store, ranks: Sequence[int]) -> list[int]:
    """Those of ``ranks`` that are not here, found by halving: the store says of several keys only whether all are there."""
    if store.check([f"here/{rank}" for rank in ranks]):
        return []
    if len(ranks) == 1:
        return list(ranks)
    middle = len(ranks) // 2
    return _missing(store, ranks[:middle]) + _missing(store, ranks[middle:])


def some_ranks(ranks: Sequence[int], most: int = 8) -> str:
    """``rank 3`` or ``ranks 3, 4 and 5``; of many the first ``most``."""
    shown = [str(rank) for rank in ranks[:most]]
    if len(ranks) == 1:
        return f"rank {shown[0]}"
    last = f"{len(ranks) - most} more" if len(ranks) > most else shown.pop()
    return f"ranks {', '.join(shown)} and {last}"
