"""Watchdogs of several ranks in one process, over a real store: every way in which a rank can be lost is told to the others."""

from __future__ import annotations

import datetime
import threading
import time

import pytest
import torch
import torch.distributed as dist

from berth.errors import LostRankError
from berth.training import watchdog as module
from berth.training.distributed import Communicator, Rank
from berth.training.verdict import Verdict
from berth.training.watchdog import Watchdog

DEAD_AFTER, HUNG_AFTER = 1.6, 6.0
BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:4")


class FakeCommunicator(Communicator):
    """One of several ranks of this process: a store, and no collectives. ``unplug`` takes the store away."""

    def __init__(self, rank: int, size: int, server: dist.TCPStore) -> None:
        self.rank, self.world_size, self.server, self.unplugged = rank, size, server, False
        self.hosts = [f"n{other:02d}" for other in range(size)]

    def new_store(self, timeout: datetime.timedelta) -> dist.Store:
        if self.unplugged:
            raise dist.DistNetworkError("refused")
        return Unpluggable(self, dist.TCPStore("127.0.0.1", self.server.port, 1, False, timeout=timeout, wait_for_workers=False))


class Unpluggable:
    def __init__(self, communicator: FakeCommunicator, store: dist.Store) -> None:
        self.communicator, self.store = communicator, store

    def __getattr__(self, name: str):
        if self.communicator.unplugged:
            raise dist.DistNetworkError("Connection reset")
        return getattr(self.store, name)


class Ranks:
    """``size`` watchdogs; ``left`` is what each would have ended its process with, and when."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch, dead_after: float = DEAD_AFTER, hung_after: float = HUNG_AFTER) -> None:
        self.server = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
        self.left: dict[int, tuple[str, int]] = {}

        def leave(dog: Watchdog, verdict) -> None:
            self.left.setdefault(dog.communicator.rank, (verdict.text, verdict.code))
            dog._part("left")
            dog._stopped.set()

        monkeypatch.setattr(module.Watchdog, "_leave", leave)
        self.dogs = [Watchdog(FakeCommunicator(rank, size, self.server), dead_after, hung_after) for rank in range(size)]
        for dog in self.dogs:
            dog.start()
        self.wait(lambda: all(dog._zero.count for dog in self.dogs))
        time.sleep(2 * self.dogs[0].interval)  # every rank is known

    def kill(self, rank: int) -> None:
        self.dogs[rank]._stopped.set()
        if rank == 0:  # the store dies with it
            for dog in self.dogs:
                dog.communicator.unplugged = True

    def wait(self, ready, seconds: float = 10.0) -> float:
        start = time.monotonic()
        while not ready():
            assert time.monotonic() - start < seconds, "it did not happen"
            time.sleep(0.01)
        return time.monotonic() - start

    def together(self, ranks, call) -> list:
        """``call(watchdog)`` in a thread for each of ``ranks``; what they returned."""
        found: dict[int, object] = {}
        threads = [threading.Thread(target=lambda rank=rank: found.setdefault(rank, call(self.dogs[rank]))) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return [found[rank] for rank in ranks]


@pytest.fixture
def ranks(monkeypatch):
    made: list[Ranks] = []

    def make(size: int = 3, **times: float) -> Ranks:
        made.append(Ranks(size, monkeypatch, **times))
        return made[-1]

    yield make
    for one in made:
        for dog in one.dogs:
            dog._stopped.set()
            dog._wake.set()
        for dog in one.dogs:
            for thread in dog._threads:
                thread.join(5)


def test_a_dead_rank_ends_all_in_time(ranks):
    world = ranks()
    for dog in world.dogs:
        dog.progress(7, "backward")
    time.sleep(2 * world.dogs[0].interval)
    world.kill(2)
    took = world.wait(lambda: len(world.left) == 2)
    assert DEAD_AFTER - world.dogs[0].interval <= took <= DEAD_AFTER + 3 * world.dogs[0].interval
    text, code = world.left[0]
    assert code == 76 and text.startswith("rank 2 on host n02 (last seen at step 7, backward) has not been heard of for 1.6 s;")
    assert world.left == {0: (text, code), 1: (text, code)}


def test_rank_0_dies_with_its_store(ranks):
    world = ranks()
    world.kill(0)
    took = world.wait(lambda: len(world.left) == 2)
    assert took <= DEAD_AFTER + 3 * world.dogs[0].interval
    assert {code for _, code in world.left.values()} == {76} and all(
        text.startswith("rank 0 on host n00") for text, _ in world.left.values()
    )


def test_a_store_that_comes_back_in_time_ends_nobody(ranks):
    world = ranks()
    for _ in range(2):
        for dog in world.dogs:
            dog.communicator.unplugged = True
        time.sleep(DEAD_AFTER / 4)  # with the time between beats and between readings it is three quarters
        for dog in world.dogs:
            dog.communicator.unplugged = False
        time.sleep(DEAD_AFTER / 2)
    assert world.left == {}


def test_a_hanging_rank_is_named_and_slow_ones_are_not(ranks):
    world = ranks(dead_after=1.0, hung_after=2.0)
    for step in range(5):  # longer than hung_after: rank 0 works and says so, the others wait
        world.dogs[0].progress(1, f"evaluation {step}")
        for dog in world.dogs[1:]:
            dog.progress(1, "waiting for the others") if not step else None
        time.sleep(0.5)
    assert world.left == {}
    for dog in world.dogs:
        dog.progress(2, "reading data" if dog.communicator.rank == 1 else "waiting for the others")
    took = world.wait(lambda: len(world.left) == 3)
    assert 2.0 - 0.25 <= took <= 2.0 + 1.0
    assert world.left[2][0].startswith("rank 1 on host n01 (last seen at step 2, reading data) hangs: it has not moved on for 2 s")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_tells_the_others_why(ranks, rank):
    world = ranks()
    start = time.monotonic()
    world.dogs[rank].failed("a.hdf5 is damaged", 2)
    assert time.monotonic() - start < 4 * world.dogs[0].interval
    world.wait(lambda: len(world.left) == 2)
    assert set(world.left.values()) == {(f"rank {rank} on host n0{rank} failed: a.hdf5 is damaged", 2)} and rank not in world.left


def test_a_broken_collective_is_explained_within_two_intervals_of_silence(ranks):
    world = ranks(4)
    world.kill(2)
    start = time.monotonic()
    one, other = world.together([1, 3], lambda dog: dog.explain(BROKEN))  # rank 0 is still inside the collective
    assert time.monotonic() - start < 8 * world.dogs[0].interval
    assert isinstance(one, LostRankError) and one.exit_code == 76
    assert str(one) == str(other) and str(one).startswith(
        "rank 2 on host n02 (last seen at step 0, starting) has not been heard of for 0.8 s;"
    )
    world.wait(lambda: 0 in world.left)
    assert world.left == {0: (str(one).removesuffix(" (this rank was at step 0)"), 76)}


def test_who_lost_another_says_where_it_was_itself(ranks):
    """Beats are seconds apart: the lost rank may have been last seen many steps ago."""
    world = ranks(4)
    world.kill(2)
    for dog in world.dogs:
        dog.progress(100 + dog.communicator.rank, "backward")
    one, three = world.together([1, 3], lambda dog: dog.explain(BROKEN))
    told = str(one).removesuffix(" (this rank was at step 101)")
    assert told.endswith("--resume_from_checkpoint") and "last seen at step 0, starting" in told
    assert str(three) == f"{told} (this rank was at step 103)"


@pytest.mark.parametrize("lost", [False, True])
def test_the_last_line_is_the_verdict(monkeypatch, lost):
    """Where the store went with rank 0, torch writes screens of C++ frames below what was said first."""
    written: list[tuple[str, bool]] = []
    before = threading.Event()
    dog = Watchdog(FakeCommunicator(1, 2, dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)), dead_after=0.4)
    dog.before_leaving = before.set
    dog.progress(7, "step")
    dog._threads = [threading.Thread(target=lambda: None if lost else time.sleep(2))]
    dog._threads[0].start()
    monkeypatch.setattr(module.os, "write", lambda end, text: written.append((text.decode(), before.is_set())))
    monkeypatch.setattr(module.os, "_exit", lambda code: written.append((str(code), before.is_set())))
    dog._leave(Verdict((0,), "rank 0 is lost", 76))
    line = "error: rank 0 is lost (this rank was at step 7)\n"
    assert written == [(line, False), *([(line, True)] if lost else []), ("76", True)]


def test_a_store_that_is_gone_for_good_is_not_asked_again(ranks):
    world = ranks()
    world.kill(0)
    assert world.together([1, 2], lambda dog: dog.explain(BROKEN) is not None) == [True, True]
    world.wait(lambda: not any(dog._threads[0].is_alive() for dog in world.dogs[1:]), 2.0)


def test_a_broken_collective_because_of_rank_0(ranks):
    world = ranks()
    world.kill(0)
    found = world.together([1, 2], lambda dog: dog.explain(BROKEN))
    assert all(str(error).startswith("rank 0 on host n00") and error.exit_code == 76 for error in found) and world.left == {}


def test_a_broken_collective_because_a_rank_failed(ranks):
    world = ranks()

    def act(dog: Watchdog) -> object:
        if dog.communicator.rank == 1:
            return dog.failed("disk full", 1)
        return dog.explain(BROKEN)

    zero, _, two = world.together([0, 1, 2], act)
    assert str(zero) == str(two) == "rank 1 on host n01 failed: disk full" and zero.exit_code == two.exit_code == 1


def test_a_collective_that_timed_out_names_who_did_not_come(ranks):
    world = ranks()
    for dog in world.dogs:
        dog.progress(4, "checkpoint" if dog.communicator.rank == 2 else "waiting for the others")
    time.sleep(2 * world.dogs[0].interval)
    timed_out = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation to complete")
    for error in world.together([0, 1], lambda dog: dog.explain(timed_out)):
        assert str(error).startswith("rank 2 on host n02 (last seen at step 4, checkpoint) hangs: it has not moved on for 6 s")


def test_errors_of_ones_own_are_not_explained(ranks):
    world = ranks(2)
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("gloo"), ValueError("x")):
        assert world.dogs[1].explain(error) is None
    assert world.dogs[1]._state == "running" and world.left == {}


def test_the_end_comes_at_once_and_early_ones_are_not_missed(ranks):
    world = ranks()
    world.dogs[2].close()
    time.sleep(DEAD_AFTER + 2 * world.dogs[0].interval)
    assert world.left == {}
    start = time.monotonic()
    world.together([0, 1], Watchdog.close)
    assert time.monotonic() - start < 2 * world.dogs[0].interval and world.left == {}


def test_alone_nothing_is_started():
    dog = Watchdog(Communicator(Rank(), torch.device("cpu"), datetime.timedelta(seconds=1)))
    dog.start()
    dog.progress(1, "step")
    dog.failed("x", 1)
    assert dog.explain(BROKEN) is None and dog._threads == []
    dog.close()


def test_progress_costs_nothing():
    dog = Watchdog(Communicator(Rank(), torch.device("cpu"), datetime.timedelta(seconds=1)))
    start = time.perf_counter()
    for step in range(10_000):
        dog.progress(step, "step")
    assert time.perf_counter() - start < 0.5 and dog._position == (9_999, "step", 10_000)


@pytest.mark.parametrize(("dead_after", "interval"), [(60.0, 5.0), (8.0, 2.0), (1000.0, 5.0)])
def test_beats_are_at_least_four_times_as_frequent_as_the_limit(dead_after, interval):
    assert Watchdog(Communicator(Rank(), torch.device("cpu"), datetime.timedelta(seconds=1)), dead_after).interval == interval
