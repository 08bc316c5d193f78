"""The stand-in for srun: places, labels, signals, and an end for all when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from berth.launch import spawn
from berth.launch.spawn import Labeller, Step, exit_code, rank_environment
from tests.support import ROOT, environment

# each process says that it is ready by a file named for its rank that holds its number
READY = "import os, pathlib, signal, sys, time; folder = pathlib.Path(sys.argv[1]); rank = os.environ['RANK']\n"
READY += "def say(*words): os.write(1, ' '.join([*map(str, words), '']).rstrip().encode() + b'\\n')\n"  # at one go: all share one pipe
ANNOUNCE = "(folder / f'.{rank}').write_text(str(os.getpid())); (folder / f'.{rank}').rename(folder / rank)\n"


def together(ranks):
    """Code that waits for all, as training does at its end: the first to leave with a code would have the others asked to end."""
    return f"(folder / f'left{{rank}}').touch()\nwhile len(list(folder.glob('left*'))) < {ranks}: time.sleep(0.01)\n"


def start(ranks, code, *arguments, label=False, own=(), **options):
    command = [sys.executable, "-m", "berth.launch.spawn", "--ranks", str(ranks), *(["--label"] if label else []), *own]
    return subprocess.Popen(
        [*command, "--", sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(), cwd=ROOT, **options,
    )  # fmt: skip


def ready(folder, ranks):
    """The process numbers by rank, once all are there."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if all((folder / str(rank)).exists() for rank in range(ranks)):
            return [int((folder / str(rank)).read_text()) for rank in range(ranks)]
        time.sleep(0.02)
    raise AssertionError(f"only {sorted(path.name for path in folder.iterdir())} of {ranks} processes came up")


def ended(process):
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_environment_of_a_rank():
    place = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "NODE_RANK": "0", "GROUP_RANK": "0"}
    assert rank_environment(1, 3, {"A": "a b", "RANK": "7"}, 99) == {"A": "a b", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99", **place}
    given = {"MASTER_ADDR": "n1", "MASTER_PORT": "5"}
    assert rank_environment(1, 3, given, 99) == {**given, **place}
    assert [exit_code(code) for code in (0, 3, -9, -15)] == [0, 3, 137, 143]


def test_labels_come_before_whole_lines(tmp_path):
    with open(tmp_path / "out", "wb") as out:
        labeller = Labeller(2, 11, out.fileno())
        labeller.feed(b"one\ntw")
        labeller.feed(b"")  # the end: what is left is a line too
        labeller.feed(b"\n")
        labeller.feed(b"x" * (1 << 16) + b"y")
    assert (tmp_path / "out").read_bytes() == b"02: one\n02: tw\n02: \n02: " + b"x" * (1 << 16) + b"y\n"


def test_ranks_with_labelled_lines_arguments_and_one_port():
    code = (
        "import os, sys; e = os.environ; print(e['RANK'], e['WORLD_SIZE'], e['MASTER_ADDR'], e['MASTER_PORT'], sys.argv[1:], flush=True)\n"
    )
    code += "for line in range(200): print('line', line)\nprint('no end', file=sys.stderr, end='')"
    hostile = ["two words", "$HOME;", "new\nline"]
    step = start(3, code, *hostile, label=True)
    out, error = step.communicate(timeout=60)
    assert step.returncode == 0
    lines = out.splitlines()
    assert len(lines) == 3 * 201
    port = lines[0].split()[4]
    for rank in range(3):
        own = [line.removeprefix(f"{rank}: ") for line in lines if line.startswith(f"{rank}: ")]
        assert own == [f"{rank} 3 127.0.0.1 {port} {hostile}", *(f"line {line}" for line in range(200))]
    assert sorted(error.splitlines()) == ["0: no end", "1: no end", "2: no end"]


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((2, 2), 2), ((0, 138), 138)])
def test_the_highest_exit_code(codes, expected):
    step = start(2, f"import os, sys; sys.exit({codes}[int(os.environ['RANK'])])")
    step.communicate(timeout=60)
    assert step.returncode == expected


def test_one_killed_rank_ends_all_fast(tmp_path):
    step = start(3, READY + ANNOUNCE + "time.sleep(60)", tmp_path)
    numbers = ready(tmp_path, 3)
    began = time.monotonic()
    os.kill(numbers[1], signal.SIGKILL)
    step.communicate(timeout=30)
    assert step.returncode == 137 and time.monotonic() - began < 3
    assert all(ended(number) for number in numbers)


def test_others_are_asked_first_and_may_say_something(tmp_path):
    code = READY + "signal.signal(signal.SIGTERM, lambda *_: (print('bye', rank, flush=True), os._exit(200)))\n"
    code += ANNOUNCE + "while not (folder / 'go').exists(): time.sleep(0.02)\nif rank == '0': sys.exit(3)\ntime.sleep(60)"
    step = start(2, code, tmp_path)
    ready(tmp_path, 2)
    (tmp_path / "go").touch()
    out, _ = step.communicate(timeout=30)
    assert (step.returncode, out) == (3, "bye 1\n")  # what the asked ones answer does not count


def test_the_others_have_time_to_find_out_who_was_lost_and_to_finish_a_checkpoint():
    asked = [(["--ranks", "2", "--", "x"], 150.0), (["--ranks", "2", "--grace", "7", "--", "x"], 7.0)]
    for argv, grace in asked:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spawn, "end_with_parent", lambda number: None)
            patch.setattr(Step, "run", lambda step: step.grace)
            assert spawn.main(argv) == grace


def test_who_does_not_listen_is_killed(tmp_path):
    code = READY + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ANNOUNCE
    code += "while not (folder / 'go').exists(): time.sleep(0.02)\nif rank == '0': sys.exit(1)\ntime.sleep(60)"
    step = start(2, code, tmp_path, own=["--grace", "2"])
    numbers = ready(tmp_path, 2)
    (tmp_path / "go").touch()
    began = time.monotonic()
    step.communicate(timeout=40)
    assert step.returncode == 1 and 1.9 < time.monotonic() - began < 10
    assert ended(numbers[1])


@pytest.mark.parametrize("pass_on", [Step._forward, Step._signal_all])
def test_a_signal_to_one_that_has_just_ended(pass_on):
    """Its end is noticed after the signal, with its own exit code, however the two fall together."""
    step = Step(1, [], label=False)
    step.running[0] = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"], start_new_session=True)
    os.waitid(os.P_PID, step.running[0].pid, os.WEXITED | os.WNOWAIT)
    pass_on(step, signal.SIGUSR1)
    step._notice_ended()
    assert (step.codes, step.running) == ([7], {})


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"])
def test_signals_reach_all(tmp_path, name):
    code = READY + f"seen = []\nsignal.signal(signal.{name}, lambda number, _: seen.append(number))\n" + ANNOUNCE
    code += "while not seen: time.sleep(0.01)\nsay(rank, *seen)\n" + together(3) + "sys.exit(128 + seen[0])"
    step = start(3, code, tmp_path)
    ready(tmp_path, 3)
    number = int(getattr(signal, name))
    step.send_signal(number)
    out, _ = step.communicate(timeout=30)
    assert step.returncode == (128 + number) and sorted(out.splitlines()) == [f"{rank} {number}" for rank in range(3)]


def test_ctrl_c_in_a_terminal_comes_once(tmp_path):
    code = READY + "seen = []\nsignal.signal(signal.SIGINT, lambda *_: seen.append(1))\n" + ANNOUNCE
    code += "while not seen: time.sleep(0.02)\ntime.sleep(0.5); say(len(seen))\n" + together(2) + "sys.exit(130)"
    step = start(2, code, tmp_path, start_new_session=True)
    ready(tmp_path, 2)
    os.killpg(step.pid, signal.SIGINT)  # as a terminal does
    out, _ = step.communicate(timeout=30)
    assert (step.returncode, out) == (130, "1\n1\n")


@pytest.mark.parametrize("who", ["spawn", "its parent"])
def test_nobody_survives_the_parent(tmp_path, who):
    code = READY + ANNOUNCE + "time.sleep(60)"
    command = [sys.executable, "-m", "berth.launch.spawn", "--ranks", "2", "--", sys.executable, "-c", code, str(tmp_path)]
    if who == "its parent":
        command = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])", *command]
    step = subprocess.Popen(command, env=environment(), cwd=ROOT)
    numbers = ready(tmp_path, 2)
    step.kill()
    step.wait()
    assert all(ended(number) for number in numbers)


def test_a_grandchild_does_not_outlive_its_rank(tmp_path):
    code = (
        READY + "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\n(folder / 'child').write_text(str(child.pid))\nprint('made')"
    )
    step = start(1, code, tmp_path, label=True)
    out, _ = step.communicate(timeout=30)
    assert (step.returncode, out) == (0, "0: made\n")
    assert ended(int((tmp_path / "child").read_text()))


def test_mistakes():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "berth.launch.spawn", *arguments], capture_output=True, text=True, cwd=ROOT, env=environment()
        )

    missing = run("--ranks", "2", "--", "no such program")
    assert (missing.returncode, missing.stderr) == (
        1,
        "error: 'no such program' cannot be started: No such file or directory; is it on PATH?\n",
    )
    assert run("--ranks", "2").returncode == 2
    assert run("--ranks", "0", "--", "true").returncode == 2
    for grace in ("-1", "nan", "inf", "soon"):
        assert run("--ranks", "1", "--grace", grace, "--", "true").returncode == 2
    assert "SIGTERM" not in run("--help").stderr and run("--help").returncode == 0
