"""Ends all ranks, with a message that names the culprit, when one is dead, stopped, hangs or has failed.

Every rank has two daemon threads. One talks: through a client of its own it writes a :class:`Beat` to the shared store every few seconds and reads
the verdict; rank 0's also reads all beats and judges (berth/training/verdict.py). The other watches the clock, never the network: talking to the
store of a stopped rank 0 blocks for ever. It ends the process with ``os._exit``, also while the main thread is inside a collective or in C++ (but not
when that holds Python's lock: then the others find this rank silent). Rejected: the timeouts of collectives alone (30 minutes of silence, then
every rank blames a port number), a separate process (does not see what the loop does), shorter timeouts (kill slow checkpoints).
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from berth.errors import LostRankError
from berth.training.distributed import Communicator
from berth.training.verdict import DONE, LEFT, LOST, RUNNING, AwakeClock, Beat, Judge, Verdict, behind, dead_ranks, failed_rank, hung_ranks

_LONGEST_INTERVAL = 5.0  # seconds between beats
_FINISH_SECONDS = 120.0  # that ``before_leaving`` may take
_NO_VERDICT = "-"


class Watchdog:
    """Watches over the ranks of ``communicator``; in a world of one, and before :meth:`start`, every call returns at once.

    Args:
        dead_after: seconds without a sign of life after which a rank is given up.
        hung_after: seconds without progress after which a rank hangs, though it gives signs of life; it must be longer than anything
            one rank does while the others wait (a checkpoint, an evaluation, compiling).

    Attributes: ``before_leaving``, called in a thread (for at most two minutes) before the watchdog ends this process: to finish a checkpoint
    that is being written.
    """

    def __init__(self, communicator: Communicator, dead_after: float = 60.0, hung_after: float = 1800.0) -> None:
        self.communicator, self.dead_after, self.hung_after = communicator, dead_after, hung_after
        self.interval = min(_LONGEST_INTERVAL, dead_after / 4)
        self.before_leaving: Callable[[], None] | None = None
        self._position = (0, "starting", 0)
        self._state = self._told = RUNNING
        self._beats: list[Beat] = []  # of all ranks: on rank 0, and while this rank looks for an explanation
        self._zero = Beat()  # of rank 0
        self._talked = 0.0  # when (monotonic) the store last answered
        self._proposal: Verdict | None = None
        self._verdict: Verdict | None = None
        self._left_to_main = 0.0  # until then (monotonic) the main thread itself is about to end the process
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    # -- what the main thread calls -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to watch."""
        if self.communicator.world_size > 1:
            self._threads = [threading.Thread(target=run, name=run.__name__, daemon=True) for run in (self._talk, self._watch)]
            for thread in self._threads:
                thread.start()

    def progress(self, step: int, doing: str) -> None:
        """This rank has come to ``step``, ``doing`` a few words that begin with "waiting" where it only waits for others. Costs nothing."""
        self._position = (step, doing, self._position[2] + 1)

    def failed(self, message: str, code: int) -> None:
        """This rank ends with ``message`` and exit code ``code``: tell the others, which end too. Takes two intervals at most, and on rank 0, which
        keeps the store, three more until all know."""
        if self._state in (RUNNING, LOST) and self._begin_to_end():
            self._agree_on(failed_rank(self.communicator.rank, self._host(), message, code))
            self._part(LEFT)

    def explain(self, error: BaseException) -> LostRankError | None:
        """Why a collective raised ``error``: the verdict of another rank, or whoever is silent for two intervals from now, or stands still.

        ``None`` when the error has nothing to do with other ranks.
        """
        lost = self.communicator.failure(error)
        if lost is None or not self._begin_to_end():
            return lost
        self._state = LOST
        self._wake.set()
        self._await(lambda: self._told == LOST and bool(self._beats), self.interval)
        first = self._beats
        self._await(lambda: self._verdict is not None, 2 * self.interval)
        verdict = self._verdict or self._conclude(error, first, time.monotonic() - self._talked < self.interval)
        if verdict is None:
            return lost
        verdict = self._agree_on(verdict)
        self._part(LEFT)
        return LostRankError(self._said(verdict), verdict.code)

    def close(self) -> None:
        """This rank has come to its end; whoever is not there yet is not deserted. Rank 0 waits two intervals for the others."""
        if self._threads and not self._stopped.is_set():
            self._left_to_main = float("inf")
            self._part(DONE)
            self._stopped.set()
            self._wake.set()
            for thread in self._threads:
                thread.join(1.0)

    def _begin_to_end(self) -> bool:
        """From now on the main thread ends the process; should it not come to that, the watching thread does."""
        self._left_to_main = time.monotonic() + self.dead_after + 6 * self.interval
        return bool(self._threads) and not self._stopped.is_set()

    def _conclude(self, error: BaseException, first: list[Beat], reached: bool) -> Verdict | None:
        """Who is to blame, after two intervals of watching; ``first``: the beats at their beginning, ``reached``: whether the store still answers."""
        hosts, seconds = self.communicator.hosts, 2 * self.interval
        if not reached or not first:
            return dead_ranks([0], [self._zero], hosts, seconds)
        last = self._beats
        silent = [rank for rank, beat in enumerate(last) if beat.count == first[rank].count and beat.state in (RUNNING, LOST)]
        if silent:
            return dead_ranks(silent, last, hosts, seconds)
        still = [rank for rank, beat in enumerate(last) if beat.state == RUNNING and beat.moves == first[rank].moves]
        waited = self.hung_after if "imed out" in str(error) else seconds  # a collective that timed out had waited so long
        return hung_ranks(behind(still, last), last, hosts, waited) if still else None

    def _agree_on(self, verdict: Verdict) -> Verdict:
        """Offer ``verdict`` to all; the first one offered by any rank counts, and this one where the store is gone."""
        self._proposal = verdict
        self._wake.set()
        if time.monotonic() - self._talked < 2 * self.interval:
            self._await(lambda: self._verdict is not None, 2 * self.interval)
        self._verdict = self._verdict or verdict
        return self._verdict

    def _part(self, state: str) -> None:
        """Tell the others; rank 0 stays until they know, since the store may end with it."""
        self._state = state
        self._wake.set()
        self._await(lambda: self._told == state or self._store_lost(), self.interval)
        if self.communicator.rank == 0:
            blamed = self._verdict.ranks if self._verdict else ()
            self._await(lambda: all(beat.state in (LEFT, DONE) or at in blamed for at, beat in enumerate(self._beats)), 2 * self.interval)

    def _store_lost(self) -> bool:
        return bool(self._threads) and not self._threads[0].is_alive()

    @staticmethod
    def _await(ready: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not ready() and time.monotonic() < end:
            time.sleep(0.02)

    def _said(self, verdict: Verdict) -> str:
        """The sentence to print. The blamed rank's last beat may be seconds and many steps old; where this rank is says more."""
        mine = verdict.code == LostRankError.exit_code and self.communicator.rank not in verdict.ranks
        return f"{verdict.text} (this rank was at step {self._position[0]})" if mine else verdict.text

    def _host(self) -> str:
        return self.communicator.hosts[self.communicator.rank]

    # -- the thread that talks ------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        store: dist.Store | None = None
        judge = Judge(self.communicator.hosts, self.dead_after, self.hung_after, 2 * self.interval, time.monotonic())
        count = 0
        while not self._stopped.is_set():
            count += 1
            try:
                store = store or self._connect()
                self._exchange(store, judge, count)
                self._talked = time.monotonic()
            except (RuntimeError, ValueError):  # the store hiccups: a new connection; the other thread sees how long it takes
                store = None
                if self._verdict is not None:  # rank 0 is gone, and all is said; every further try would write 30 lines below that
                    return
            self._wake.wait(self.interval if self._state == RUNNING else min(0.1, self.interval / 10))
            self._wake.clear()

    def _connect(self) -> dist.Store:
        store = self.communicator.new_store(datetime.timedelta(seconds=max(1.0, self.interval)))
        store.compare_set("verdict", "", _NO_VERDICT)
        for rank in range(self.communicator.world_size if self.communicator.rank == 0 else 1):
            store.compare_set(str(rank), "", Beat().encode())
        return store

    def _exchange(self, store: dist.Store, judge: Judge, count: int) -> None:
        """One round: give a sign of life, hear of the others, and of the verdict."""
        rank, state = self.communicator.rank, self._state
        store.set(str(rank), Beat(count, *self._position, state).encode())
        if rank == 0 or state == LOST:
            *beats, said = store.multi_get([*(str(other) for other in range(self.communicator.world_size)), "verdict"])
            self._beats = [Beat.decode(beat) for beat in beats]
            self._zero = self._beats[0]
        else:
            beat, said = store.multi_get(["0", "verdict"])
            self._zero = Beat.decode(beat)
        self._told = state
        proposal = self._proposal
        if rank == 0 and state == RUNNING and proposal is None:
            proposal = judge.look(self._beats, time.monotonic())
        if proposal is not None and said == _NO_VERDICT.encode():
            said = store.compare_set("verdict", _NO_VERDICT, proposal.encode())
        if said != _NO_VERDICT.encode():
            self._verdict = Verdict.decode(said)

    # -- the thread that watches ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        clock = AwakeClock(2 * self.interval, time.monotonic())
        heard, count = 0.0, 0
        while not self._stopped.wait(self.interval / 2):
            awake = clock.tick(time.monotonic())
            if self._zero.count != count:
                heard, count = awake, self._zero.count
            silence = awake - heard
            if self._verdict is None and self._zero.state != DONE and silence >= (self.dead_after if count else self.hung_after):
                self._verdict = dead_ranks([0], [self._zero], self.communicator.hosts, self.dead_after)
            if self._verdict is not None and time.monotonic() > self._left_to_main:
                self._leave(self._verdict)

    def _leave(self, verdict: Verdict) -> None:
        """End this process, whatever its main thread is doing."""
        line = f"error: {self._said(verdict)}\n".encode()
        os.write(2, line)  # no buffer, whose lock the main thread may hold
        if self.before_leaving is not None:
            _try(self.before_leaving, _FINISH_SECONDS)
        self._part(LEFT)
        _try(sys.stdout.flush, 1.0)
        if self._store_lost():  # torch has written of that, too
            os.write(2, line)
        os._exit(verdict.code)


def _try(action: Callable[[], object], seconds: float) -> None:
    """Run ``action`` in a thread and wait for it at most so long; what it raises does not matter any more."""

    def run() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
