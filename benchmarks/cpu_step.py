"""One training step on a CPU: berth against ``transformers``' BertForPreTraining (eager), in turns.

    python benchmarks/cpu_step.py --rounds 8

A step is forward, backward and an optimizer, the same on both sides: same sizes, same starting weights, same sequences, dropout 0.1.
``transformers`` takes padded batches and its default attention (sdpa), as its users do; berth what run_pretraining.py does on a CPU by default:
packed batches, fused loss, fast dropout. ``padded`` is berth with --unpad off --fused_loss off --fast_dropout off. Sequences look like
pretraining data at a fill of about 0.88: half of them are full, the others 52 to 100 % full; 15 % of the real tokens are masked, 20 at most.

The sides alternate (A B C A B C ...), so that other work on the machine hits all; a ratio is the median of the ratios
within a round. Prints a table and writes it as JSON with the machine it ran on.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from arguments import at_least, result_file  # noqa: E402
from machine import machine  # noqa: E402

import modeling  # noqa: E402 - found beside this folder, installed or not
import optimization  # noqa: E402
from berth.files import write_json  # noqa: E402
from berth.kernels import dropout  # noqa: E402
from berth.records.rows import Rows  # noqa: E402
from berth.training.batches import to_micro_batch, to_packed  # noqa: E402

MASKED_SHARE, MAX_PREDICTIONS = 0.15, 20
PRECISIONS = ("fp32", "bf16")
SIDES = ("berth", "padded", "transformers")
Step = Callable[[Rows], Callable[[], float]]  # makes a batch, and gives the step on it


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="A quiet machine gives a sharper result; the ratio of the two sides is robust against a busy one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each side, after one untimed step")
    parser.add_argument("--precision", choices=(*PRECISIONS, "both"), default="both", help="bf16 means autocast")
    parser.add_argument(
        "--optimizer",
        choices=("adamw", "lamb"),
        default="adamw",
        help="of all sides: torch's fused AdamW (the default of transformers' Trainer), or berth's LAMB",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="sequences in a step")
    parser.add_argument("--seq_length", type=int, default=128, help="positions of a sequence, padding included")
    parser.add_argument("--layers", type=int, default=4, help="encoder layers")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size; 64 a head, feed-forward 4 times as wide")
    parser.add_argument("--vocab_size", type=int, default=30528, help="rows of the word embedding")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (None: torch decides)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--output", type=Path, default=result_file("cpu_step.json"), help="JSON to write")
    args = parser.parse_args(argv)
    at_least(parser, args, 1, ("rounds", "batch_size", "seq_length", "layers", "hidden", "threads"))
    at_least(parser, args, 0, ("seed",))
    if args.hidden % 64:
        parser.error(f"--hidden {args.hidden}: must be a multiple of 64, the size of a head")
    if args.vocab_size < 1000:
        parser.error(f"--vocab_size {args.vocab_size}: must be at least 1000")
    return args


def make_rows(args: argparse.Namespace, generator: np.random.Generator) -> Rows:
    """Sequences of a step; see the module docstring for what they look like."""
    batch, length = args.batch_size, args.seq_length
    lengths = np.where(generator.random(batch) < 0.5, length, np.round(length * generator.uniform(0.52, 1.0, batch))).astype(int)
    rows = Rows.zeros(batch, length, MAX_PREDICTIONS)
    for row, real in enumerate(lengths):
        rows.input_mask[row, :real] = 1
        rows.segment_ids[row, real // 2 : real] = 1
        rows.input_ids[row, :real] = generator.integers(999, args.vocab_size, real)
        count = min(MAX_PREDICTIONS, max(1, round(real * MASKED_SHARE)))
        picked = np.sort(1 + generator.permutation(real - 1)[:count])
        rows.masked_lm_positions[row, :count] = picked
        rows.masked_lm_ids[row, :count] = rows.input_ids[row, picked]
        rows.input_ids[row, picked] = 103
    rows.next_sentence_labels[:] = generator.integers(0, 2, batch)
    return rows


def make_models(args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """Both models in training mode with the same weights."""
    values = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "intermediate_size": 4 * args.hidden,
        "max_position_embeddings": max(512, args.seq_length),
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    torch.manual_seed(args.seed)
    ours = modeling.BertForPreTraining(modeling.BertConfig.from_dict(values))
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**values))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    packed = copy.deepcopy(ours)
    packed.fused_cross_entropy = True
    dropout.replace(packed)
    return {"berth": packed.train(), "padded": ours.train(), "transformers": theirs.train()}


def make_step(args: argparse.Namespace, side: str, model: torch.nn.Module, precision: str) -> Step:
    """A function that makes one optimizer step on a batch and returns the loss."""
    groups = optimization.parameter_groups(model)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True) if args.optimizer == "adamw" else optimization.Lamb(groups, lr=1e-4)
    device = torch.device("cpu")

    def prepare(rows: Rows) -> Callable[[], float]:
        micro = to_packed(rows, max_seqlen=args.seq_length) if side == "berth" else to_micro_batch(rows)
        arguments = micro.to(device).arguments()
        if side == "transformers":
            arguments.pop("masked_index")
            arguments["attention_mask"] = arguments["attention_mask"].long()
        return lambda: step(arguments)

    def step(arguments: dict[str, Any]) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**arguments).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return prepare


def time_sides(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Milliseconds of every timed step of all sides, which take turns on the same sequences."""
    steps = {side: make_step(args, side, model, precision) for side, model in make_models(args).items()}
    generator = np.random.default_rng(args.seed)
    batches = [make_rows(args, generator) for _ in range(args.rounds + 1)]
    first_loss = {side: step(batches[0])() for side, step in steps.items()}  # untimed: allocations, optimizer state
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for rows in batches[1:]:
        for side in SIDES:
            step = steps[side](rows)
            start = time.perf_counter()
            step()
            times[side].append((time.perf_counter() - start) * 1000)
    sequences = len(batches) * args.batch_size
    return {
        "times_ms": times,
        "first_loss": first_loss,
        "fill": sum(int(rows.input_mask.sum()) for rows in batches) / (sequences * args.seq_length),
        "predictions_per_sequence": sum(int((rows.masked_lm_positions > 0).sum()) for rows in batches) / sequences,
    }


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Minimum, median and ratios to ``transformers`` of the times, added to what was measured."""
    times = measured["times_ms"]
    ratios = {side: [one / peer for one, peer in zip(times[side], times["transformers"], strict=True)] for side in SIDES}
    return measured | {
        "min_ms": {side: min(times[side]) for side in SIDES},
        "median_ms": {side: statistics.median(times[side]) for side in SIDES},
        "ratio": {side: statistics.median(ratios[side]) for side in SIDES},
        "ratio_of_minima": {side: min(times[side]) / min(times["transformers"]) for side in SIDES},
    }


def print_table(results: dict[str, dict[str, Any]]) -> None:
    print(f"{'precision':<10}{'side':<14}{'min ms':>9}{'median ms':>11}{'ratio':>8}{'of minima':>11}")
    for precision, result in results.items():
        for side in SIDES:
            figures = f"{result['min_ms'][side]:>9.1f}{result['median_ms'][side]:>11.1f}{result['ratio'][side]:>8.3f}"
            print(f"{precision:<10}{side:<14}{figures}{result['ratio_of_minima'][side]:>11.3f}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    precisions = PRECISIONS if args.precision == "both" else (args.precision,)
    results = {precision: summarise(time_sides(args, precision)) for precision in precisions}
    print_table(results)
    options = {key: value for key, value in vars(args).items() if key != "output"}
    about = machine(
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    write_json(args.output, {"machine": about, "options": options, "results": results})
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
