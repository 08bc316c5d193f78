"""Work in processes: a few tasks ahead, errors with their traceback, nothing that hangs when somebody is killed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from berth.errors import ConfigError, DataError
from berth.workers import TASKS_AHEAD, map_processes
from tests.support import ROOT, environment


def double(number: int) -> int:
    return 2 * number


def late(number: int) -> int:
    time.sleep(0.3 * (number == 0))
    return number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise DataError(f"number {number} is wrong")
    time.sleep(0.1)
    return number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def variable(number: int) -> str:
    return os.environ["TOKENIZERS_PARALLELISM"]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_result_once(processes):
    made = list(map_processes(double, range(20), processes))
    assert sorted(made) == [2 * number for number in range(20)]
    assert processes > 1 or made == sorted(made)
    assert list(map_processes(double, [], processes)) == []


def test_results_come_as_they_finish():
    assert next(map_processes(late, range(6), 2)) != 0


@pytest.mark.parametrize("processes", [1, 2])
def test_an_endless_generator_is_read_a_few_tasks_ahead(processes):
    taken = itertools.count()
    results = map_processes(double, taken, processes)
    found = [next(results) for _ in range(30)]
    results.close()
    assert len(set(found)) == 30
    assert next(taken) <= 30 + processes * (2 + TASKS_AHEAD)


def test_no_processes():
    with pytest.raises(ConfigError, match="--processes 0 must be at least 1"):
        list(map_processes(double, [1], 0))


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_keeps_its_type_and_traceback_and_other_work_is_handed_out(processes):
    got = []
    with pytest.raises(DataError, match="number 3 is wrong") as caught:
        for number in map_processes(fail_at_three, range(50), processes):
            got.append(number)
    assert "in fail_at_three" in "".join(traceback.format_exception(caught.value))
    assert {0, 1, 2} <= set(got) and len(got) < 12 and len(set(got)) == len(got)


def test_a_failing_generator_of_tasks():
    def tasks():
        yield 1
        raise DataError("no second task")

    with pytest.raises(DataError, match="no second task"):
        list(map_processes(double, tasks(), 2))


def test_a_killed_worker_is_an_error_with_advice():
    with pytest.raises(DataError, match=r"a worker process was killed.*fewer --processes"):
        list(map_processes(die_at_three, range(50), 2))


def test_tokenizers_are_told_not_to_start_threads():
    assert set(map_processes(variable, range(3), 2)) == {"false"}


# started in the background by a shell, this process ignores Ctrl-C and so would its children
PROGRAM = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from berth.errors import run_main
from berth.files import atomic_open
from berth.workers import map_processes, stop_on_sigterm
folder = Path(sys.argv[1])
output = folder / "out.txt"
def work(number):
    (folder / f"worker_{{number}}.pid").write_text(str(os.getpid()))
    with atomic_open(output) as handle:
        handle.write("half")
        handle.flush()
        time.sleep(60)
def main():
    stop_on_sigterm([output])
    list(map_processes(work, range(9), 2))
if __name__ == "__main__":
    run_main(main)
"""


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("number", "code", "message"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted"), (signal.SIGKILL, -9, "")]
)
def test_signals_end_everything(tmp_path, number, code, message):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    child = subprocess.Popen(
        [sys.executable, program, tmp_path], stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    end = time.monotonic() + 30
    while time.monotonic() < end and len(list(tmp_path.glob(".out.txt.*.partial"))) < 2:
        time.sleep(0.02)
    workers = [int(path.read_text()) for path in tmp_path.glob("worker_*.pid")]
    assert len(workers) == 2 and all(map(alive, workers))
    if number == signal.SIGINT:
        os.killpg(child.pid, number)  # as a terminal does
    else:
        child.send_signal(number)
    _, error = child.communicate(timeout=20)
    assert child.returncode == code and message in error and "Traceback" not in error
    end = time.monotonic() + 5
    while time.monotonic() < end and any(map(alive, workers)):
        time.sleep(0.02)
    assert not any(map(alive, workers))
    assert not (tmp_path / "out.txt").exists()
    assert number != signal.SIGTERM or not list(tmp_path.glob("*.partial"))
