"""TensorBoard's curves, which must not cost the run they show.

In: numbers by name and the step they belong to. Out: event files. TensorBoard writes in a thread; what that thread meets is raised by a later
call, and the writer is of no use from then on. Then the curves stop with one warning, and once a small file can be written in the folder again
a new writer goes on in a new event file. The run log has the same numbers.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

from berth.errors import DataError

RETRY_SECONDS = 60.0  # between looks at whether the folder can be written again
_PROBE = 1 << 16  # bytes that must fit

logger = logging.getLogger(__name__)


class Board:
    """Curves in one folder.

    Args:
        folder: the ``--tensorboard_dir``.
        step: curves of an earlier process after this global step are hidden.

    Raises :class:`DataError` when the folder cannot be written at the start; later nothing is raised.
    """

    def __init__(self, folder: str, step: int) -> None:
        self.folder = folder
        self._lost = 0
        self._next_try = 0.0
        self._hook = threading.excepthook
        threading.excepthook = self._unless_told
        try:
            self._writer: Any = self._open(step)
        except OSError as error:
            threading.excepthook = self._hook
            raise DataError(f"--tensorboard_dir {folder} cannot be written ({error.strerror}); choose another") from error

    def _unless_told(self, failure: threading.ExceptHookArgs) -> None:
        """No traceback of TensorBoard's thread: what it met comes back as the error of a call."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._hook(failure)

    def _open(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.folder, purge_step=step + 1)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """One point of every curve in ``values``."""
        if self._writer is None and not self._reopened(step):
            self._lost += 1
            return
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except Exception as error:  # with TensorFlow installed, disks have errors of their own
            self._give_up(error)
            self._lost += 1

    def _give_up(self, error: BaseException) -> None:
        logger.warning("WARNING: TensorBoard's file in %s cannot be written (%s). TRAINING GOES ON WITHOUT CURVES", self.folder, error)
        self._writer, self._next_try = None, time.monotonic() + RETRY_SECONDS

    def _reopened(self, step: int) -> bool:
        """Try again if it is time; a file of our own first, because TensorBoard leaves an empty one behind where it fails."""
        if time.monotonic() < self._next_try:
            return False
        self._next_try = time.monotonic() + RETRY_SECONDS
        try:
            with tempfile.TemporaryFile(dir=self.folder, buffering=0) as probe:
                if probe.write(bytes(_PROBE)) < _PROBE:
                    return False
            self._writer = self._open(step - 1)
        except Exception:
            return False
        logger.warning("TensorBoard's files in %s can be written again; %d or more points of every curve are lost", self.folder, self._lost)
        self._lost = 0
        return True

    def close(self) -> None:
        """Write what is left."""
        try:
            if self._writer is not None:
                self._writer.close()
        except Exception as error:
            logger.warning("WARNING: the last curves in %s are lost (%s)", self.folder, error)
        self._writer = None
        if threading.excepthook == self._unless_told:
            threading.excepthook = self._hook
