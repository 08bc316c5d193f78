"""The errors a user of berth can meet, and the way an entry point reports them.

A message names the wrong value (file, line, option), the rule it breaks and the fix. Programming mistakes stay
``assert``/``ValueError`` and show their traceback; these are printed as one line.

Exit codes: 2 for usage (:class:`ConfigError`), 75 and 76 where another try may help (:class:`JoinError`, :class:`LostRankError`), 1 for the
others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable


class BerthError(Exception):
    """Base of the errors meant for the user; never raised itself."""

    exit_code = 1


class ConfigError(BerthError, ValueError):
    """An option, a config file or a combination of them is wrong. Exit code 2."""

    exit_code = 2


class DataError(BerthError, ValueError):
    """An input (text, vocabulary, records) is missing, damaged or contradicts the options."""


class CheckpointError(BerthError, RuntimeError):
    """A checkpoint cannot be read, written or used for this run."""


class TrainingError(BerthError, RuntimeError):
    """Training cannot go on: the loss is not finite, or every step is skipped."""


class LaunchError(BerthError, RuntimeError):
    """A process, rank or job could not be started or reached."""


class JoinError(LaunchError):
    """The ranks did not find each other. The network or a node may be to blame: worth another try. Exit code 75."""

    exit_code = 75


class LostRankError(LaunchError):
    """A rank died, hangs, or failed: the others cannot go on. Another try goes on from the newest checkpoint. Exit code 76.

    Args:
        message: which rank, on which host, at which step.
        exit_code: of the rank that failed with a message of its own; it is the exit code of all then.
    """

    exit_code = 76

    def __init__(self, message: str, exit_code: int = 76) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def print_error(error: BerthError) -> None:
    """Say it on standard error, and note it for the launcher, unless another try may help or another rank has noted it."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    if error.exit_code in (1, 2) and not isinstance(error, LostRankError):
        note_failure(error.exit_code, str(error))


def note_failure(code: int, message: str) -> None:
    """Add to the file that a launcher named in BERTH_FAILURES that this task ended for a reason.

    Slurm ends a step's other tasks when one has failed, and reports what it ended them with; the reason would be lost.
    """
    file = os.environ.get("BERTH_FAILURES")
    if file:
        with contextlib.suppress(OSError), open(file, "a", encoding="utf-8") as handle:
            handle.write(f"{code} {' '.join(message.split())}\n")


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point and leave the process with its exit code.

    A :class:`BerthError` is printed as one ``error:`` line; an ``OSError`` (disk full, permission) likewise with its path;
    Ctrl-C ends with 130. Anything else is a bug and keeps its traceback.
    """
    try:
        code = main()
    except BerthError as error:
        print_error(error)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # nothing is left to tidy, and threads of libraries may wait for processes that are gone
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        message = f"{error.strerror or error}{where}"
        print(f"error: {message}", file=sys.stderr)
        note_failure(1, message)
        code = 1
    sys.exit(code or 0)
