"""The test cluster itself: it runs jobs, stands beside others, ends with its owner and leaves nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.localslurm import LocalSlurm, SlurmError

SCRIPT = Path(__file__).with_name("localslurm.py")


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words:
            found.append(words)
    return found


def wait_until(condition, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_jobs_run_on_two_nodes(slurm):
    hosts = slurm.run("srun", "-N2", "-n4", "hostname").split()
    assert len(hosts) == 4
    if slurm.private:
        assert set(hosts) == {"n1", "n2"}
        addresses = slurm.run("srun", "-N1", "-n1", sys.executable, "-c", "import socket; print(socket.gethostbyname('n2'))")
        assert addresses.split() == ["127.0.10.2"]


def test_ends_of_jobs_are_known(slurm, tmp_path):
    job = slurm.run("sbatch", "--parsable", "--array=0-2", f"--output={tmp_path}/%a", "--wrap", "exit $SLURM_ARRAY_TASK_ID").strip()
    assert [(task.state, task.exit_code) for task in slurm.wait(job)] == [("COMPLETED", 0), ("FAILED", 1), ("FAILED", 2)]
    with pytest.raises(SlurmError, match="ended with"):
        slurm.run("scontrol", "show", "job", "999999")


def test_a_second_cluster_stands_beside_and_leaves_nothing(slurm, tmp_path):
    with LocalSlurm(nodes=1, cpus=4, gpus=2) as other:
        folder = other.folder
        assert other.run("srun", "--gres=gpu:2", "printenv", "CUDA_VISIBLE_DEVICES").split() == ["0,1"]
        assert other.run("sinfo", "--noheader", "--format=%D").split() == ["1"]
        assert slurm.run("sinfo", "--noheader", "--format=%D").split() == ["2"]
        other.run("sbatch", f"--output={tmp_path}/log", "--wrap", f"exec sleep 600 # {folder}")
        assert wait_until(lambda: other.run("squeue", "--noheader", "--states=RUNNING", "--format=%i").split())
    assert not folder.exists()
    assert wait_until(lambda: not processes_of(folder), 5), processes_of(folder)
    assert slurm.run("srun", "-n1", "echo", "still here").split() == ["still", "here"]


def test_a_killed_node_comes_back(slurm):
    slurm.wait_idle()
    slurm.kill_node("n1")
    slurm.start_node("n1")
    assert slurm.run("srun", "-w", "n1", "-n1", "echo", "back", timeout=100).split() == ["back"]


def test_everything_ends_when_the_owner_is_killed(slurm):
    with subprocess.Popen([sys.executable, str(SCRIPT), "--nodes", "1"], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        line = owner.stdout.readline()
        folder = Path(line.strip().split("=", 1)[1]).parent.parent
        assert folder.is_dir() and len(processes_of(folder)) >= 3, line
        os.kill(owner.pid, signal.SIGKILL)
    try:
        assert wait_until(lambda: not processes_of(folder), 10), processes_of(folder)
    finally:
        shutil.rmtree(folder)


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(slurm, monkeypatch):
    monkeypatch.setattr(LocalSlurm, "_configuration", lambda self: "ClusterName=local\nNoSuchKey=1\n")
    broken = LocalSlurm(nodes=1)
    with pytest.raises(SlurmError, match="did not start in .*(?s:.*)NoSuchKey"):
        broken.start()
    assert not broken.folder.exists() and not broken.daemons
