"""Checkpoints written beside the training loop: only the copy to memory stops it.

In: a payload nobody else touches any more (:func:`snapshot`). Out: what became of each write (:class:`Outcome`), for the main thread to log.
One write at a time: a save that comes while the one before it is still being written waits for it, and says for how long.

A write that fails costs that checkpoint and a loud warning: a full disk at night must not end a run that is well. The third in a row does
end it, and so does that of a phase's end, or of the run's. Rejected: a child process (a second copy of the state, and forking beside CUDA
and threads is unsafe); a queue of writes (memory for another copy each, and a slow disk stays slow).
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from berth.errors import CheckpointError
from berth.training.checkpoint import CheckpointStore, UnlistedError

FAILURES_ALLOWED = 2  # in a row; the next one ends the run
EXIT_SECONDS = 600.0  # how long an exiting process waits for a write: a disk that hangs must not keep it for ever

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one save. ``path`` is ``None`` when it failed, ``error`` says why; ``seconds`` the write took, beside training;
    ``stalled`` seconds the loop waited in :meth:`AsyncSaver.save` for the write before it."""

    step: int
    final: bool
    path: Path | None
    seconds: float
    stalled: float
    error: CheckpointError | None = None


class AsyncSaver:
    """Writes checkpoints in a thread. All methods but :meth:`close` belong to one thread, the loop's; rank 0 alone saves.

    A process that ends normally waits for the write in progress, ``EXIT_SECONDS`` at most; one that leaves by ``os._exit`` must call
    :meth:`wait` or :meth:`close` before.

    Args:
        store: the folder, prepared.
        on_saved: called with path and seconds of every write that succeeded, in the loop's thread.
    """

    def __init__(self, store: CheckpointStore, on_saved: Callable[[Path, float], None] | None = None) -> None:
        self.store = store
        self._on_saved = on_saved
        self._writer: threading.Thread | None = None
        self._result: Outcome | BaseException | None = None
        self._finished: list[Outcome] = []
        self._failures = 0
        self._last_error: CheckpointError | None = None
        atexit.register(self.close)

    def save(self, payload: dict[str, Any], *, step: int, phase: int, phase_step: int, samples: int, final: bool) -> None:
        """Begin to write ``payload``, whose tensors (CPU) belong to the saver from now on.

        Raises :class:`CheckpointError` when an earlier write failed for good (see the module).
        """
        began = time.monotonic()
        self.join()
        stalled = time.monotonic() - began
        place = {"step": step, "phase": phase, "phase_step": phase_step, "samples": samples, "final": final}
        self._writer = threading.Thread(target=self._write, args=(payload, place, stalled), name=f"ckpt_{step}", daemon=True)
        self._writer.start()

    def poll(self) -> list[Outcome]:
        """Writes that have finished since the last call; raises as :meth:`save`."""
        self._collect()
        finished, self._finished = self._finished, []
        return finished

    def join(self) -> None:
        """Block until the write in progress has ended; raises as :meth:`save`."""
        self._join()
        self._collect()

    def wait(self) -> None:
        """Block until all is on disk; raises the :class:`CheckpointError` of the last write if it failed."""
        self.join()
        if self._last_error is not None:
            raise _fatal(self._last_error)

    def close(self, seconds: float = EXIT_SECONDS) -> None:
        """Wait for the write in progress, but not for ever, and raise nothing: for a process that ends for another reason.

        Changes nothing, so that another thread (a watchdog) may call it while the loop hangs.
        """
        atexit.unregister(self.close)
        writer = self._writer
        if writer is None:
            return
        writer.join(seconds)
        if writer.is_alive():
            logger.warning("%s is still being written after %.0f s and is given up", writer.name, seconds)
            return
        result = self._result
        failure = result.error if isinstance(result, Outcome) else result
        if failure is not None:
            logger.warning("%s", failure)

    def _write(self, payload: dict[str, Any], place: dict[str, Any], stalled: float) -> None:
        """In the thread. Whatever happens becomes a result for the loop: a thread's own exceptions are seen by nobody."""
        began = time.monotonic()
        path, failure = None, None
        try:
            path = self.store.save(payload, **place)
        except CheckpointError as error:
            failure = error.with_traceback(None)  # its frames hold the payload
            failure.__cause__ = failure.__context__ = None
        except BaseException as error:
            self._result = error
            return
        self._result = Outcome(place["step"], place["final"], path, time.monotonic() - began, stalled, failure)

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()

    def _collect(self) -> None:
        """Take over the result of a write that has ended: call back, or warn and count."""
        if self._writer is None or self._writer.is_alive():
            return
        self._writer, result, self._result = None, self._result, None
        if not isinstance(result, Outcome):
            assert result is not None
            raise result
        self._finished.append(result)
        self._last_error = result.error
        if result.error is None:
            self._failures = 0
            if self._on_saved is not None and result.path is not None:
                self._on_saved(result.path, result.seconds)
            return
        self._failures += 1
        if result.final or self._failures > FAILURES_ALLOWED:
            raise _fatal(result.error)
        logger.warning(
            "WARNING: %s. TRAINING GOES ON%s (failure %d in a row; number %d ends the run)",
            result.error, "" if isinstance(result.error, UnlistedError) else " WITHOUT THIS CHECKPOINT", self._failures, FAILURES_ALLOWED + 1,
        )  # fmt: skip


def _fatal(error: CheckpointError) -> CheckpointError:
    return CheckpointError(f"{error}. Then run again with --resume_from_checkpoint")


def snapshot(tree: Any) -> Any:
    """A deep copy of nested dicts, lists and tuples whose tensors lie in CPU memory and are detached; other values are taken as they are.

    Storages are copied whole and once: tensors that share memory (tied weights, views of a flat buffer) share it in the copy, too, and
    ``torch.save`` writes it once. From CUDA through pinned memory, with one wait at the end.
    """
    copies = _Copies()
    copy = copies.of(tree)
    copies.finish()
    return copy


class _Copies:
    """The copied storages by the place they were copied from."""

    def __init__(self) -> None:
        self._storages: dict[tuple[torch.device, int], torch.UntypedStorage] = {}

    def of(self, tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return self._tensor(tree.detach())
        if isinstance(tree, dict):
            return {key: self.of(value) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self.of(value) for value in tree)
        return tree

    def finish(self) -> None:
        """Wait for the copies that are under way."""
        for device in {device for device, _ in self._storages if device.type == "cuda"}:
            torch.cuda.synchronize(device)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        source = tensor.untyped_storage()
        place = (source.device, source.data_ptr())
        if place not in self._storages:
            cuda = source.device.type == "cuda"
            copy = torch.empty(source.nbytes(), dtype=torch.uint8, pin_memory=cuda)
            copy.copy_(torch.empty(0, dtype=torch.uint8, device=source.device).set_(source), non_blocking=cuda)
            self._storages[place] = copy.untyped_storage()
        return torch.empty(0, dtype=tensor.dtype).set_(
            self._storages[place], tensor.storage_offset(), tensor.size(), tensor.stride()
        )  # fmt: skip
