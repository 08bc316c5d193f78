"""Child processes that do not outlive their parent."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(signal_number: int) -> None:
    """In a child: ask Linux for ``signal_number`` when the parent dies, also by kill -9. Other systems offer no such thing."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number)
