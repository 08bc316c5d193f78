"""The ranks find each other, whoever is late, missing, there twice or asked to stop meanwhile."""

from __future__ import annotations

import datetime
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from berth.errors import JoinError
from berth.launch.spawn import free_port
from berth.ranks import Place
from berth.training import meeting
from berth.training.meeting import some_ranks
from tests.support import ROOT, environment

SECOND = datetime.timedelta(seconds=1)


@pytest.fixture
def store():
    server = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    return dist.PrefixStore("world", server)


def test_ranks_that_do_not_come_are_named(store, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "_WORD_SECONDS", 0.2)
    store.set("here/1", "n01 5")
    with pytest.raises(JoinError, match=r"rank 0 on .*: ranks 2 and 3 of 4 have not come within 1 s \(--timeout_min\)"):
        meeting.meet(store, Place(0, 4, 0, "torchrun"), SECOND)
    words = capsys.readouterr().err.splitlines()
    assert 3 <= len(words) <= 5 and all(word.endswith("ranks 2 and 3 of 4 have not come yet, waiting") for word in words)
    with pytest.raises(JoinError, match="rank 3 on .*: rank 2 of 4 has not come within 1 s"):
        meeting.meet(store, Place(3, 4, 0, "torchrun"), SECOND)
    assert capsys.readouterr().err == ""  # it is rank 0 that says for whom all wait


def test_two_processes_that_claim_one_rank(store):
    store.set("here/1", "n01 5")
    with pytest.raises(
        JoinError, match=rf"rank 1 of 2 is there twice: process {os.getpid()} on .* and process 5 on n01; give every process a rank"
    ):
        meeting.meet(store, Place(1, 2, 1, "torchrun"), SECOND)


def test_rank_0_does_not_answer(monkeypatch):
    port = free_port()
    with pytest.raises(JoinError, match=f"rank 1 on .*: rank 0 does not answer at 127.0.0.1:{port} after 1 s .--timeout_min"):
        meeting.open_store(("127.0.0.1", port), Place(1, 2, 1, "torchrun"), SECOND)


def test_joining_that_hangs_is_ended():
    """gloo holds every one of several tries to its timeout; the process is ended from a thread, with the code for another try."""
    code = (
        "import time\nfrom berth.ranks import Place as Rank\nfrom berth.training.meeting import no_longer_than\n"
        "with no_longer_than(60, Rank(1, 2), 'meet the others'): pass\n"
        "with no_longer_than(0.5, Rank(1, 2), 'connect to the others'): time.sleep(30)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=20)
    assert done.returncode == 75 and "could not connect to the others within 0 s" in done.stderr.replace("within 1 s", "within 0 s")


def test_some_ranks():
    assert [some_ranks(ranks) for ranks in ([3], [0, 1], [0, 1, 2], list(range(9)))] == [
        "rank 3", "ranks 0 and 1", "ranks 0, 1 and 2", "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 1 more",
    ]  # fmt: skip


class Counting:
    """A store that counts of how many keys it was asked."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.asked = store, 0

    def check(self, keys):
        self.asked += len(keys)
        return self.store.check(keys)

    def __getattr__(self, name: str):
        return getattr(self.store, name)


def test_only_rank_0_asks_for_every_rank(store):
    """The others wait for one key, whatever the size of the world; all know all hosts."""
    counted = [Counting(store) for _ in range(3)]
    for rank in range(3, 1000):
        store.set(f"here/{rank}", f"n{rank} 5")
    found: dict[int, list[str]] = {}

    def come(rank: int) -> None:
        found[rank] = meeting.meet(counted[rank], Place(rank, 1000, 0, "torchrun"), 20 * SECOND)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join(20)
    here = [os.uname().nodename] * 3
    assert found == {rank: [*here, *(f"n{other}" for other in range(3, 1000))] for rank in range(3)}
    assert counted[0].asked >= 1000 and max(counted[1].asked, counted[2].asked) < 50


def test_who_is_missing_of_many_takes_few_questions(store):
    counted = Counting(store)
    for rank in set(range(1000)) - {3, 500, 999}:
        store.set(f"here/{rank}", "n01 5")
    assert meeting._missing(counted, range(1000)) == [3, 500, 999]
    assert counted.asked < 6000
    assert meeting._missing(counted, [1, 2]) == []


def test_rank_0_may_open_as_many_sockets_as_the_system_lets_it(monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = min(256, limits[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, limits[1]))
    try:
        meeting.open_store(("127.0.0.1", free_port()), Place(0, 2, 0, "torchrun"), SECOND)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_signal_ends_the_waiting_for_other_ranks(store):
    for wait in (
        lambda place, stopped: meeting.meet(store, place, 60 * SECOND, stopped),
        lambda place, stopped: meeting.open_store(("127.0.0.1", free_port()), place, 60 * SECOND, stopped),
    ):
        answers = iter([0, 0, 0] if "meet" in wait.__code__.co_names else [])
        start = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            wait(Place(1, 3, 1, "torchrun"), lambda answers=answers: next(answers, signal.SIGUSR1))
        assert ended.value.code == 128 + signal.SIGUSR1 and time.monotonic() - start < 3


# What the main thread does while a signal comes; the last two hang in C++, where Python's handlers do not run.
WAITS = """
import datetime, os, sys
import torch
from berth.ranks import Place
from berth.training import distributed, meeting
from berth.training.stop import StopRequest
stop = StopRequest()
stop.install()
place, minute, port = Place(int(sys.argv[2]), 2, 0, "torchrun"), datetime.timedelta(seconds=60), sys.argv[3]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
if sys.argv[1] == "connect":
    distributed.meet = lambda *_: ["n01", "n02"]
print("ready", flush=True)
distributed.Communicator(place, torch.device("cpu"), minute, stopped=lambda: stop.signal_number)
"""


@pytest.mark.parametrize(("what", "rank", "name"), [("meet", 0, "SIGTERM"), ("connect", 0, "SIGUSR1"), ("open the store", 1, "SIGINT")])
def test_a_signal_ends_a_rank_that_waits(what, rank, name):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, what, str(rank), str(free_port())], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**environment(), "TORCH_CPP_LOG_LEVEL": "FATAL"},
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(1.5)
        number = signal.Signals[name]
        start = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 128 + number and time.monotonic() - start < 4
    assert f"rank {rank} on {os.uname().nodename}: stopped by {name} before it could" in errors
