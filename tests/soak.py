#!/usr/bin/env python3
"""Train a tiny model while processes are killed, stopped and hung and checkpoints damaged, and prove that nothing was lost.

    python tests/soak.py --faults 200 --seed 1        # about ten minutes on two cores; one line a fault, then a table

Scenario A, worlds of 1, 2 and 4 processes, dropout on: whatever struck, the end is bitwise the uninterrupted run's of the same world: weights,
moments, and loss, gradient norm, learning rate and data of every step of every attempt. Scenario B: every attempt has another number of
processes, another accumulation and another number of data workers; every step reads the data of the uninterrupted run, and the end is close
to it (without dropout, whose masks belong to a rank). After every attempt: it began at the newest good checkpoint and lost no more steps
than lie between two checkpoints, none if it was asked to stop; ranks that lost another one left soon and named it. After every lap:
checkpoints verify, no temporary file is left, no more checkpoints than are to be kept.

A lap is one run from step 0 to its end; when it ends before the faults are used up, the next lap begins in a new folder. What strikes, in
which world and at which step follows from --seed; the very moment does not. A fault that comes after the run has ended is not counted and
strikes the next lap.

Ranks are forked from this process, which has torch imported: a start costs a tenth of a second. A forked process is killed like any other;
--exec starts real ones instead. Linux and macOS. Nothing is written outside --workdir; exit code 1, and the folder is kept, when something differs.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from berth.runlog import read_steps
from tests.soak_world import (
    EVERY,
    KINDS,
    LEAVE_SECONDS,
    TERM,
    Attempt,
    Fault,
    Forked,
    Kind,
    Tail,
    checkpoint_names,
    damage,
    deal,
    draw_faults,
    execute,
    good_checkpoints,
    manifest_entries,
    step_of,
    wait_for_end,
    wait_until,
)
from tests.support import free_port, make_project, pretraining_arguments

GLOBAL_BATCH, KEEP = 16, 3
CLOSE = 1e-4
MOST_PROBLEMS = 10
JOIN, LOST = 75, 76  # exit codes of ranks that did not find, or have lost, another
DATA_KEYS = ("first_sample", "batch_crc32")
KEYS = ("average_loss", "grad_norm", "learning_rate", *DATA_KEYS)


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Where two payloads are not bitwise the same."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield where
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from differences(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{where}/{number}")
    elif isinstance(one, dict) and isinstance(other, dict):
        yield f"{where} (keys {sorted(map(str, one.keys() ^ other.keys()))})"
    elif one != other:
        yield f"{where} ({str(one)[:60]} and {str(other)[:60]})"


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of two sets of tensors of the same names."""
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one) if one.keys() == other.keys() else math.inf


class Line:
    """One scenario: its reference run, its laps, and what they showed."""

    def __init__(self, name: str, worlds: tuple[int, ...], faults: list[Fault], options: argparse.Namespace, folder: Path) -> None:
        self.name, self.worlds, self.faults, self.options = name, worlds, faults, options
        self.exact = len(worlds) == 1
        self.rng = random.Random(f"{options.seed} {name}")
        dropout = 0.1 if self.exact else 0.0
        self.project = make_project(folder / name, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        (self.project / "consoles").mkdir()
        self.problems: list[str] = []
        self.struck: collections.Counter[str] = collections.Counter()
        self.laps = self.attempts = self.steps_made = 0
        self.world = worlds[0] if self.exact else 0
        self.idle = False  # whether the last attempt found nothing to do
        self.slowest_leave = self.farthest = self.boot = self.step_seconds = 0.0
        self.reference: dict[int, tuple[Any, ...]] = {}
        self.end: dict[str, Any] = {}

    def begin(self, world: int, output: str, **changes: object) -> Attempt:
        """Start one world."""
        self.attempts += 1
        words = pretraining_arguments(
            self.project, output, **{
                "train_batch_size": GLOBAL_BATCH // world, "gradient_accumulation_steps": 2, "max_steps": self.options.steps,
                "num_steps_per_checkpoint": EVERY, "keep_checkpoints": KEEP, "learning_rate": 5e-3 if self.exact else 1e-3,
                "resume_from_checkpoint": True, "timeout_min": self.options.timeout_s / 60, **self.options.extra, **changes,
            }
        )  # fmt: skip
        good = good_checkpoints(self.project / output)
        tail = Tail(self.project / output / "dllogger.json")
        consoles = [self.project / "consoles" / f"{output}_try{self.attempts}_rank{rank}.txt" for rank in range(world)]
        common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        kind = execute if self.options.exec else Forked
        ranks = [kind(words, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, consoles[rank]) for rank in range(world)]
        return Attempt(self.attempts, world, step_of(good[-1]) if good else 0, ranks, consoles, tail)

    def run_reference(self) -> None:
        """The uninterrupted run that every lap is compared with. How long its start and its steps take says how long the moments are."""
        began = time.monotonic()
        attempt = self.begin(self.worlds[0], "reference")
        wait_until(lambda: attempt.tail.read() >= 1, attempt.ranks)
        self.boot, began = time.monotonic() - began, time.monotonic()
        wait_for_end(attempt.ranks, 600)
        self.step_seconds = (time.monotonic() - began) / self.options.steps
        attempt.finish()
        if attempt.codes != [0] * attempt.world:
            raise SystemExit(f"the uninterrupted run of {self.name} ended with {attempt.codes}:\n{attempt.consoles[0].read_text()}")
        self.reference = {step: self.facts(data) for step, data in read_steps(self.project / "reference" / "dllogger.json").items()}
        self.end = self.payload("reference")

    def facts(self, data: dict[str, Any]) -> tuple[Any, ...]:
        """What of a step must be equal: everything in the same world, its data in another."""
        return tuple(data[key] for key in (KEYS if self.exact else DATA_KEYS))

    def payload(self, output: str) -> dict[str, Any]:
        """A run's last checkpoint."""
        return torch.load(self.project / output / f"ckpt_{self.options.steps}.pt", weights_only=True)

    def run(self) -> None:
        """Laps until every fault has struck and the last lap has come to its end, or too much is wrong."""
        self.run_reference()
        while (self.faults or not self.laps) and len(self.problems) < MOST_PROBLEMS:
            self.laps += 1
            output = f"lap{self.laps}"
            while self.go_on(output) and len(self.problems) < MOST_PROBLEMS:
                pass
            if len(self.problems) < MOST_PROBLEMS:
                self.check_lap(output)

    def go_on(self, output: str) -> bool:
        """One attempt, which the next fault strikes, if one is left; whether the lap needs another attempt."""
        folder = self.project / output
        fault = self.faults[0] if self.faults else None
        least = 2 if fault is not None and fault.kind.leaves_others else 1
        self.world = self.rng.choice([world for world in self.worlds if world != self.world and world >= least] or [self.world])
        accumulation = 2 if self.exact else self.rng.choice((1, 2))
        attempt = self.begin(self.world, output, num_workers=self.rng.choice((0, 2)), gradient_accumulation_steps=accumulation)
        try:
            if fault is not None:
                attempt.strike(fault, folder, self.options.steps, self.boot, self.step_seconds)
            if not attempt.victims:
                wait_for_end(attempt.ranks, 600)
        finally:
            attempt.finish()
        self.check_attempt(attempt, folder)
        if fault is None or not attempt.victims:
            self.idle = not attempt.tail.order
            self.expect(not any(attempt.codes), attempt, f"nothing struck it, but it ended with {attempt.codes}")
            return any(attempt.codes)
        self.faults.pop(0)
        self.struck[str(fault.kind)] += 1
        self.slowest_leave = max(self.slowest_leave, attempt.left_after)
        self.check_leaving(attempt, fault.kind, folder)
        done = damage(folder, fault.kind.damage, fault.draw) if fault.kind.damage else ""
        self.tell(attempt, fault.kind, done, folder)
        return True

    def tell(self, attempt: Attempt, kind: Kind, done: str, folder: Path) -> None:
        """The line of one fault."""
        names = good_checkpoints(folder)
        victims = "all ranks" if len(attempt.victims) == attempt.world else f"rank {attempt.victims[0]}"
        others = sorted({str(attempt.codes[rank]) for rank in (attempt.others if kind.how != TERM else range(attempt.world))})
        left = f"; exit {', '.join(others)} after {attempt.left_after:.1f} s" if others else ""
        last = attempt.tail.order[-1] if attempt.tail.order else None
        print(
            f"{next(self.options.numbers):4d}  {self.name:<3} lap {self.laps:<2} try {attempt.number:<3} {attempt.world} ranks  {kind!s:<44} "
            f"steps {attempt.start:>3} to {'-' if last is None else last:>3}, good now: {names[-1] if names else 'none'}  ({victims}{left}"
            f"{'; ' + done if done else ''})", flush=True,
        )  # fmt: skip

    # -- proofs -----------------------------------------------------------------------------------------------------

    def expect(self, true: bool, attempt: Attempt | None, problem: str) -> None:
        """Note what is not as it must be."""
        if not true:
            where = f"{self.name} lap {self.laps}" + (f" try {attempt.number} (see {attempt.consoles[0]})" if attempt else "")
            self.problems.append(f"{where}: {problem}")
            print(f"WRONG {self.problems[-1]}", flush=True)

    def check_attempt(self, attempt: Attempt, folder: Path) -> None:
        """It began at the newest good checkpoint, went on step by step as the reference did, and left a checkpoint not far behind."""
        tail, order = attempt.tail, attempt.tail.order
        self.steps_made += len(order)
        start = attempt.start if tail.start is None else tail.start
        self.expect(start == attempt.start, attempt, f"began at step {start}, the newest good checkpoint was {attempt.start}")
        self.expect(order == list(range(start + 1, start + 1 + len(order))), attempt, f"steps {order} after {start}")
        for step, data in tail.steps.items():
            mine, wanted = self.facts(data), self.reference.get(step)
            self.expect(mine == wanted, attempt, f"step {step} was {mine}, uninterrupted {wanted}")
        names = good_checkpoints(folder)
        newest, last = step_of(names[-1]) if names else 0, order[-1] if order else start
        # one checkpoint may be in the making while training goes on to the next
        self.expect(
            newest >= max(start, last - 2 * EVERY), attempt, f"reached step {last} from {start}, but the newest good checkpoint is {newest}"
        )

    def check_leaving(self, attempt: Attempt, kind: Kind, folder: Path) -> None:
        """A rank asked to stop: all stop at the same step and save it. A rank lost: all others leave and say which."""
        codes, names = attempt.codes, good_checkpoints(folder)
        complete = f"ckpt_{self.options.steps}.pt" in names
        if kind.how == TERM:
            self.expect(set(codes) == {143} or (complete and not any(codes)), attempt, f"asked to stop, the ranks ended with {codes}")
            last = attempt.tail.order[-1] if attempt.tail.order else attempt.start
            self.expect(bool(names) and step_of(names[-1]) == last, attempt, f"stopped at step {last} but kept {names}")
            self.expect(len(names) <= KEEP + complete, attempt, f"{len(names)} checkpoints, {KEEP} are to be kept")
            return
        self.expect(attempt.left_after < LEAVE_SECONDS, attempt, f"after {attempt.left_after:.0f} s not all had left: {codes}")
        for rank in attempt.others:
            fine = codes[rank] == LOST or (codes[rank] == JOIN and kind.when == "start") or (complete and codes[rank] == 0)
            self.expect(fine, attempt, f"rank {rank} left with {codes[rank]}")
            named = f"rank {attempt.victims[0]} " in attempt.consoles[rank].read_text(errors="replace")
            self.expect(codes[rank] != LOST or named, attempt, f"rank {rank} does not name the lost rank {attempt.victims[0]}")

    def check_lap(self, output: str) -> None:
        """The run as a whole is the uninterrupted one, and its folder is in order."""
        folder = self.project / output
        steps = {step: self.facts(data) for step, data in read_steps(folder / "dllogger.json").items()}
        self.expect(steps == self.reference, None, "the steps of the run log are not the uninterrupted run's")
        mine = self.payload(output)
        if self.exact:
            wrong = list(differences(mine, self.end))
            self.expect(not wrong, None, f"the last checkpoint differs from the uninterrupted run's in {', '.join(wrong[:5])}")
        else:
            self.farthest = max(self.farthest, distance(mine["model"], self.end["model"]))
            self.expect(self.farthest <= CLOSE, None, f"weights {self.farthest:g} away from the uninterrupted run's")
        names, listed = checkpoint_names(folder), manifest_entries(folder)
        self.expect(set(listed) == set(names), None, f"the folder holds {names}, the manifest names {sorted(listed)}")
        self.expect(names == good_checkpoints(folder), None, f"of {names} only {good_checkpoints(folder)} are whole")
        # struck when all was done but the rotation: the next start finds nothing to do, and deletes nothing
        self.expect(len(names) <= KEEP + 1 + self.idle, None, f"{len(names)} checkpoints, {KEEP} and the phase's end are to be kept")
        pointer = (folder / "latest").read_text(encoding="utf-8").strip()
        self.expect(pointer == names[-1], None, f"latest names {pointer}, the folder holds {names}")
        left = [path.name for path in folder.glob(".*.partial")]
        self.expect(not left, None, f"temporary files were left: {left}")


def table(lines: list[Line]) -> None:
    """What it all came to."""
    heads = f"{'scenario':<28}{'faults':>7}{'starts':>7}{'laps':>6}{'steps':>7}{'repeated':>9}  {'slowest leave':>13}"
    print(f"\n{heads}  end compared with the uninterrupted run")
    for line in lines:
        name = f"{line.name}: world {' <-> '.join(map(str, line.worlds))}"
        repeated = line.steps_made - line.laps * line.options.steps
        same = (
            "bitwise equal: weights, moments, every step" if line.exact else f"same data in every step, weights within {line.farthest:.1e}"
        )
        print(
            f"{name:<28}{sum(line.struck.values()):>7}{line.attempts - 1:>7}{line.laps:>6}{line.steps_made:>7}{repeated:>9}  "
            f"{line.slowest_leave:>11.1f} s  {'DIFFERS, see above' if line.problems else same}"
        )
    print()
    for kind in map(str, KINDS):
        print(f"{kind:<48}{sum(line.struck[kind] for line in lines):>5}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help=f"how many; {len(KINDS)} are one of every kind")
    parser.add_argument("--seed", type=int, default=1, help="of the schedule of faults")
    parser.add_argument("--steps", type=int, default=48, help="optimizer steps of a lap")
    parser.add_argument("--workdir", type=Path, help="a new or empty folder (default: a temporary one, removed when all is well)")
    parser.add_argument("--exec", action="store_true", help="start real processes instead of forking them: seconds more an attempt")
    parser.add_argument("--shard", default="none", help="as run_pretraining.py's")
    parser.add_argument("--dead_rank_s", type=float, default=3.0, help="seconds until a silent rank is taken for dead")
    parser.add_argument("--timeout_s", type=float, default=15.0, help="seconds a collective waits")
    options = parser.parse_args(arguments)
    options.extra = {"dead_rank_s": options.dead_rank_s, "shard": options.shard}
    options.numbers = itertools.count(1)
    return options


def main() -> int:
    options = parse()
    folder = options.workdir or Path(tempfile.mkdtemp(prefix="berth-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"--workdir {folder} is not empty; give a new folder")
    began = time.monotonic()
    worlds = {"A1": (1,), "A2": (2,), "A4": (4,), "B": (1, 2, 4)}
    dealt = deal(draw_faults(options.faults, random.Random(options.seed)), worlds)
    how = "processes" if options.exec else "forked ranks"
    print(f"{options.faults} faults, seed {options.seed}, {options.steps} steps a lap, sharding {options.shard}, {how}, in {folder}\n")
    lines = []
    for name, faults in dealt.items():
        lines.append(Line(name, worlds[name], faults, options, folder))
        lines[-1].run()
    table(lines)
    problems = [problem for line in lines for problem in line.problems]
    print(f"\n{sum(sum(line.struck.values()) for line in lines)} faults in {(time.monotonic() - began) / 60:.1f} minutes: ", end="")
    print(f"{len(problems)} things are wrong; everything is kept in {folder}" if problems else "nothing was lost", flush=True)
    if not problems and options.workdir is None:
        shutil.rmtree(folder)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
