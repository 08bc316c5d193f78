"""Signals are remembered, not obeyed at once, and become the shell's exit codes."""

from __future__ import annotations

import os
import signal

import pytest

from berth.training.stop import SIGNALS, StopRequest, exit_code


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    request = StopRequest()
    request.install()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138), ("SIGUSR2", 140)])
def test_each_signal_is_remembered(stop, name, code):
    os.kill(os.getpid(), signal.Signals[name])
    assert exit_code(stop.signal_number) == code


def test_the_first_counts_and_a_second_interrupt_is_at_once(stop):
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal_number == signal.SIGUSR2
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
