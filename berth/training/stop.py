"""Leaving politely: a signal asks, the loop answers at the next step boundary, all ranks on the same one."""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers the first stop signal. A second Ctrl-C interrupts at once.

    Installing handlers is the caller's wish (:meth:`install`), not a side effect of importing.
    """

    def __init__(self) -> None:
        self.signal_number = 0

    def install(self) -> None:
        """Handle SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 from now on (main thread only)."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal_number:
            self.signal_number = number
            os.write(2, b"\nstopping after this step, with a checkpoint (Ctrl-C again: at once, without)\n")


def exit_code(signal_number: int) -> int:
    """128 + signal, as a shell reports it: 130 after Ctrl-C, 143 after SIGTERM, 138 and 140 after SIGUSR1 and SIGUSR2."""
    return 128 + signal_number
