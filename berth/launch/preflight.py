"""A look at every node before training burns hours on it: GPUs, data, output folder, and one all-reduce over all ranks.

    srun ... python -m berth.launch.rank --ranks N -- python -m berth.launch.preflight --backend nccl --device cuda --expect_gpus 8
        --data FOLDER ... --output DIR --min_free_gb 50 --report DIR

Exit 0, or 75 with the reason in a file of ``--report`` (an empty folder for each attempt): ``<host>.bad`` names a node to leave out,
``collective.bad`` says that each node is well by itself and together they are not. A bad rank leaves at once, and srun's
``--kill-on-bad-exit`` ends the others, who would wait for it in the all-reduce. A check that hangs (dead file system, stuck driver) is
ended by a timer: nothing here waits longer than ``--timeout_s``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from berth.errors import LaunchError, run_main
from berth.launch.rank import Place, discover

EXIT_BAD = 75  # EX_TEMPFAIL: the same job may go well on other nodes
COLLECTIVE = "collective.bad"
SUFFIX = ".bad"
_MATRIX = 256
_REDUCE_BYTES = {"nccl": 256 << 20, "gloo": 8 << 20}
_REPEATS = 5


def host(environment: Mapping[str, str]) -> str:
    """This node's name as Slurm knows it (to exclude it), else its own."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def gpu_problems(expected: int, local_rank: int) -> list[str]:
    """What is wrong with the GPUs: fewer than ``expected`` visible, or a product of matrices of ones on this rank's that is wrong."""
    import torch

    count = torch.cuda.device_count()
    if count < expected or not count:
        return [f"torch sees {count} GPU(s), {expected} are expected"]
    index = 0 if count == 1 else local_rank  # as training chooses
    if index >= count:
        return [f"local rank {local_rank} has no GPU of its own: torch sees {count}"]
    try:
        ones = torch.ones(_MATRIX, _MATRIX, device=torch.device("cuda", index))
        wrong = int((ones @ ones != _MATRIX).sum().item())
    except RuntimeError as error:  # torch's own errors derive from it: no memory, ECC, driver
        return [f"GPU {local_rank}: {_first_line(error)}"]
    return [f"GPU {local_rank}: {wrong} of {_MATRIX**2} sums of {_MATRIX} ones are wrong"] if wrong else []


def data_problems(paths: Sequence[str]) -> list[str]:
    """Inputs that cannot be read: the first bytes of each file, and of the first and last file (by name) of each folder."""
    problems = []
    for path in paths:
        try:
            files = _first_and_last(path) if os.path.isdir(path) else [path]
            if not files:
                problems.append(f"data folder {path} holds no file")
            for file in files:
                with open(file, "rb") as handle:
                    if not handle.read(4096):
                        problems.append(f"data file {file} is empty")
        except OSError as error:
            problems.append(f"data {error.filename or path} cannot be read: {error.strerror}")
    return problems


def _first_and_last(folder: str) -> list[str]:
    """The first and last file of a folder; of its first and last subfolder where it holds only folders (a work folder)."""
    entries = sorted((entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=lambda entry: entry.name)
    files = [entry.path for entry in entries if entry.is_file()]
    if not files:
        below = [entry.path for entry in entries if entry.is_dir()]
        files = [file for path in dict.fromkeys(below[:1] + below[-1:]) for file in _first_and_last(path)]
    return list(dict.fromkeys(files[:1] + files[-1:]))


def output_problems(folder: str, min_free_gb: float, name: str) -> list[str]:
    """Whether ``folder`` (made if need be) takes a file, called ``name`` for a moment.

    Raises :class:`LaunchError` when less than ``min_free_gb`` (10**9 bytes) are left: the folder is shared, so no node is to blame.
    """
    probe = Path(folder) / f".preflight.{name}.{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "wb") as handle:
                handle.write(bytes(4096))
                os.fsync(handle.fileno())
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return [f"output folder {folder} cannot be written: {error.strerror}"]
    if free < min_free_gb:
        raise LaunchError(
            f"output folder {folder} has {free:.1f} GB free, min_free_gb of the site profile asks for {min_free_gb:g}; free space or choose another"
        )
    return []


def collective_problems(place: Place, backend: str, device: str, timeout_s: float, min_gb_s: float | None) -> list[str]:
    """All-reduce over all ranks: the right sum, then its speed, which rank 0 prints.

    Bus bandwidth is 2 (n - 1) / n x bytes / time, so that it does not depend on n (nccl-tests, PERFORMANCE.md).
    """
    import datetime

    import torch
    import torch.distributed as dist

    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", 0 if torch.cuda.device_count() == 1 else place.local_rank)
        torch.cuda.set_device(where)
    world = place.world_size
    try:
        # longer than the timer of main, which knows what to report; NCCL's own would only abort
        dist.init_process_group(backend, rank=place.rank, world_size=world, timeout=datetime.timedelta(seconds=2 * timeout_s + 60))
        data = torch.full((_REDUCE_BYTES[backend] // 4,), float(place.rank + 1), device=where)
        dist.all_reduce(data)
        wrong = int((data != world * (world + 1) / 2).sum().item())
        if wrong:
            return [f"rank {place.rank}: {wrong} of {data.numel()} sums of the all-reduce ({backend}) are wrong"]
        data.zero_()
        dist.barrier()
        start = time.perf_counter()
        for _ in range(_REPEATS):
            dist.all_reduce(data)
        float(data[0].item())  # waits for the device
        seconds = (time.perf_counter() - start) / _REPEATS
        speed = 2 * (world - 1) / world * data.numel() * 4 / seconds / 1e9
        slowest = torch.tensor([speed], dtype=torch.float64, device=where)
        dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
        dist.destroy_process_group()
    except RuntimeError as error:  # DistBackendError, DistNetworkError, CUDA errors: all derive from it
        return [f"rank {place.rank}: all-reduce over {world} ranks ({backend}) failed: {_first_line(error)}"]
    speed = float(slowest.item())
    if place.rank == 0:
        print(f"preflight: all-reduce of {data.numel() * 4 / 2**20:.0f} MiB over {world} ranks ({backend}): {speed:.2f} GB/s bus bandwidth")
    if min_gb_s is not None and world > 1 and speed < min_gb_s:
        return [f"all-reduce over {world} ranks ({backend}) reaches {speed:.2f} GB/s bus bandwidth, --min_gb_s asks for {min_gb_s:g}"]
    return []


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Verdict:
    """Writes what is bad into the report folder, and leaves."""

    def __init__(self, report: str, name: str, rank: int) -> None:
        self.folder, self.name, self.rank = Path(report), name, rank
        self.lock = threading.Lock()  # between the checks and their timer

    def bad(self, problems: Sequence[str], together: bool) -> None:
        """Exit 75 at once, with ``problems`` in ``<host>.bad``, or ``collective.bad`` (``together``) unless a node took the blame already."""
        with self.lock:
            file = COLLECTIVE if together else f"{self.name}{SUFFIX}"
            if together and self._blamed():
                print(f"preflight: {self.name}, rank {self.rank}: ends because of another node", file=sys.stderr)
            else:
                # one write, to the end of the file: several ranks of a node may have reasons
                text = "".join(f"{problem}\n" for problem in problems)
                print("".join(f"preflight: {self.name}: {problem}\n" for problem in problems), end="", file=sys.stderr)
                with contextlib.suppress(OSError):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    with open(self.folder / file, "ab", buffering=0) as handle:
                        handle.write(text.encode("utf-8", "backslashreplace"))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_BAD)  # no teardown: it would wait for the ranks that are gone

    def _blamed(self) -> bool:
        return any(path.name != COLLECTIVE for path in self.folder.glob(f"*{SUFFIX}"))

    @contextlib.contextmanager
    def within(self, seconds: float, what: str, together: bool) -> Iterator[None]:
        """The body must end in ``seconds``, or the process ends as bad."""
        timer = threading.Timer(seconds, self.bad, ([f"rank {self.rank}: {what} did not end in {seconds:g} s"], together))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def local_checks(options: argparse.Namespace, place: Place, name: str) -> list[tuple[str, Callable[[], list[str]]]]:
    """What this rank looks at, by name: its GPU, and for the first rank of a node the folders."""
    checks: list[tuple[str, Callable[[], list[str]]]] = []
    if options.device == "cuda":
        checks.append(("the look at the GPUs", lambda: gpu_problems(options.expect_gpus, place.local_rank)))
    if place.local_rank == 0:
        checks.append(("reading the data", lambda: data_problems(options.data)))
        checks.append(("writing to the output folder", lambda: output_problems(options.output, options.min_free_gb, name)))
    return checks


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m berth.launch.preflight", description="Check this node and its connections.")
    parser.add_argument("--backend", choices=("nccl", "gloo", "none"), required=True, help="of the all-reduce; none leaves it out")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--expect_gpus", type=int, default=1, metavar="N", help="GPUs each rank must see (default 1)")
    parser.add_argument("--data", nargs="*", default=[], metavar="PATH", help="files and folders that must be readable")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder that must be writable")
    parser.add_argument("--min_free_gb", type=float, default=0.0, metavar="X", help="space it must have, 10**9 bytes (default 0)")
    parser.add_argument("--min_gb_s", type=float, metavar="X", help="bus bandwidth the all-reduce must reach, 10**9 bytes a second")
    parser.add_argument("--report", required=True, metavar="DIR", help="shared folder for <host>.bad and collective.bad")
    parser.add_argument("--timeout_s", type=float, default=300.0, metavar="S", help="longest time for each check (default 300)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see the module."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.timeout_s <= 0:
        parser.error(f"--timeout_s {options.timeout_s:g} must be above 0")
    if options.backend == "nccl" and options.device == "cpu":
        parser.error("--backend nccl needs --device cuda; on CPUs choose gloo")
    start, place, name = time.perf_counter(), discover(os.environ), host(os.environ)
    verdict = Verdict(options.report, name, place.rank)
    problems: list[str] = []
    for what, check in local_checks(options, place, name):
        with verdict.within(options.timeout_s, what, together=False):
            problems += check()
    if problems:
        verdict.bad(problems, together=False)
    if options.backend != "none" and place.world_size > 1:
        if not os.environ.get("MASTER_ADDR"):
            raise LaunchError("MASTER_ADDR and MASTER_PORT are not set; start the check through python -m berth.launch.rank")
        with verdict.within(options.timeout_s, f"the all-reduce over {place.world_size} ranks ({options.backend})", together=True):
            problems = collective_problems(place, options.backend, options.device, options.timeout_s, options.min_gb_s)
        if problems:
            verdict.bad(problems, together=True)
    if place.rank == 0:
        print(f"preflight: {place.world_size} rank(s) are well, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run_main(main)
