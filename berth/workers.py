"""Work spread over processes, results as they finish; the first error ends everything and is raised with its traceback.

Workers are spawned (a forked child would inherit the threads of the tokenizer and of HDF5 in an unknown state), end with
their parent, and are fed a few tasks ahead only, so that an endless iterator of tasks needs no memory.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import TypeVar

from berth.errors import ConfigError, DataError
from berth.files import discard_temporary
from berth.processes import end_with_parent

Given = TypeVar("Given")
Made = TypeVar("Made")

TASKS_AHEAD = 2  # per process, beside the one it works on


def _worker_start() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    if sys.platform == "linux":  # a worker whose parent is killed ends, too
        end_with_parent(signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:  # killed before the line above
            os._exit(1)


def map_processes(function: Callable[[Given], Made], tasks: Iterable[Given], processes: int) -> Generator[Made, None, None]:
    """``function(task)`` for every task, in whatever order they finish. One process: in this one, in order.

    ``function`` and tasks must be picklable (a top-level function, or an instance of a top-level class). Raises
    :class:`ConfigError` for ``processes < 1``, what the function raises (after what was being worked on meanwhile has been handed
    out), and :class:`DataError` when a worker was killed.
    """
    if processes < 1:
        raise ConfigError(f"--processes {processes} must be at least 1")
    if processes == 1:
        yield from map(function, tasks)
        return
    pool = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_worker_start)
    waiting: set[Future[Made]] = set()
    interrupted = False
    try:
        for task in tasks:
            waiting.add(pool.submit(function, task))
            if len(waiting) >= processes * (1 + TASKS_AHEAD):
                done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                yield from _results(done, waiting)
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            yield from _results(done, waiting)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, probably for lack of memory; use fewer --processes or smaller parts, and run "
            "again: finished files are kept"
        ) from error
    except KeyboardInterrupt:
        interrupted = True
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        # a worker killed at the wrong moment leaves the pool's own thread waiting for ever (seen once in some hundred Ctrl-C)
        pool.shutdown(wait=not interrupted, cancel_futures=True)


def _results(done: Iterable[Future[Made]], waiting: Iterable[Future[Made]]) -> Iterator[Made]:
    """The results of ``done``. If one failed, those of ``waiting`` that have begun, too, then its error."""
    failed = None
    for future in done:
        if future.exception() is None:
            yield future.result()
        else:
            failed = failed or future
    if failed is not None:
        for future in concurrent.futures.as_completed([future for future in waiting if not future.cancel()]):
            if future.exception() is None:
                yield future.result()
        failed.result()


def stop_on_sigterm(outputs: Iterable[Path] = ()) -> None:
    """Let SIGTERM end this process and its workers at once with code 143, nothing half-written to ``outputs``.

    Not by an exception: HDF5 would swallow one that is raised while it writes.
    """
    outputs = tuple(outputs)

    def stop(number: int, frame: FrameType | None) -> None:
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(5)
        for output in outputs:
            for process in (os.getpid(), *(worker.pid for worker in workers)):
                with contextlib.suppress(OSError):
                    discard_temporary(output, int(process or 0))
        os.write(2, b"terminated\n")
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
