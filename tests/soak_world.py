"""What tests/soak.py does to a run: kinds of faults, worlds of processes that are struck, checkpoints that are damaged and looked at.

Importing it imports torch and run_pretraining.py, so that a rank can be forked from the process that does; it must have no threads by then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  the first optimizer imports it otherwise: a second for every rank

import run_pretraining
from berth.errors import run_main
from berth.processes import end_with_parent
from berth.runlog import PREFIX
from tests.support import ROOT, environment

EVERY = 3  # steps between checkpoints
LEAVE_SECONDS = 60.0  # how long the others may take to leave after one rank is gone


@dataclasses.dataclass(frozen=True)
class Kind:
    """A fault: which signal, to ``one`` rank, to rank 0 (``main``) or to ``all``, at which moment; what is damaged before the next start."""

    who: str
    how: signal.Signals
    when: str
    damage: str = ""

    def __str__(self) -> str:
        words = {signal.SIGKILL: "kill -9", signal.SIGTERM: "SIGTERM", signal.SIGSTOP: "hang"}[self.how]
        return f"{words} {self.who}, {self.when}" + (f", {self.damage}" if self.damage else "")

    @property
    def leaves_others(self) -> bool:
        """Whether it is about ranks that stay behind, so that a world of one is no place for it."""
        return self.who != "all" and self.how != TERM


KILL, TERM, HANG = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP
KINDS = (
    *(Kind(who, KILL, when) for who in ("one", "all") for when in ("start", "step")),
    *(Kind(who, KILL, when) for who in ("main", "all") for when in ("writing", "renamed")),
    Kind("one", TERM, "step"),
    Kind("one", HANG, "step"),
    *(Kind("all", KILL, "step", f"checkpoint {how}") for how in ("truncated", "flipped", "deleted")),
    *(Kind("all", KILL, "step", f"manifest {how}") for how in ("truncated", "deleted")),
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """One drawn fault: ``steps`` to make before it, ``fraction`` of the moment's length to wait then, ``draw`` for the rest."""

    kind: Kind
    steps: int
    fraction: float
    draw: int


def draw_faults(count: int, rng: random.Random) -> list[Fault]:
    """``count`` faults; every kind once before any kind comes again."""
    deck: list[Kind] = []
    while len(deck) < count:
        deck += rng.sample(KINDS, len(KINDS))
    return [Fault(kind, rng.randint(1, 3 * EVERY), rng.random(), rng.getrandbits(32)) for kind in deck[:count]]


def deal(faults: list[Fault], lines: dict[str, tuple[int, ...]]) -> dict[str, list[Fault]]:
    """A fifth of the faults to every line of one world, the rest to the line of all; a world of one gets no fault that needs others."""
    left, dealt = list(faults), {}
    for name, worlds in lines.items():
        fitting = [fault for fault in left if worlds != (1,) or not fault.kind.leaves_others]
        dealt[name] = fitting[: round(len(faults) / 5)] if len(worlds) == 1 else fitting
        left = [fault for fault in left if fault not in dealt[name]]
    return dealt


class Forked:
    """A rank forked from this process, with the few words of ``subprocess.Popen`` that are used here."""

    def __init__(self, words: list[str], variables: dict[str, str], console: Path) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            be_rank(words, variables, console)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def be_rank(words: list[str], variables: dict[str, str], console: Path) -> None:
    """In the child: become the script, leave with its exit code, never return."""
    code: Any = 1
    try:
        end_with_parent(signal.SIGKILL)
        output = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(variables)
        sys.argv = ["run_pretraining.py", *words]
        run_main(run_pretraining.main)
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def execute(words: list[str], variables: dict[str, str], console: Path) -> subprocess.Popen[bytes]:
    """A rank as a process of its own."""
    with open(console, "wb") as output:
        command = [sys.executable, str(ROOT / "run_pretraining.py"), *words]
        return subprocess.Popen(command, stdout=output, stderr=output, env={**environment(), **variables})


def wait_until(condition: Callable[[], object], ranks: list[Any], pause: float = 0.001) -> None:
    """Until ``condition`` holds, or a rank has ended."""
    while all(rank.poll() is None for rank in ranks) and not condition():
        time.sleep(pause)


def wait_for_end(ranks: list[Any], seconds: float) -> list[int | None]:
    """The exit codes, ``None`` for a rank that is still there after ``seconds``."""
    end = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
        time.sleep(0.005)
    return [rank.returncode for rank in ranks]


class Tail:
    """The records that an attempt adds to the run log."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, path.stat().st_size if path.exists() else 0
        self.start: int | None = None
        self.steps: dict[int, dict[str, Any]] = {}
        self.order: list[int] = []

    def read(self) -> int:
        """Take in what is new; the last step so far, -1 before the first."""
        if self.path.exists():
            with open(self.path, "rb") as handle:
                handle.seek(self.offset)
                lines = handle.read().splitlines(keepends=True)
            for line in lines:
                if line.endswith(b"\n"):
                    self.offset += len(line)
                    self._take(line.decode(errors="replace"))
        return self.order[-1] if self.order else -1

    def _take(self, line: str) -> None:
        record = json.loads(line[len(PREFIX) :]) if line.startswith(PREFIX) else {}
        data = record.get("data", {})
        if record.get("step") == "PARAMETER" and data.get("train_start"):
            self.start = int(data["global_step"])
        elif "average_loss" in data:
            self.order.append(int(record["step"][1]))
            self.steps[self.order[-1]] = data


def checkpoint_names(folder: Path) -> list[str]:
    """``ckpt_<step>.pt`` in ``folder``, oldest first."""
    return sorted((path.name for path in folder.glob("ckpt_*.pt")), key=step_of)


def step_of(name: str) -> int:
    return int(name.removeprefix("ckpt_").removesuffix(".pt"))


def manifest_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of every file; nothing when it is damaged."""
    try:
        return {item["file"]: item for item in json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["checkpoints"]}
    except (OSError, ValueError):
        return {}


def good_checkpoints(folder: Path) -> list[str]:
    """The whole ones, oldest first, found without the code under test: SHA-256 of the manifest, or the archive's own checksums."""
    listed = manifest_entries(folder)
    return [name for name in checkpoint_names(folder) if is_whole(folder / name, listed.get(name, {}).get("sha256", ""))]


def is_whole(path: Path, digest: str) -> bool:
    if digest:
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # a flipped bit may be in any field of the archive
        return False


def damage(folder: Path, what: str, draw: int) -> str:
    """Damage the newest good checkpoint or the manifest; what was done, in words. The last good checkpoint is left alone."""
    subject, how = what.split()
    good = good_checkpoints(folder)
    if subject == "checkpoint" and len(good) < 2:
        return "no second checkpoint, so not damaged"
    path = folder / (good[-1] if subject == "checkpoint" else "manifest.json")
    if not path.exists():
        return "no manifest yet"
    data = bytearray(path.read_bytes())
    at = draw % len(data)
    if how == "deleted":
        path.unlink()
        return f"{path.name} deleted"
    if how == "flipped":
        data[at] ^= 1 << draw % 8
        path.write_bytes(data)
        return f"{path.name}: bit {draw % 8} of byte {at} flipped"
    path.write_bytes(data[:at])
    return f"{path.name} cut to {at} of {len(data)} bytes"


@dataclasses.dataclass
class Attempt:
    """One start of a world and what came of it."""

    number: int
    world: int
    start: int
    ranks: list[Any]
    consoles: list[Path]
    tail: Tail
    victims: list[int] = dataclasses.field(default_factory=list)
    left_after: float = 0.0

    @property
    def codes(self) -> list[int | None]:
        return [rank.poll() for rank in self.ranks]

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.world) if rank not in self.victims]

    def strike(self, fault: Fault, folder: Path, last_step: int, boot: float, step_seconds: float) -> None:
        """Wait for the fault's moment, send the signal and see the others leave; no victims when the run had ended by then."""
        kind = fault.kind
        if kind.when == "start":
            time.sleep(fault.fraction * boot)
        else:
            target = min(self.start + fault.steps, last_step)
            wait_until(lambda: self.tail.read() >= target, self.ranks)
        if kind.when == "step":
            time.sleep(fault.fraction * step_seconds)
        elif kind.when == "writing":
            wait_until(lambda: any(folder.glob(".ckpt_*.partial")), self.ranks, 0.0002)
            time.sleep(fault.fraction * 0.01)
        elif kind.when == "renamed":
            known = set(checkpoint_names(folder))
            wait_until(lambda: set(checkpoint_names(folder)) - known, self.ranks, 0.0002)
            time.sleep(fault.fraction * 0.003)
        if any(code is not None for code in self.codes):
            return
        self.victims = {"one": [fault.draw % self.world], "main": [0], "all": list(range(self.world))}[kind.who]
        struck_at = time.monotonic()
        for rank in self.victims:
            self.ranks[rank].send_signal(kind.how)
        waited_for = self.ranks if kind.how == TERM else [self.ranks[rank] for rank in self.others]
        wait_for_end(waited_for, LEAVE_SECONDS)
        self.left_after = time.monotonic() - struck_at

    def finish(self) -> None:
        """Nothing of this attempt goes on: the hung, and whoever did not leave, are killed."""
        for rank in self.ranks:
            rank.send_signal(KILL)
        wait_for_end(self.ranks, 60)
        self.tail.read()
