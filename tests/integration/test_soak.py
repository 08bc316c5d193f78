"""The short soak: every kind of fault of tests/soak.py once, in worlds of 1, 2 and 4 processes and between them."""

import re
import subprocess
import sys

import pytest

from tests.support import ROOT, environment


@pytest.mark.slow
def test_every_kind_of_fault_once(tmp_path):
    command = [sys.executable, ROOT / "tests" / "soak.py", "--faults", 15, "--seed", 3, "--steps", 24, "--workdir", tmp_path / "soak"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=500, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"^(?:kill -9|SIGTERM|hang).* (\d+)$", done.stdout, re.MULTILINE)
    assert counts == ["1"] * 15 and done.stdout.count("bitwise equal") == 3, done.stdout
