"""A world's collectives give what they should, also with a late rank or a wrong one. Places: tests/unit/test_ranks.py."""

from __future__ import annotations

import datetime
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from berth.errors import JoinError, LaunchError, LostRankError
from berth.launch.spawn import free_port
from berth.ranks import discover
from berth.training import distributed, watchdog
from berth.training.distributed import UNKNOWN, Communicator, Place, Rank, choose_device, discover_rank
from tests.support import ROOT, environment

SECOND = datetime.timedelta(seconds=1)
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # the constructor exports them

# What a rank of the worlds below does; argv: a folder, the seconds it starts late, the timeout, what it claims to have of the data.
PROGRAM = """
import datetime, json, os, sys, time
from pathlib import Path
time.sleep(float(sys.argv[2]))
import torch
from berth.errors import run_main
from berth.ranks import discover
from berth.training import distributed, meeting
from berth.training.agreement import check_start
meeting._WORD_SECONDS = 0.5
folder, timeout, claim = Path(sys.argv[1]), float(sys.argv[3]), sys.argv[4]

def main():
    c = distributed.Communicator(discover(os.environ), torch.device("cpu"), datetime.timedelta(seconds=timeout))
    rank = c.rank
    tensor = torch.tensor([1.5, float(rank)])
    beats = c.new_store(datetime.timedelta(seconds=5))
    beats.set(f"hello {rank}", str(rank))
    c.barrier()
    found = {
        "hosts": c.hosts, "backend": c.backend, "pid": os.getpid(), "main": c.is_main, "beat": beats.get("hello 1").decode(),
        "sum": c.sum([rank + 1, 2.0 ** 52]), "max": c.max([rank, -rank]), "broadcast": c.broadcast_ints([rank + 7, 2**62 + rank]),
        "floats": c.gather_floats([rank, rank / 3]), "texts": c.gather_texts("é" * rank), "no floats": c.gather_floats([]),
        "sum_": c.sum_(tensor).tolist(), "in place": tensor.tolist(), "variables": {n: os.environ[n] for n in ("RANK", "WORLD_SIZE", "MASTER_PORT", *distributed._NCCL)},
    }
    (folder / str(rank)).write_text(json.dumps(found))
    try:
        check_start(c, {"torch": torch.__version__, "training records": claim})
    except distributed.LaunchError as error:
        c.barrier()
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

run_main(main)
"""


def start(
    folder, rank: int, size: int, port: int, late: float = 0.0, timeout: float = 60.0, claim: str = "a" * 64
) -> subprocess.Popen[str]:
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(late), str(timeout), claim], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**environment(), **{name: str(value) for name, value in place.items()}, "TORCH_CPP_LOG_LEVEL": "FATAL", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "33"},
    )  # fmt: skip


def ends(processes) -> list[tuple[int, str]]:
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.mark.slow
def test_a_world_of_three_with_a_late_rank_and_another_data_folder(tmp_path):
    """Rank 2 comes seconds after the others, which wait and say so; all collectives; rank 1 has other records, and all are told."""
    port = free_port()
    claims = ["a" * 64, "b" * 64, "a" * 64]
    found = ends([start(tmp_path, rank, 3, port, late=4.0 * (rank == 2), claim=claims[rank]) for rank in range(3)])
    results = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    hosts = [os.uname().nodename] * 3
    for rank, result in enumerate(results):
        assert result == {
            "hosts": hosts, "backend": "gloo", "pid": result["pid"], "main": rank == 0, "beat": "1",
            "sum": [6.0, 3 * 2.0**52], "max": [2.0, 0.0], "broadcast": [7, 2**62],
            "floats": [[0.0, 0.0], [1.0, 1 / 3], [2.0, 2 / 3]], "texts": ["", "é", "éé"], "no floats": [[], [], []],
            "sum_": [4.5, 3.0], "in place": [4.5, 3.0], "variables": {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_PORT": str(port), "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
                "TORCH_NCCL_ENABLE_MONITORING": "1", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "33"},
        }  # fmt: skip
    assert "rank 2 of 3 has not come yet, waiting" in found[0][1]
    line = f"  training records: bbbbbbbbbbbb... on rank 1 ({hosts[0]}), but aaaaaaaaaaaa... on ranks 0 and 2 ({hosts[0]}); --input_dir must hold the same"
    for code, errors in found:
        assert code == 1 and line in errors


def test_a_port_that_is_taken(monkeypatch):
    for name in (*PLACE, *distributed._NCCL):
        monkeypatch.setenv(name, "1")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(
            JoinError, match=r"rank 0 on .* could not join the group of 2 ranks at 127.0.0.1:\d+: .*(in use|failed to listen)"
        ):
            Communicator(Place(0, 2, 0, "torchrun"), torch.device("cpu"), SECOND)


def test_single_process_collectives_return_at_once():
    alone = Communicator(Rank(), torch.device("cpu"), SECOND)
    tensor = torch.ones(2)
    assert alone.sum([1, 2.5]) == alone.max([1, 2.5]) == [1.0, 2.5] and alone.broadcast_ints([4]) == [4] and alone.is_main
    assert alone.gather_floats([1]) == [[1.0]] and alone.gather_texts("x") == ["x"] and alone.sum_(tensor) is tensor
    assert alone.hosts == [os.uname().nodename] and alone.store is None and alone.backend == "none"
    alone.barrier()
    alone.close()


def test_the_training_code_finds_ranks_where_they_always_were():
    assert Rank is Place and discover_rank is discover and discover_rank({}) == Rank(local_world_size=1) and UNKNOWN == -1


def test_a_collective_gives_up_after_the_watchdog(monkeypatch):
    """NCCL gives up by aborting: the watchdog's patience, some heartbeats and a checkpoint's end must be over before."""
    given: list[datetime.timedelta] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.append(options["timeout"]))
    for name in (*PLACE, *distributed._NCCL):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(distributed, "open_store", lambda *_: dist.HashStore())
    monkeypatch.setattr(distributed, "meet", lambda *_: ["n01", "n02"])
    Communicator(Place(0, 2, 0, "torchrun"), torch.device("cpu"), datetime.timedelta(minutes=30))
    most = watchdog._FINISH_SECONDS + 6 * watchdog._LONGEST_INTERVAL
    assert [timeout.total_seconds() > 1800 + most for timeout in given] == [True]


def test_no_address_is_explained(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    with pytest.raises(LaunchError, match="Slurm started 2 ranks, but MASTER_ADDR and MASTER_PORT are not set"):
        Communicator(Rank(0, 2, 0, "Slurm"), torch.device("cpu"), SECOND)


def test_what_is_a_lost_connection(monkeypatch):
    alone = Communicator(Rank(), torch.device("cpu"), SECOND)
    broken = RuntimeError("[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4\nmore")
    assert alone.failure(broken) is None
    alone.world_size = 2
    found = alone.failure(broken)
    assert isinstance(found, LostRankError) and found.exit_code == 76 and str(found).endswith("Connection closed by peer [127.0.0.1]:4")
    assert alone.failure(torch.distributed.DistBackendError("unhandled system error")) is not None
    for other in (RuntimeError("shapes do not match"), ValueError("gloo"), KeyError("NCCL"), torch.OutOfMemoryError("CUDA out of memory")):
        assert alone.failure(other) is None


def test_demanding_a_gpu_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert choose_device(None, Rank()).type == "cpu"
    with pytest.raises(LaunchError, match="--device cpu"):
        choose_device("cuda", Rank())


@pytest.mark.parametrize(
    ("visible", "place", "index"), [(8, Rank(11, 16, 3, "Slurm"), 3), (1, Rank(3, 8, 3, "Slurm"), 0), (8, Rank(11, 16, UNKNOWN), 3)]
)
def test_which_gpu(monkeypatch, visible, place, index):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert choose_device(None, place) == torch.device("cuda", index) and taken == [index]
    with pytest.raises(LaunchError, match="local rank 8 has no GPU of its own: torch sees 2"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        choose_device("cuda", Rank(8, 16, 8, "Slurm"))
