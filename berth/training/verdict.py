"""Which rank is dead or hangs: decided from heartbeats alone, by pure code.

In: the :class:`Beat` that each rank last wrote to the store. Out: a :class:`Verdict` with one sentence that names rank, host and step. Beats are
counted, never dated: that a rank is silent is measured on the judging rank's clock, so wrong clocks do not matter. Rejected: judging by the
duration of a step (the first batch, an evaluation or a checkpoint take as long as they take).
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence

from berth.errors import LostRankError
from berth.training.meeting import some_ranks

RUNNING = "running"
LOST = "lost"  # a collective failed on it; it is finding out why
LEFT = "left"  # it knows the verdict and goes
DONE = "done"  # it came to its normal end
WAITING = "waiting"  # what a rank does begins with this when it can do nothing but wait for the others


@dataclasses.dataclass(frozen=True)
class Beat:
    """Heartbeat number ``count`` of a rank: at ``step``, ``doing`` what; ``moves`` counts its calls of ``progress``."""

    count: int = 0
    step: int = 0
    doing: str = "starting"
    moves: int = 0
    state: str = RUNNING

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def decode(cls, text: bytes) -> Beat:
        """From :meth:`encode`'s JSON."""
        return cls(*json.loads(text))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why the run ends: the ``ranks`` to blame, the sentence to print, the exit code of all."""

    ranks: tuple[int, ...]
    text: str
    code: int = LostRankError.exit_code

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def decode(cls, text: bytes) -> Verdict:
        """From :meth:`encode`'s JSON."""
        ranks, sentence, code = json.loads(text)
        return cls(tuple(ranks), sentence, code)


class AwakeClock:
    """Seconds this process was awake: of the time between two looks at most ``longest`` counts.

    A process that was stopped, or a computer that slept, must not take the others' silence meanwhile for their death.
    """

    def __init__(self, longest: float, now: float) -> None:
        self.longest, self.awake, self._last = longest, 0.0, now

    def tick(self, now: float) -> float:
        """Look at the clock (monotonic, in seconds); the seconds awake so far."""
        self.awake += min(max(0.0, now - self._last), self.longest)
        self._last = now
        return self.awake


class Judge:
    """Watches the beats of all ranks.

    Args:
        hosts: of every rank.
        dead_after: seconds without a new beat.
        hung_after: seconds without progress; before its first beat a rank has as long.
        longest: seconds between two looks that count at most, see :class:`AwakeClock`.
    """

    def __init__(self, hosts: Sequence[str], dead_after: float, hung_after: float, longest: float, now: float) -> None:
        self.hosts, self.dead_after, self.hung_after = hosts, dead_after, hung_after
        self.clock = AwakeClock(longest, now)
        self.beats = [Beat()] * len(hosts)
        self.heard = [0.0] * len(hosts)
        self.moved = [0.0] * len(hosts)

    def look(self, beats: Sequence[Beat], now: float) -> Verdict | None:
        """Judge by the newest beat of every rank at ``now`` (monotonic, in seconds); ``None`` while all is well."""
        awake = self.clock.tick(now)
        for rank, (before, beat) in enumerate(zip(self.beats, beats, strict=True)):
            if beat.count != before.count:
                self.heard[rank] = awake
            if beat.moves != before.moves or (beat.count and not before.count):
                self.moved[rank] = awake
        self.beats = list(beats)
        alive = [rank for rank, beat in enumerate(beats) if beat.state in (RUNNING, LOST)]
        dead = [rank for rank in alive if awake - self.heard[rank] >= self._patience(beats[rank])]
        if dead:
            return dead_ranks(dead, beats, self.hosts, self.dead_after)
        running = [rank for rank in alive if beats[rank].state == RUNNING]
        still = [rank for rank in running if beats[rank].count and awake - self.moved[rank] >= self.hung_after]
        if len(still) < len(running):  # as long as one moves, the others may be waiting for it
            return None
        return hung_ranks(behind(still, beats), beats, self.hosts, self.hung_after) if still else None

    def _patience(self, beat: Beat) -> float:
        return self.dead_after if beat.count else max(self.dead_after, self.hung_after)


def behind(ranks: Sequence[int], beats: Sequence[Beat]) -> list[int]:
    """Those of ``ranks`` that keep the others waiting: not waiting themselves, at the lowest step, doing what fewest do."""
    busy = [rank for rank in ranks if not beats[rank].doing.startswith(WAITING)] or list(ranks)
    lowest = min(beats[rank].step for rank in busy)
    busy = [rank for rank in busy if beats[rank].step == lowest]
    doing = collections.Counter(beats[rank].doing for rank in busy)
    fewest = min(doing.values())
    rare = [what for what, number in doing.items() if number == fewest]
    return [rank for rank in busy if beats[rank].doing == rare[0]] if len(rare) == 1 else busy


def dead_ranks(ranks: Sequence[int], beats: Sequence[Beat], hosts: Sequence[str], seconds: float) -> Verdict:
    """Verdict on ranks that are silent."""
    have, was = ("has", "it was") if len(ranks) == 1 else ("have", "they were")
    why = f"{was} killed or stopped, or the node is gone"
    return _verdict(ranks, f"{_names(ranks, beats, hosts)} {have} not been heard of for {seconds:g} s; {why}")


def hung_ranks(ranks: Sequence[int], beats: Sequence[Beat], hosts: Sequence[str], seconds: float) -> Verdict:
    """Verdict on ranks that are alive and do not go on."""
    have = "hangs: it has" if len(ranks) == 1 else "hang: they have"
    return _verdict(ranks, f"{_names(ranks, beats, hosts)} {have} not moved on for {seconds:g} s")


def failed_rank(rank: int, host: str, message: str, code: int) -> Verdict:
    """Verdict on a rank that ended with a message of its own; all leave with its exit code."""
    return Verdict((rank,), f"rank {rank} on host {host} failed: {message}", code)


def _verdict(ranks: Sequence[int], text: str) -> Verdict:
    return Verdict(tuple(ranks), f"{text}. All ranks end; go on from the newest checkpoint with --resume_from_checkpoint")


def _names(ranks: Sequence[int], beats: Sequence[Beat], hosts: Sequence[str]) -> str:
    """``rank 3 on host n02 (last seen at step 12, backward)``; of several the hosts and steps together."""
    names = sorted({hosts[rank] for rank in ranks})
    host = f"host {names[0]}" if len(names) == 1 else f"hosts {', '.join(names[:8])}{' and others' if len(names) > 8 else ''}"
    at = list(dict.fromkeys(f"at step {beats[rank].step}, {beats[rank].doing}" for rank in ranks))
    return f"{some_ranks(ranks)} on {host} (last seen {'; '.join(at[:8])})"
