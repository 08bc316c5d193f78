"""Child processes that do not outlive their parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

from berth.errors import LaunchError

_PR_SET_PDEATHSIG = 1


def end_with_parent(signal_number: int) -> None:
    """In a child: ask Linux for ``signal_number`` when the parent dies, also by kill -9. Other systems offer no such thing."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number)


def run_command(command: tuple[str, ...]) -> int:
    """Run argv with this terminal and wait for it; its exit code, or 128 + signal when we were asked to stop meanwhile.

    SIGTERM is passed on; Ctrl-C has reached the child already, which ends politely.
    """
    # waiting threads spin shortly, then give their core away: beside another busy program endless spinning is ten times slower
    defaults = {"GOMP_SPINCOUNT": "100000", "TOKENIZERS_PARALLELISM": "false"}
    child = subprocess.Popen(command, env={**defaults, **os.environ, "PYTHONUNBUFFERED": "1"}, preexec_fn=_terminate_with_parent)
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if number == signal.SIGTERM:
            child.send_signal(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 + asked[0] if asked else code


def _terminate_with_parent() -> None:
    """In the child: stop politely when the driver is killed, so that no orphan trains on in the background."""
    end_with_parent(signal.SIGTERM)


def raise_for(stage: str, code: int) -> None:
    """Turn a child's exit code into ours: an interruption keeps its code, a failure says how to go on.

    Raises ``SystemExit`` for the first, :class:`LaunchError` for the second.
    """
    code = {-signal.SIGINT: 130, -signal.SIGTERM: 143}.get(code, code)
    if code in (130, 143):
        print(f"== {stage}: interrupted; run the same command again to go on from here", file=sys.stderr, flush=True)
        raise SystemExit(code)
    how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    raise LaunchError(f"stage {stage} {how}; its message stands above. The same command goes on from here once that is mended")
