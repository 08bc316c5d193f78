"""The look at nodes before training, on CPUs: each check by itself, then ranks together."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from berth.errors import LaunchError
from berth.launch import preflight
from berth.launch.preflight import EXIT_BAD, data_problems, gpu_problems, host, output_problems
from tests.support import ROOT, environment


def run(ranks, report, *arguments, prefix=(), **variables):
    """``ranks`` preflights through spawn and rank; the finished process."""
    command = ["-m", "berth.launch.spawn", "--ranks", str(ranks), "--", *prefix, sys.executable, "-m", "berth.launch.preflight"]
    fixed = ["--device", "cpu", "--output", str(report.parent / "out"), "--report", str(report)]
    return subprocess.run(
        [sys.executable, *command, *fixed, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={**environment(), **variables},
    )  # fmt: skip


def found(report):
    return {path.name: path.read_text() for path in sorted(report.glob("*"))} if report.exists() else {}


def test_host():
    assert host({"SLURMD_NODENAME": "n3"}) == "n3"
    assert host({})


def test_data(tmp_path):
    folder = tmp_path / "the data"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_text("x")
    (folder / "b").write_text("")  # neither first nor last
    (folder / ".hidden").write_text("")
    single = tmp_path / "single"
    single.write_text("x")
    assert data_problems([str(folder), str(single)]) == []
    (folder / "c").write_text("")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "work" / "zz" / "deep").mkdir(parents=True)
    (tmp_path / "work" / "zz" / "deep" / "file").write_text("")
    assert data_problems([str(folder), str(empty), str(tmp_path / "none"), str(tmp_path / "work")]) == [
        f"data file {folder / 'c'} is empty",
        f"data folder {empty} holds no file",
        f"data {tmp_path / 'none'} cannot be read: No such file or directory",
        f"data file {tmp_path / 'work' / 'zz' / 'deep' / 'file'} is empty",
    ]


def test_output(tmp_path):
    folder = tmp_path / "new" / "folder"
    assert output_problems(str(folder), 0, "n1") == [] and list(folder.iterdir()) == []
    with pytest.raises(LaunchError, match="GB free, min_free_gb of the site profile asks for 1e[+]09; free space"):
        output_problems(str(folder), 1e9, "n1")
    file = tmp_path / "file"
    file.touch()
    assert output_problems(str(file / "below"), 0, "n1") == [f"output folder {file / 'below'} cannot be written: Not a directory"]


def test_gpus_that_are_not_there(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu_problems(8, 0) == ["torch sees 0 GPU(s), 8 are expected"]
    assert gpu_problems(0, 0) == ["torch sees 0 GPU(s), 0 are expected"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpu_problems(2, 2) == ["local rank 2 has no GPU of its own: torch sees 2"]

    def broken(*arguments, **options):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with ...")

    monkeypatch.setattr(torch, "ones", broken)
    assert gpu_problems(2, 1) == ["GPU 1: CUDA error: uncorrectable ECC error encountered"]


@pytest.mark.slow
def test_two_ranks_are_well(tmp_path):
    (tmp_path / "data").write_text("x")
    prefix = [sys.executable, "-m", "berth.launch.rank", "--ranks", "2", "--"]
    done = run(2, tmp_path / "report", "--backend", "gloo", "--data", tmp_path / "data", "--min_gb_s", "0.000001", prefix=prefix)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith("preflight: all-reduce of 8 MiB over 2 ranks (gloo): ")
    assert lines[1].startswith("preflight: 2 rank(s) are well, ") and found(tmp_path / "report") == {}


@pytest.mark.slow
def test_too_slow_together(tmp_path):
    done = run(2, tmp_path / "report", "--backend", "gloo", "--min_gb_s", "1e9")
    assert done.returncode == EXIT_BAD
    report = found(tmp_path / "report")
    assert list(report) == ["collective.bad"]
    assert "all-reduce over 2 ranks (gloo) reaches " in report["collective.bad"] and "--min_gb_s asks for 1e+09" in report["collective.bad"]


def test_a_bad_node_is_named_and_nobody_waits_for_it(tmp_path):
    """Rank 1's node (SLURMD_NODENAME and its first local rank are made up) has no data; rank 0 waits in the all-reduce."""
    script = "import os, sys; r = os.environ['RANK']; os.environ.update(SLURMD_NODENAME=f'n{r}', LOCAL_RANK='0', LOCAL_WORLD_SIZE='1')\n"
    script += "os.execv(sys.executable, [sys.executable, *sys.argv[1:], *(['--data', 'no such file'] if r == '1' else [])])"
    command = ["-c", script, "-m", "berth.launch.preflight", "--backend", "gloo", "--device", "cpu", "--output", str(tmp_path / "out")]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "berth.launch.spawn", "--ranks", "2", "--", sys.executable, *command, "--report", str(tmp_path / "report")],
        capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60,
    )  # fmt: skip
    assert done.returncode == EXIT_BAD and time.monotonic() - began < 20
    assert found(tmp_path / "report") == {"n1.bad": "data no such file cannot be read: No such file or directory\n"}
    assert done.stderr == "preflight: n1: data no such file cannot be read: No such file or directory\n"


def alone(report, code, **variables):
    """One rank of a world of two whose other rank does not come: the collective can only time out."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    arguments = ["--backend", "gloo", "--device", "cpu", "--output", str(report.parent), "--report", str(report), "--timeout_s", "0.5"]
    program = f"import time; from berth.launch import preflight\n{code}\npreflight.main({arguments!r})"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60,
        env={**environment(), **place, "SLURMD_NODENAME": "n0", **variables},
    )  # fmt: skip


def test_waiting_ends(tmp_path):
    report = tmp_path / "report"
    slow = "preflight.collective_problems = lambda *_: time.sleep(60)"
    assert alone(report, slow).returncode == EXIT_BAD
    assert found(report) == {"collective.bad": "rank 0: the all-reduce over 2 ranks (gloo) did not end in 0.5 s\n"}
    (report / "collective.bad").unlink()
    (report / "n1.bad").write_text("its reason\n")
    done = alone(report, slow)  # the other rank has said why it does not come
    assert (done.returncode, found(report)) == (EXIT_BAD, {"n1.bad": "its reason\n"})
    assert done.stderr == "preflight: n0, rank 0: ends because of another node\n"
    (report / "n1.bad").unlink()
    assert alone(report, "preflight.data_problems = lambda *_: time.sleep(60)").returncode == EXIT_BAD
    assert found(report) == {"n0.bad": "rank 0: reading the data did not end in 0.5 s\n"}


def test_wrong_sums(tmp_path, monkeypatch):
    import torch.distributed as dist

    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "all_reduce", lambda data, **_: data[5:7].add_(1.0))
    problems = preflight.collective_problems(preflight.Place(0, 1, 0, 1, 0, "test"), "gloo", "cpu", 1.0, None)
    assert problems == [f"rank 0: 2 of {2 << 20} sums of the all-reduce (gloo) are wrong"]


def test_wrong_options(tmp_path):
    for wrong in (["--backend", "nccl"], ["--backend", "mpi"], ["--backend", "none", "--timeout_s", "0"]):
        with pytest.raises(SystemExit) as caught:
            preflight.main([*wrong, "--device", "cpu", "--output", str(tmp_path), "--report", str(tmp_path)])
        assert caught.value.code == 2


def test_no_collective_on_cpus_needs_no_torch(tmp_path):
    done = run(1, tmp_path / "report", "--backend", "none", prefix=["env", "PYTHONPROFILEIMPORTTIME=1"])
    assert done.returncode == 0 and "preflight: 1 rank(s) are well" in done.stdout
    assert "argparse" in done.stderr and "torch" not in done.stderr
