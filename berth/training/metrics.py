"""What training steps cost and gave: seconds by part on this rank, sums over a window of steps, and both put together over all ranks.

In: marks of :class:`StepClock` from inside a step, batches and results of steps. Out: :class:`Window`, which :mod:`berth.training.report` writes.
Every rank adds up by itself (:class:`WindowSums`); ranks exchange one short list of numbers a log record, never one a step, and
:func:`reduce_window` is a pure function of these lists. Rejected: the host's clock around GPU work (it times the launches of kernels, or has
to wait for each of them); a profiler (a few per cent of the step); a mean over ranks of seconds alone, which hides the rank that all wait for.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from berth.training.batches import StepBatch, combined_crc

if TYPE_CHECKING:
    from berth.training.step import StepResult

PARTS = ("data", "forward", "backward", "communication", "optimizer", "other")
STRAGGLER_RATIO = 1.2
FOLD_AT, MOST_EVENTS = 64, 4096
GIB = 1 << 30


class StepClock:
    """Seconds of this rank's steps by part, the names in :data:`PARTS`; ``other`` is what the step calls so.

    *Communication* is what a step waits for, not what is sent: the hook of the gradient reduction enters it when the last bucket has been
    handed over, so that a reduction hidden behind the backward pass costs nothing here. Every other collective inside a step must be
    under it, too, or waiting for a slow rank looks like work (:func:`straggler`). Collectives inside the passes of a sharded model
    (zero2, zero3) cannot be told from the passes.

    On CUDA the marks are events in the current stream: a part ends when the GPU reaches its end. They are read when they are ready or at
    :meth:`take`, which waits for the stream once. ``enter`` may be called from autograd's threads, which run while the caller waits.

    Args:
        device: where the work is done.
        enabled: ``False`` makes every method return at once.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.enabled = enabled
        self._timeline: _Timeline = _HostTimeline() if device.type != "cuda" else _EventTimeline(lambda: _recorded_event(device))

    def enter(self, part: str) -> None:
        """From now on time belongs to ``part``."""
        assert part in PARTS, part
        if self.enabled:
            self._timeline.mark(part)

    def stop(self) -> None:
        """From now on time belongs to nothing, until the next :meth:`enter`."""
        if self.enabled:
            self._timeline.mark(None)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Marks set inside do not count: what is under way goes on. For passes that are recorded as a CUDA graph."""
        enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = enabled

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call; a part that is under way goes on."""
        return self._timeline.take() if self.enabled else dict.fromkeys(PARTS, 0.0)


class _Timeline(Protocol):
    def mark(self, part: str | None) -> None: ...

    def take(self) -> dict[str, float]: ...


class _HostTimeline:
    """By the host's clock: right where work is done when its call returns."""

    def __init__(self) -> None:
        self._seconds, self._part, self._since = dict.fromkeys(PARTS, 0.0), "", 0.0

    def mark(self, part: str | None) -> None:
        now = time.monotonic()
        if self._part:
            self._seconds[self._part] += now - self._since
        self._part, self._since = part or "", now

    def take(self) -> dict[str, float]:
        self.mark(self._part)
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds


class _EventTimeline:
    """By events in a GPU's stream; ``record`` makes one there, now."""

    def __init__(self, record: Callable[[], Any]) -> None:
        self._record = record
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._marks: collections.deque[tuple[str | None, Any]] = collections.deque()  # the part that begins, and when

    def mark(self, part: str | None) -> None:
        self._marks.append((part, self._record()))
        if len(self._marks) >= MOST_EVENTS:
            self._marks[-1][1].synchronize()
        if len(self._marks) >= FOLD_AT:
            self._fold()

    def _fold(self) -> None:
        """Read what the GPU has passed; the last event stays, the next part begins there."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            part, began = self._marks.popleft()
            if part is not None:
                self._seconds[part] += began.elapsed_time(self._marks[0][1]) / 1000

    def take(self) -> dict[str, float]:
        if self._marks:
            self.mark(self._marks[-1][0])
            self._marks[-1][1].synchronize()
            self._fold()
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds


def _recorded_event(device: torch.device) -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Straggler(NamedTuple):
    """The slowest rank, and its own seconds over the median rank's."""

    rank: int
    host: str
    ratio: float

    @property
    def named(self) -> bool:
        """Whether people should hear of it."""
        return self.ratio >= STRAGGLER_RATIO


def straggler(own_seconds: Sequence[float], hosts: Sequence[str]) -> Straggler | None:
    """The rank that took longest by ``own_seconds``: what it did itself, waiting for others left out. ``None`` for a single rank, or no times.

    The lower of two middle ranks is the median: of two ranks the faster one, or a rank at half the speed would be at 1.33 only.
    """
    median = statistics.median_low(own_seconds)
    if len(own_seconds) < 2 or median <= 0:
        return None
    rank = max(range(len(own_seconds)), key=own_seconds.__getitem__)
    return Straggler(rank, hosts[rank], own_seconds[rank] / median)


def memory_gib(device: torch.device) -> float:
    """Most memory in use at once so far, GiB: the tensors on a GPU, else the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


@dataclasses.dataclass
class WindowSums:
    """Sums over steps of this rank. ``steps`` counts updates; sequences, tokens, floating-point operations and the seconds of ``parts`` are
    of skipped steps, too, the scores (``mlm`` and ``nsp`` in nats, ``correct`` of ``masked`` tokens) are not. Checksum and bytes are of
    the last update's batch."""

    steps: int = 0
    sequences: int = 0
    tokens: int = 0
    flops: float = 0.0
    masked: int = 0
    correct: Any = 0
    mlm: Any = 0.0
    nsp: Any = 0.0
    checksum: int = 0
    bytes: int = 0
    memory_gib: float = 0.0
    parts: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def add(self, batch: StepBatch, result: StepResult, flops: float) -> None:
        """Account for one step of this rank; tensors are added up where they are, so that a GPU is not waited for."""
        self.sequences, self.tokens, self.flops = self.sequences + batch.sequences, self.tokens + batch.tokens, self.flops + flops
        if not result.skipped:  # its loss is not finite
            self.checksum, self.bytes = batch.checksum, batch.bytes
            self.steps, self.masked = self.steps + 1, self.masked + batch.masked
            self.mlm, self.nsp, self.correct = self.mlm + result.mlm_loss, self.nsp + result.nsp_loss, self.correct + result.mlm_correct

    def add_parts(self, seconds: dict[str, float]) -> None:
        """Account for what :meth:`StepClock.take` gave."""
        self.parts = {part: self.parts[part] + seconds[part] for part in PARTS}

    def values(self) -> list[float]:
        """All of it as numbers, for the other ranks."""
        plain = [float(getattr(self, field.name)) for field in dataclasses.fields(self) if field.name != "parts"]
        return plain + [self.parts[part] for part in PARTS]

    @classmethod
    def from_values(cls, values: Sequence[float]) -> WindowSums:
        """What another rank's :meth:`values` say."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "parts"]
        made = cls(**dict(zip(names, values, strict=False)), parts=dict(zip(PARTS, values[len(names) :], strict=True)))  # type: ignore[arg-type]
        return dataclasses.replace(made, steps=int(made.steps), checksum=int(made.checksum), bytes=int(made.bytes))

    @property
    def seconds(self) -> float:
        """Seconds of all parts together."""
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Window:
    """A window of steps, all ranks together.

    ``seconds``: of the slowest rank; ``sequences`` and ``tokens`` (real ones) of all ranks; losses in nats, means over updates;
    ``mlm_accuracy``: share of the masked tokens that got the highest logit, in [0, 1]; ``shares``: mean over ranks of each part's share of
    the step; ``memory_gib``: of the rank that needs most; ``batch_crc32``: CRC-32 of the token ids of the last step's global batch.
    """

    steps: int
    seconds: float
    sequences: int
    tokens: int
    flops: float
    mlm_loss: float
    nsp_loss: float
    mlm_accuracy: float
    shares: dict[str, float]
    memory_gib: float
    straggler: Straggler | None
    batch_crc32: int
    world_size: int

    def rate(self, amount: float) -> float:
        """``amount`` a second; 0 when no time has passed."""
        return amount / self.seconds if self.seconds else 0.0

    @property
    def flops_per_device(self) -> float:
        """Floating-point operations a second and rank that the model asks for."""
        return self.rate(self.flops) / self.world_size


def reduce_window(gathered: Sequence[Sequence[float]], hosts: Sequence[str]) -> Window:
    """Put together what :meth:`WindowSums.values` gave on every rank, in the order of ranks."""
    ranks = [WindowSums.from_values(values) for values in gathered]
    updates, masked = max(ranks[0].steps, 1), max(sum(rank.masked for rank in ranks), 1)
    return Window(
        steps=ranks[0].steps,
        seconds=max(rank.seconds for rank in ranks),
        sequences=int(sum(rank.sequences for rank in ranks)),
        tokens=int(sum(rank.tokens for rank in ranks)),
        flops=sum(rank.flops for rank in ranks),
        mlm_loss=sum(rank.mlm for rank in ranks) / updates,
        nsp_loss=sum(rank.nsp for rank in ranks) / updates,
        mlm_accuracy=sum(rank.correct for rank in ranks) / masked,
        shares={part: statistics.fmean(rank.parts[part] / (rank.seconds or 1.0) for rank in ranks) for part in PARTS},
        memory_gib=max(rank.memory_gib for rank in ranks),
        straggler=straggler([rank.seconds - rank.parts["communication"] for rank in ranks], hosts),
        batch_crc32=combined_crc([rank.checksum for rank in ranks], ranks[0].bytes),
        world_size=len(ranks),
    )
