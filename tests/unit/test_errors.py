"""How an entry point ends: exit codes, one line for people, one for the launcher."""

import subprocess
import sys

import pytest

from tests.support import ROOT, environment

CASES = {
    "ConfigError('a\\n  b')": (2, "error: a\n  b\n", "2 a b\n"),
    "TrainingError('diverged')": (1, "error: diverged\n", "1 diverged\n"),
    "JoinError('no rank 3')": (75, "error: no rank 3\n", None),  # another try may help: no reason to end the job
    "LostRankError('rank 3')": (76, "error: rank 3\n", None),
    "OSError(28, 'No space left on device', 'x.pt')": (1, "error: No space left on device (x.pt)\n", "1 No space left on device (x.pt)\n"),
}


def run(tmp_path, program):
    program = f"from berth.errors import *\nfrom berth.errors import JoinError, LostRankError\ndef main():\n    {program}\nrun_main(main)"
    variables = {**environment(), "BERTH_FAILURES": str(tmp_path / "failures")}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=variables, cwd=ROOT)


@pytest.mark.parametrize("error", CASES)
def test_exit_codes_and_messages(tmp_path, error):
    code, said, noted = CASES[error]
    done = run(tmp_path, f"raise {error}")
    assert (done.returncode, done.stderr) == (code, said)
    failures = tmp_path / "failures"
    assert (failures.read_text() if failures.exists() else None) == noted


def test_a_bug_keeps_its_traceback_and_is_no_reason(tmp_path):
    done = run(tmp_path, "raise KeyError('x')")
    assert done.returncode == 1 and "Traceback" in done.stderr and not (tmp_path / "failures").exists()


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    command = "-c 'from berth.errors import run_main; run_main(lambda: print(\"x\\n\" * 10**6))' | head -n 1"
    done = subprocess.run(["bash", "-c", f"{sys.executable} {command}"], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("x\n", "")
