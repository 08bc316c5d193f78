"""Slurm's commands as functions: what one prints, and what became of a job. In: argv or a job number. Out: text, or :class:`LaunchError`."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence

from berth.errors import LaunchError

COMMAND_SECONDS = 60
NO_SLURM = "{} is not on this machine: submit from a login node, or use --backend local"
LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "SIGNALING", "STOPPED")

KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide the variables of the job this process runs in (an interactive one, say), where it runs in one.

    sbatch hands them on, and srun reads many of them as options: the new job's steps would get the memory or the GPUs of the old one's.
    """
    inside = "SLURM_JOB_ID" in os.environ
    hidden = {name: value for name, value in os.environ.items() if inside and name.startswith(("SLURM_", "SRUN_")) and name not in KEPT}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def state_of(job_id: str) -> str:
    """Slurm's state of a job, UNKNOWN where neither queue nor accounting know it."""
    return ask(job_id)[0]


def ask(job_id: str) -> tuple[str, str, str, str]:
    """State, reason, elapsed time and nodes: of the queue (which remembers ended jobs for some minutes), else of the accounting."""
    queue = attempt(["squeue", "--noheader", f"--jobs={job_id}", "--states=all", "--format=%T|%r|%M|%N"])
    if queue and queue.strip():
        state, reason, elapsed, nodes = (queue.strip().splitlines()[0].split("|") + [""] * 4)[:4]
        return state, "" if reason == "None" else reason, elapsed, nodes
    rows = attempt(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", "--format=State,ExitCode,Elapsed,NodeList"])
    if rows and rows.strip():
        state, code, elapsed, nodes = (rows.strip().splitlines()[-1].split("|") + [""] * 4)[:4]
        return state.split()[0], f"exit {code}", elapsed, nodes
    return "UNKNOWN", "", "", ""


def attempt(words: Sequence[str]) -> str | None:
    """What a command prints, ``None`` when it fails or is not there."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def command(words: Sequence[str]) -> str:
    """What a command of Slurm prints. Raises :class:`LaunchError` with its own words when it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise LaunchError(NO_SLURM.format(words[0])) from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{words[0]} did not answer within {COMMAND_SECONDS} s; is Slurm's controller there? (sinfo)") from error
    if done.returncode:
        raise LaunchError(f"{shlex.join(words)}: {one_line(done.stderr) or f'exit code {done.returncode}'}")
    return done.stdout


def one_line(text: str) -> str:
    """A message without line breaks."""
    return re.sub(r"\s+", " ", text.strip())
