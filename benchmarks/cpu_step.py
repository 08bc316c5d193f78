"""One training step on a CPU: modeling.py against ``transformers``' BertForPreTraining, both eager, in turns.

    python benchmarks/cpu_step.py --rounds 8

A step is forward, backward and ``torch.optim.AdamW``, the same on both sides: same sizes, same starting weights, same
batches, dropout 0.1, ``transformers``' default attention (sdpa). Batches look like pretraining data at a fill of about
0.88: half of the sequences are full, the others 52 to 100 % full; 15 % of the real tokens are masked, 20 at most.

The sides alternate (A B A B ...), so that other work on the machine hits both; the ratio is the median of the ratios
within a round. Prints a table and writes it as JSON with the machine it ran on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from machine import machine  # noqa: E402

import modeling  # noqa: E402 - found beside this folder, installed or not
from berth.files import write_json  # noqa: E402

MASKED_SHARE, MAX_PREDICTIONS = 0.15, 20
PRECISIONS = ("fp32", "bf16")
SIDES = ("berth", "transformers")
Batch = dict[str, torch.Tensor]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="A quiet machine gives a sharper result; the ratio of the two sides is robust against a busy one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each side, after one untimed step")
    parser.add_argument("--precision", choices=(*PRECISIONS, "both"), default="both", help="bf16 means autocast")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences in a step")
    parser.add_argument("--seq_length", type=int, default=128, help="positions of a sequence, padding included")
    parser.add_argument("--layers", type=int, default=4, help="encoder layers")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size; 64 a head, feed-forward 4 times as wide")
    parser.add_argument("--vocab_size", type=int, default=30528, help="rows of the word embedding")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (None: torch decides)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks/results/cpu_step.json", help="JSON to write")
    args = parser.parse_args(argv)
    for name in ("rounds", "batch_size", "seq_length", "layers", "hidden", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    if args.hidden % 64:
        parser.error(f"--hidden {args.hidden}: must be a multiple of 64, the size of a head")
    if args.vocab_size < 1000:
        parser.error(f"--vocab_size {args.vocab_size}: must be at least 1000")
    return args


def make_batch(args: argparse.Namespace, generator: torch.Generator) -> Batch:
    """int64 tensors named as the models' arguments; see the module docstring for what they look like."""
    batch, length = args.batch_size, args.seq_length
    full = torch.rand(batch, generator=generator) < 0.5
    cut = torch.rand(batch, generator=generator) * 0.48 + 0.52
    lengths = torch.where(full, torch.ones(batch), cut).mul(length).round().long()
    mask = torch.arange(length) < lengths[:, None]
    input_ids = torch.randint(999, args.vocab_size, (batch, length), generator=generator) * mask
    labels = torch.full_like(input_ids, -100)
    for row, real in enumerate(lengths.tolist()):
        count = min(MAX_PREDICTIONS, max(1, round(real * MASKED_SHARE)))
        picked = torch.randperm(real, generator=generator)[:count]
        labels[row, picked] = input_ids[row, picked]
    return {
        "input_ids": torch.where(labels == -100, input_ids, 103),
        "attention_mask": mask.long(),
        "token_type_ids": ((torch.arange(length) >= lengths[:, None] // 2) & mask).long(),
        "labels": labels,
        "next_sentence_label": torch.randint(0, 2, (batch,), generator=generator),
    }


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
    return {"berth": ours.train(), "transformers": theirs.train()}


def make_step(model: torch.nn.Module, precision: str) -> Callable[[Batch], float]:
    """A function that takes one optimizer step on a batch and returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: Batch) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def time_sides(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Milliseconds of every timed step of both sides, which take turns on the same batches."""
    steps = {side: make_step(model, precision) for side, model in make_models(args).items()}
    generator = torch.Generator().manual_seed(args.seed)
    batches = [make_batch(args, generator) for _ in range(args.rounds + 1)]
    first_loss = {side: step(batches[0]) for side, step in steps.items()}  # untimed: allocations, optimizer state
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for batch in batches[1:]:
        for side in SIDES:
            start = time.perf_counter()
            steps[side](batch)
            times[side].append((time.perf_counter() - start) * 1000)
    real = sum(batch["attention_mask"].sum().item() for batch in batches)
    labelled = sum((batch["labels"] != -100).sum().item() for batch in batches)
    sequences = len(batches) * args.batch_size
    return {
        "times_ms": times,
        "first_loss": first_loss,
        "fill": real / (sequences * args.seq_length),
        "predictions_per_sequence": labelled / sequences,
    }


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Minimum, median and ratios of the times, added to what was measured."""
    times = measured["times_ms"]
    per_round = [ours / theirs for ours, theirs in zip(times["berth"], times["transformers"], strict=True)]
    return measured | {
        "min_ms": {side: min(times[side]) for side in SIDES},
        "median_ms": {side: statistics.median(times[side]) for side in SIDES},
        "ratio": statistics.median(per_round),
        "ratio_of_minima": min(times["berth"]) / min(times["transformers"]),
    }


def print_table(results: dict[str, dict[str, Any]]) -> None:
    print(f"{'precision':<10}{'side':<14}{'min ms':>9}{'median ms':>11}{'ratio':>8}")
    for precision, result in results.items():
        for side in SIDES:
            ratio = f"{result['ratio']:.3f}" if side == "berth" else "1"
            print(f"{precision:<10}{side:<14}{result['min_ms'][side]:>9.1f}{result['median_ms'][side]:>11.1f}{ratio:>8}")


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
