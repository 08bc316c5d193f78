"""Seconds by part on a host and on a GPU (a pretended one), the slowest rank, and windows of several ranks put together."""

import re
import types
import zlib
from pathlib import Path

import pytest
import torch

from berth.training import metrics
from berth.training.metrics import PARTS, StepClock, Straggler, WindowSums, memory_gib, reduce_window, straggler

CPU = torch.device("cpu")


def parts(**seconds):
    return {part: pytest.approx(seconds.get(part, 0.0), abs=1e-9) for part in PARTS}


class Time:
    """A clock that is turned by hand, and a GPU that lags behind it: it reaches an event ``lag`` later."""

    def __init__(self):
        self.now, self.lag, self.waits, self.events = 100.0, 0.0, 0, 0

    def monotonic(self):
        return self.now

    def event(self):
        self.events += 1
        return Event(self, self.now + self.lag)


class Event:
    def __init__(self, time, reached):
        self.time, self.reached = time, reached

    def query(self):
        return self.time.now >= self.reached

    def synchronize(self):
        self.time.waits += 1
        self.time.now = max(self.time.now, self.reached)

    def elapsed_time(self, later):
        assert self.query() and later.query(), "read before the GPU has passed"
        return (later.reached - self.reached) * 1000


@pytest.fixture(params=["host", "gpu"])
def clock_and_time(request, monkeypatch):
    time = Time()
    monkeypatch.setattr(metrics.time, "monotonic", time.monotonic)
    monkeypatch.setattr(metrics, "_recorded_event", lambda device: time.event())
    clock = StepClock(CPU if request.param == "host" else torch.device("cuda", 0))
    return clock, time


def walk(clock, time, *steps):
    for part, seconds in steps:
        clock.enter(part) if part else clock.stop()
        time.now += seconds


def test_time_belongs_to_the_part_entered_last(clock_and_time):
    clock, time = clock_and_time
    assert clock.take() == parts()
    walk(clock, time, ("data", 1.0), ("forward", 2.0), ("backward", 4.0), ("forward", 0.5), ("forward", 0.25), ("communication", 8.0))
    walk(clock, time, ("optimizer", 16.0), (None, 1000.0), ("data", 32.0), ("other", 0.125))
    assert clock.take() == parts(data=33.0, forward=2.75, backward=4.0, communication=8.0, optimizer=16.0, other=0.125)
    time.now += 3.0
    assert clock.take() == parts(other=3.0), "the part under way goes on in the next window"
    clock.stop()
    time.now += 5.0
    assert clock.take() == parts() == clock.take()


def test_a_gpu_is_waited_for_once_a_window():
    time = Time()
    timeline = metrics._EventTimeline(time.event)
    time.lag = 0.5  # launched half a second before it runs
    for _ in range(500):
        for part, seconds in (("forward", 0.1), ("backward", 0.2)):
            timeline.mark(part)
            time.now += seconds
        assert len(timeline._marks) <= metrics.FOLD_AT + 5, "what the GPU has passed is let go of"
    assert time.waits == 0
    assert timeline.take() == parts(forward=50.0, backward=100.0)
    assert time.waits == 1 and time.events == 1001


def test_events_are_bounded_when_the_gpu_is_far_behind():
    time = Time()
    timeline = metrics._EventTimeline(time.event)
    time.lag = 1e6
    for number in range(3 * metrics.MOST_EVENTS):
        timeline.mark("forward" if number % 2 else "backward")
        time.now += 0.001
        assert len(timeline._marks) <= metrics.MOST_EVENTS
    assert 0 < time.waits <= 3


def test_a_disabled_clock_looks_at_no_clock(monkeypatch):
    monkeypatch.setattr(metrics.time, "monotonic", None)
    clock = StepClock(CPU, enabled=False)
    clock.enter("forward")
    clock.stop()
    assert clock.take() == parts()


def test_parts_are_known():
    with pytest.raises(AssertionError, match="foward"):
        StepClock(CPU).enter("foward")


HOSTS = ["n01", "n01", "n02", "n02"]


@pytest.mark.parametrize(
    ("seconds", "expected", "named"),
    [
        ([1.0, 1.0, 1.0, 1.4], (3, "n02", 1.4), True),
        ([1.0, 1.25, 1.0, 1.1], (1, "n01", 1.25), True),
        ([2.0, 2.0, 2.3, 2.0], (2, "n02", 1.15), False),
        ([1.0, 2.0], (1, "n01", 2.0), True),
        ([4.0, 1.0, 1.0], (0, "n01", 4.0), True),
    ],
)
def test_the_slowest_rank(seconds, expected, named):
    found = straggler(seconds, HOSTS)
    assert (found.rank, found.host, found.ratio) == (*expected[:2], pytest.approx(expected[2])) and found.named is named


def test_one_rank_is_not_slow():
    assert straggler([5.0], HOSTS) is None and straggler([0.0, 0.0], HOSTS) is None
    assert Straggler(0, "n", 1.2).named and not Straggler(0, "n", 1.19).named


def step(skipped=False, *, sequences=8, tokens=100, masked=10, loss=(0.5, 0.25), correct=4, ids=b"abcd"):
    batch = types.SimpleNamespace(sequences=sequences, tokens=tokens, masked=masked, checksum=zlib.crc32(ids), bytes=len(ids))
    losses = [torch.tensor(value) for value in loss]
    return batch, types.SimpleNamespace(mlm_loss=losses[0], nsp_loss=losses[1], mlm_correct=torch.tensor(correct), skipped=skipped)


def test_skipped_steps_cost_and_score_nothing():
    sums = WindowSums()
    sums.add(*step(), flops=1e9)
    sums.add(*step(skipped=True, loss=(float("nan"), float("inf")), correct=9), flops=2e9)
    sums.add(*step(loss=(0.125, 0.0), correct=1, ids=b"efgh"), flops=4e9)
    sums.add_parts({**dict.fromkeys(PARTS, 1.0), "data": 4.0})
    sums.add_parts({**dict.fromkeys(PARTS, 0.5), "data": 4.0})
    assert (sums.steps, sums.sequences, sums.tokens, sums.masked, sums.flops) == (2, 24, 300, 20, 7e9)
    assert (float(sums.mlm), float(sums.nsp), int(sums.correct)) == (0.625, 0.25, 5)
    assert sums.seconds == 15.5 and (sums.checksum, sums.bytes) == (zlib.crc32(b"efgh"), 4)
    assert WindowSums.from_values(sums.values()) == sums
    assert all(type(value) is float for value in sums.values())


def test_ranks_put_together():
    """Three ranks of uneven work; every number recomputed by hand."""
    sums = [WindowSums() for _ in range(3)]
    sums[0].add(*step(masked=10, tokens=100, loss=(1.0, 0.2), correct=5, ids=b"one-"), flops=3e12)
    sums[1].add(*step(masked=30, tokens=120, loss=(2.0, 0.3), correct=3, ids=b"two-"), flops=4e12)
    sums[2].add(*step(masked=20, tokens=90, loss=(3.0, 0.1), correct=10, ids=b"last"), flops=5e12)
    times = (
        {"data": 1, "forward": 3, "backward": 4, "communication": 1, "optimizer": 1, "other": 0},
        {"data": 0, "forward": 3, "backward": 4, "communication": 2, "optimizer": 1, "other": 0},
        {"data": 0, "forward": 4, "backward": 6, "communication": 0, "optimizer": 1, "other": 1},
    )
    for own, seconds, memory in zip(sums, times, (2.0, 3.5, 1.0), strict=True):
        own.add_parts(seconds)
        own.memory_gib = memory
    window = reduce_window([own.values() for own in sums], ["a", "b", "c"])
    assert (window.steps, window.sequences, window.tokens, window.flops, window.seconds) == (1, 24, 310, 12e12, 12.0)
    assert (window.mlm_loss, window.nsp_loss) == (6.0, pytest.approx(0.6)) and window.mlm_accuracy == pytest.approx(18 / 60)
    assert window.shares == {
        "data": pytest.approx((1 / 10 + 0 + 0) / 3),
        "forward": pytest.approx((3 / 10 + 3 / 10 + 4 / 12) / 3),
        "backward": pytest.approx((4 / 10 + 4 / 10 + 6 / 12) / 3),
        "communication": pytest.approx((1 / 10 + 2 / 10 + 0) / 3),
        "optimizer": pytest.approx((1 / 10 + 1 / 10 + 1 / 12) / 3),
        "other": pytest.approx(1 / 12 / 3),
    }
    assert window.straggler == Straggler(2, "c", pytest.approx(12 / 9)) and window.memory_gib == 3.5
    assert window.batch_crc32 == zlib.crc32(b"one-two-last")
    assert window.flops_per_device == pytest.approx(12e12 / 12 / 3) and window.rate(window.tokens) == pytest.approx(310 / 12)


def test_a_window_of_nothing():
    window = reduce_window([WindowSums().values()] * 2, ["a", "b"])
    assert (window.steps, window.rate(5), window.flops_per_device, window.straggler) == (0, 0.0, 0.0, None)
    assert (window.mlm_loss, window.mlm_accuracy, window.batch_crc32) == (0.0, 0.0, 0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says it in another way, too")
def test_memory_of_a_process_is_its_peak():
    before = memory_gib(CPU)
    block = bytearray(b"x" * (96 << 20))
    during = memory_gib(CPU)
    del block
    said = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert memory_gib(CPU) == pytest.approx(int(said.group(1)) / 2**20, rel=0.02) and memory_gib(CPU) >= during >= before
