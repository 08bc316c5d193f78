"""A rank that dies, is stopped, or is not the same as the others ends the run on all ranks in the stated time, with a message that names it."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT, environment, launch, make_project, pretraining_arguments, write_records

DEAD_AFTER = 4  # seconds; the interval of the beats is a quarter
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


def wait_for(file: Path, running: list[subprocess.Popen[str]], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < end and all(process.poll() is None for process in running), "training did not come so far"
        time.sleep(0.05)


def lose(project: Path, processes: int, victim: int, signal_number: int) -> tuple[list[tuple[int, str]], float]:
    """Train with ``processes``, send ``victim`` a signal after the first checkpoint; (code, last words) of the others, and the seconds it took."""
    output = f"out{signal_number}_{victim}"
    running = launch(project, processes, output, max_steps=10**6, dead_rank_s=DEAD_AFTER, log_freq=10**6, keep_checkpoints=1)
    others = [process for rank, process in enumerate(running) if rank != victim]
    try:
        wait_for(project / output / "ckpt_5.pt", running)
        time.sleep(DEAD_AFTER / 2)  # beats that say so
        running[victim].send_signal(signal_number)
        start = time.monotonic()
        ended = [(process.wait(60), "") for process in others]
        took = time.monotonic() - start
        ended = [(code, process.communicate(timeout=10)[1]) for (code, _), process in zip(ended, others, strict=True)]
    finally:
        for process in running:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
                process.communicate(timeout=10)
    return ended, took


def last_seen(errors: str, rank: int) -> int:
    """The step at which the message says ``rank`` was last seen."""
    (line,) = {line for line in errors.splitlines() if line.startswith("error: ")}  # perhaps repeated after torch's own words
    found = re.fullmatch(
        rf"error: rank {rank} on host {re.escape(HOST)} \(last seen at step (\d+), [a-z0-9, -]+\) has not been heard of for [24] s; it was killed or stopped, "
        r"or the node is gone\. All ranks end; go on from the newest checkpoint with --resume_from_checkpoint \(this rank was at step \d+\)",
        line,
    )
    assert found, line
    return int(found[1])


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "signal_number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_a_rank_that_is_killed_or_stopped(project, victim, signal_number):
    """Killed, the others' collective fails at once; stopped, nothing fails, and they stay inside it. Rank 0 keeps the store that all talk through."""
    (only,), took = lose(project, 2, victim, signal_number)
    code, errors = only
    assert code == 76
    assert last_seen(errors, victim) >= 5
    interval = DEAD_AFTER / 4
    # a beat, its reading, the parting words; a broken collective needs two intervals. The rest is for a busy machine
    assert took < DEAD_AFTER + 5 * interval + 4


@pytest.mark.slow
def test_a_rank_with_other_data_and_another_revision_of_the_code(project, tmp_path):
    """Rank 1 runs a changed copy of the project and has other records: both ranks say so before anything is written."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "berth", tmp_path / "copy" / "berth", ignore=ignored)
    for name in ("run_pretraining.py", "modeling.py", "optimization.py"):
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    with open(tmp_path / "copy" / "berth" / "training" / "step.py", "a", encoding="utf-8") as module:
        module.write("# another revision\n")
    write_records(tmp_path / "records" / "a_training_0.hdf5", 90, seed=5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank, (root, records) in enumerate([(ROOT, project / "records"), (tmp_path / "copy", tmp_path / "records")]):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        running.append(
            subprocess.Popen(
                [sys.executable, str(root / "run_pretraining.py"), *pretraining_arguments(project, "differ", input_dir=records)], text=True,
                stderr=subprocess.PIPE, cwd=root, env={**environment(), **{name: str(value) for name, value in place.items()}},
            )
        )  # fmt: skip
    try:
        ended = [(process.communicate(timeout=120)[1], process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()
    for errors, code in ended:
        assert code == 1 and "the ranks do not agree on what to train:" in errors
        for fact in ("code of berth", "training records"):
            assert re.search(
                rf"{fact}: \w{{12}}\.\.\. on rank 1 \({re.escape(HOST)}\), but \w{{12}}\.\.\. on rank 0 \({re.escape(HOST)}\); ", errors
            )
    assert not (project / "differ").exists()
