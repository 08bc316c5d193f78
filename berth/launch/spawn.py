"""What srun is to a cluster, on this machine: N processes that know their rank and end together.

    python -m berth.launch.spawn --ranks N [--label] [--grace SECONDS] -- PROGRAM ARGS...

The processes get RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and this terminal, so that a progress bar
works. Signals are passed on to all. When one fails, the others are asked to end (SIGTERM), as by ``srun --kill-on-bad-exit``, and killed when
they have not after ``--grace`` seconds; the exit code is the highest of those that ended by themselves, 128 + signal for a killed one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from time import monotonic
from types import FrameType
from typing import IO

from berth.errors import LaunchError, run_main
from berth.launch.rank import split_command
from berth.processes import end_with_parent

GRACE_SECONDS = 150.0  # ranks that lost one find out which (15 s) and finish a checkpoint that is being written (120 s)
FORWARDED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_LONGEST_LINE = 1 << 16  # bytes; a longer one is cut, so that output without line ends does not fill the memory


def rank_environment(rank: int, ranks: int, base: Mapping[str, str], port: int) -> dict[str, str]:
    """The environment of process ``rank``; an address and port that ``base`` gives stay."""
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "NODE_RANK": 0, "GROUP_RANK": 0}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **base, **{name: str(value) for name, value in place.items()}}


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def exit_code(return_code: int) -> int:
    """Python's code of a child (negative: killed by that signal) as a shell reports it."""
    return 128 - return_code if return_code < 0 else return_code


class Labeller:
    """Whole lines with ``<rank>: `` before them, like ``srun -l``."""

    def __init__(self, rank: int, ranks: int, target: int) -> None:
        self.label = f"{rank:0{len(str(ranks - 1))}d}: ".encode()
        self.target, self.rest = target, b""

    def feed(self, data: bytes) -> None:
        """Write the lines that ``data`` completes; nothing (the end of the stream) writes what is left."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        if self.rest and (not data or len(self.rest) > _LONGEST_LINE):
            lines.append(self.rest)
            self.rest = b""
        text = memoryview(b"".join(self.label + line + b"\n" for line in lines))
        while text:
            text = text[os.write(self.target, text) :]


class Step:
    """N processes of one command, from :meth:`run` to the exit code of all.

    The main thread waits on one selector: a pipe that signals write to, and (with labels) the output of the processes. No threads,
    because Linux ends a child with the *thread* that made it.
    """

    def __init__(self, ranks: int, command: Sequence[str], label: bool, grace: float = GRACE_SECONDS) -> None:
        self.ranks, self.command, self.label, self.grace = ranks, list(command), label, grace
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.codes: list[int] = []  # of those that ended by themselves
        self.kill_at: float | None = None  # set once the others were asked to end
        self.parent = os.getppid()
        self.selector = selectors.DefaultSelector()

    def run(self) -> int:
        """Start all, wait for all. Raises :class:`LaunchError` when the program cannot be started."""
        signals, write_end = os.pipe()
        for end in (signals, write_end):
            os.set_blocking(end, False)
        previous = {number: signal.signal(number, _noticed) for number in (*FORWARDED, signal.SIGCHLD)}
        wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self.selector.register(signals, selectors.EVENT_READ)
        try:
            self._start()
            while self.running:
                self._wait(signals)
            self._drain()
            return max(self.codes, default=0)
        finally:
            for child in self.running.values():
                _kill_group(child.pid)
                child.wait()
            signal.set_wakeup_fd(wakeup)
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.selector.close()
            os.close(signals)
            os.close(write_end)

    def _start(self) -> None:
        port, pipe = free_port(), subprocess.PIPE if self.label else None
        for rank in range(self.ranks):
            environment = rank_environment(rank, self.ranks, os.environ, port)
            try:
                child = subprocess.Popen(
                    self.command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=pipe,
                    stderr=pipe,
                    preexec_fn=functools.partial(_in_child, os.getpid()),
                )
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                raise LaunchError(f"{self.command[0]!r} cannot be started: {why}; is it on PATH?") from error
            self.running[rank] = child
            for stream, target in ((child.stdout, 1), (child.stderr, 2)):
                if stream is not None:
                    os.set_blocking(stream.fileno(), False)
                    self.selector.register(stream, selectors.EVENT_READ, Labeller(rank, self.ranks, target))

    def _wait(self, signals: int) -> None:
        """One round: pass on signals and output, notice who ended, kill those whose time is over."""
        timeout = None if self.kill_at is None else max(0.0, self.kill_at - monotonic())
        for key, _ in self.selector.select(timeout):
            if key.fd == signals:
                for number in os.read(signals, 4096):
                    if number in FORWARDED:
                        self._forward(number)
            else:
                self._pass_on(key)
        self._notice_ended()
        if self.kill_at is not None and monotonic() >= self.kill_at:
            for child in self.running.values():
                _kill_group(child.pid)
            self.kill_at = monotonic() + self.grace

    def _forward(self, number: int) -> None:
        self._signal_all(number)
        if number == signal.SIGTERM and os.getppid() != self.parent:  # whoever wanted the result is gone
            self.kill_at = self.kill_at or monotonic() + self.grace

    def _notice_ended(self) -> None:
        for rank, child in list(self.running.items()):
            # the group goes before its leader's number is given back, so that no stranger can be hit
            if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            _kill_group(child.pid)
            code = exit_code(child.wait())
            del self.running[rank]
            if self.kill_at is None:
                self.codes.append(code)
        if self.kill_at is None and any(self.codes) and self.running:
            self._signal_all(signal.SIGTERM)
            self.kill_at = monotonic() + self.grace

    def _signal_all(self, number: int) -> None:
        """Not ``Popen.send_signal``: that reaps a process that has ended, and its exit code with it, before it was noticed."""
        for child in self.running.values():
            os.kill(child.pid, number)  # not reaped yet, so the number is still its own

    def _pass_on(self, key: selectors.SelectorKey) -> bool:
        """Label what a process wrote; false when there is nothing (yet, or any more)."""
        stream: IO[bytes] = key.fileobj  # type: ignore[assignment]
        try:
            data = os.read(stream.fileno(), 1 << 16)
        except BlockingIOError:
            return False
        key.data.feed(data)
        if not data:
            self.selector.unregister(stream)
            stream.close()
        return bool(data)

    def _drain(self) -> None:
        """What lies in the pipes when all have ended; somebody they left behind may hold a pipe open, and is not waited for."""
        for key in list(self.selector.get_map().values()):
            if key.data is not None:
                while self._pass_on(key):
                    pass
                key.data.feed(b"")


def _noticed(number: int, frame: FrameType | None) -> None:
    """The number is in the wake-up pipe; the loop acts on it."""


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _in_child(parent: int) -> None:
    """Run between fork and exec: an own process group (Ctrl-C then comes once, from us), and the end of ``parent`` ends this process."""
    os.setpgrp()
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(128 + signal.SIGKILL)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module."""
    own, command = split_command(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m berth.launch.spawn",
        usage="%(prog)s --ranks N [--label] [--grace SECONDS] -- PROGRAM [ARGS ...]",
        description="N processes on this machine.",
    )
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="how many processes")
    parser.add_argument("--label", action="store_true", help="write the rank before each line")
    parser.add_argument(
        "--grace", type=float, default=GRACE_SECONDS, metavar="SECONDS",
        help="from asking the others to end, because one failed, to killing them (default: %(default)g)",
    )  # fmt: skip
    options = parser.parse_args(own)
    if options.ranks < 1:
        parser.error(f"--ranks {options.ranks} must be at least 1")
    if not 0 <= options.grace < float("inf"):
        parser.error(f"--grace {options.grace:g} must be a number of seconds, 0 or more")
    end_with_parent(signal.SIGTERM)
    return Step(options.ranks, command, options.label, options.grace).run()


if __name__ == "__main__":
    run_main(main)
