"""What a checkpoint costs a training loop: no saving, saving in the loop, and saving beside it, in turns.

    python benchmarks/checkpoint_stall.py --rounds 5 --threads 1

A turn is ``--steps`` training steps (forward, backward, LAMB) of which the first is followed by a checkpoint of model and moments. Two costs
are told apart: the *stall*, seconds in which the loop stands still (writing, or copying to memory and handing over), and the *turn*, which
is also longer because writing beside it takes memory bandwidth and, on a machine without a core to spare, time of the processor.

The sides alternate, so that other work on the machine hits all; figures are medians. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from cpu_step import make_batch  # noqa: E402
from machine import machine  # noqa: E402

import modeling  # noqa: E402 - found beside this folder, installed or not
import optimization  # noqa: E402
from berth.files import write_json  # noqa: E402
from berth.training.checkpoint import CheckpointStore  # noqa: E402
from berth.training.saving import AsyncSaver, snapshot  # noqa: E402

SIDES = ("none", "in the loop", "beside it")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Name a --folder on the file system that the runs write to: its speed is what is measured.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side, after one untimed step")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn; more than a write takes, or the next one waits for it")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences in a step")
    parser.add_argument("--seq_length", type=int, default=128, help="positions of a sequence, padding included")
    parser.add_argument("--layers", type=int, default=4, help="encoder layers")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size; 64 a head, feed-forward 4 times as wide")
    parser.add_argument("--vocab_size", type=int, default=30528, help="rows of the word embedding")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (None: torch decides)")
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are written (None: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks/results/checkpoint_stall.json", help="JSON to write")
    args = parser.parse_args(argv)
    for name in ("rounds", "steps", "batch_size", "seq_length", "layers", "hidden", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    if args.hidden % 64:
        parser.error(f"--hidden {args.hidden}: must be a multiple of 64, the size of a head")
    return args


class Loop:
    """A model that trains, and three ways to save it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        torch.manual_seed(args.seed)
        config = modeling.BertConfig(
            vocab_size=args.vocab_size, hidden_size=args.hidden, num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64, intermediate_size=4 * args.hidden,
        )  # fmt: skip
        self.model = modeling.BertForPreTraining(config).train()
        self.optimizer = optimization.Lamb(optimization.parameter_groups(self.model, weight_decay=0.01), lr=1e-4)
        self.batch = make_batch(args, torch.Generator().manual_seed(args.seed))
        self.store = CheckpointStore(folder, keep=1)
        self.store.prepare()
        self.saver = AsyncSaver(self.store)
        self.saved = 0
        self.step()  # untimed: allocations, optimizer state

    def step(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def payload(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def place(self) -> dict[str, Any]:
        self.saved += 1
        return {"step": self.saved, "phase": 1, "phase_step": self.saved, "samples": self.saved, "final": False}

    def save(self, side: str) -> float:
        """Save once; the seconds the loop stood still."""
        began = time.perf_counter()
        if side == "in the loop":
            self.store.save(self.payload(), **self.place())
        elif side == "beside it":
            self.saver.save(snapshot(self.payload()), **self.place())
        return time.perf_counter() - began

    def turn(self, side: str, steps: int) -> tuple[float, float]:
        """Seconds of a turn, and of its stall. A write that is not over with the turn counts to its end."""
        began = time.perf_counter()
        self.step()
        stall = self.save(side)
        for _ in range(steps - 1):
            self.step()
        self.saver.wait()
        return time.perf_counter() - began, stall


def measure(loop: Loop, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every turn of every side, their stalls, and medians."""
    turns: dict[str, list[float]] = {side: [] for side in SIDES}
    stalls: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            seconds, stall = loop.turn(side, args.steps)
            turns[side].append(seconds)
            stalls[side].append(stall)
    longer = {side: [mine - other for mine, other in zip(turns[side], turns["none"], strict=True)] for side in SIDES}
    writes = [outcome.seconds for outcome in loop.saver.poll()]
    return {
        "turn_s": turns,
        "stall_s": stalls,
        "write_beside_s": writes,
        "checkpoint_bytes": loop.store.entries()[-1].bytes,
        "median_turn_s": {side: statistics.median(turns[side]) for side in SIDES},
        "median_stall_s": {side: statistics.median(stalls[side]) for side in SIDES},
        "median_longer_s": {side: statistics.median(longer[side]) for side in SIDES},
    }


def print_table(results: dict[str, Any]) -> None:
    print(f"checkpoint of {results['checkpoint_bytes'] / 1e6:.0f} MB; beside the loop it is on disk after", end=" ")
    print(f"{statistics.median(results['write_beside_s']):.2f} s")
    print(f"{'saving':<13}{'turn s':>9}{'stall s':>9}{'share':>8}{'longer s':>10}")
    for side in SIDES:
        turn, stall = results["median_turn_s"][side], results["median_stall_s"][side]
        print(f"{side:<13}{turn:>9.2f}{stall:>9.3f}{stall / turn:>8.1%}{results['median_longer_s'][side]:>10.2f}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = measure(Loop(args, Path(folder)), args)
    print_table(results)
    options = {key: value for key, value in vars(args).items() if key not in ("output", "folder")}
    about = machine(
        threads=torch.get_num_threads(), cpu_capability=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__
    )  # fmt: skip
    write_json(args.output, {"machine": about, "options": options, "results": results})
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
