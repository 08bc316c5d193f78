"""What fp8 does to a loss: the same small BERT on the same batches in fp32, bf16 and fp8, for several seeds.

    python benchmarks/fp8_curve.py

The text is a Markov chain: every word has a few words that can follow it, so a masked word can be told from its neighbours to some degree, and no
better. A seed decides the starting weights, the sentences of every step, their masks and dropout; the runs of one seed differ in precision
only. Reported are means of the training loss over windows of steps, and the loss on held-out sentences without dropout after the last
step; beside each mean over seeds stands what the seeds differ by, and the differences to bf16 are taken seed by seed.

A CPU computes fp8 products from the same 8-bit numbers as a GPU, so what rounding does to a loss is the same there (but for Hopper's shorter
sums in the forward pass); speed is not, and none is measured. A small model and few steps can show that fp8 is broken. They cannot show
that 340 million parameters and 7038 steps will end the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from arguments import at_least, result_file  # noqa: E402
from machine import machine  # noqa: E402

import modeling  # noqa: E402 - found beside this folder, installed or not
from berth.files import write_json  # noqa: E402
from berth.kernels import fp8  # noqa: E402
from berth.training.precision import make_precision  # noqa: E402

PRECISIONS = ("fp32", "bf16", "fp8")
MASK, FIRST_WORD = 3, 4
MASKED_SHARE = 0.15
FOLLOWERS = (0.4, 0.3, 0.15, 0.1, 0.05)  # probabilities of the words that can follow one
INITIALIZER_RANGE = 0.04  # with 0.02 a model this narrow learns nothing from a word's neighbours for 500 steps (2026-11-21)
TEXT_SEED = 1234  # the chain and the held-out sentences are the same for all runs


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of a run")
    parser.add_argument("--window", type=int, default=100, help="steps that a reported training loss is the mean of")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each precision")
    parser.add_argument("--layers", type=int, default=2, help="encoder layers")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size; 64 a head, feed-forward 4 times as wide")
    parser.add_argument("--words", type=int, default=60, help="words of the language")
    parser.add_argument("--batch_size", type=int, default=64, help="sentences in a step")
    parser.add_argument("--seq_length", type=int, default=16, help="words of a sentence")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="of AdamW, after a tenth of the steps; falls to 0 at the end")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", type=Path, default=result_file("fp8_curve.json"), help="JSON to write")
    args = parser.parse_args(argv)
    at_least(parser, args, 1, ("steps", "window", "seeds", "layers", "hidden", "batch_size", "seq_length", "threads"))
    if args.hidden % 64:
        parser.error(f"--hidden {args.hidden}: must be a multiple of 64, the size of a head")
    if args.words < len(FOLLOWERS):
        parser.error(f"--words {args.words}: must be at least {len(FOLLOWERS)}")
    if args.steps % args.window:
        parser.error(f"--steps {args.steps}: must be a multiple of --window {args.window}")
    return args


def make_batch(args: argparse.Namespace, followers: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels``, int64 [B, S]: sentences of the chain ``followers`` [words, choices] with masked words."""
    choices = torch.multinomial(torch.tensor(FOLLOWERS), args.batch_size * args.seq_length, replacement=True, generator=generator)
    words = [torch.randint(args.words, (args.batch_size,), generator=generator)]
    for choice in choices.view(args.seq_length, args.batch_size)[1:]:
        words.append(followers[words[-1], choice])
    ids = torch.stack(words, 1) + FIRST_WORD
    masked = torch.rand(ids.shape, generator=generator) < MASKED_SHARE
    masked[:, 0] = True
    return {"input_ids": ids.masked_fill(masked, MASK), "labels": ids.masked_fill(~masked, modeling.IGNORED_LABEL)}


def run(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Training losses of all steps and the held-out loss of one run."""
    text = torch.Generator().manual_seed(TEXT_SEED)
    followers = torch.stack([torch.randperm(args.words, generator=text)[: len(FOLLOWERS)] for _ in range(args.words)])
    held_out = [make_batch(args, followers, text) for _ in range(16)]
    torch.manual_seed(seed)
    config = modeling.BertConfig(
        vocab_size=args.words + FIRST_WORD,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        intermediate_size=4 * args.hidden,
        max_position_embeddings=args.seq_length,
        initializer_range=INITIALIZER_RANGE,
    )
    model = modeling.BertForMaskedLM(config).train()
    if name == "fp8":
        fp8.convert_linears(model)
    precision = make_precision(name, "cpu", loss_scale=0.0, init_loss_scale=1.0, floor=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    warm_up = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (args.steps - step) / (args.steps - warm_up + 1))
    )
    batches = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(args.steps):
        with precision.autocast():
            loss = model(**make_batch(args, followers, batches)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad(), precision.autocast():
        final = statistics.fmean(model(**batch).loss.item() for batch in held_out)
    return {"precision": name, "seed": seed, "losses": losses, "held_out_loss": final}


def summarise(args: argparse.Namespace, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each window of steps, and of the held-out loss: mean and standard deviation over seeds, and the paired differences to bf16."""
    measures = [
        (f"steps {end - args.window + 1} to {end}", lambda one, end=end: statistics.fmean(one["losses"][end - args.window : end]))
        for end in range(args.window, args.steps + 1, args.window)
    ]
    rows = []
    for title, measure in [*measures, ("held out", lambda one: one["held_out_loss"])]:
        values = {name: [measure(one) for one in runs if one["precision"] == name] for name in PRECISIONS}
        row: dict[str, Any] = {"of": title}
        for name in PRECISIONS:
            row[name] = {
                "mean": statistics.fmean(values[name]),
                "deviation_of_seeds": statistics.stdev(values[name]) if args.seeds > 1 else None,
                "minus_bf16_by_seed": [one - other for one, other in zip(values[name], values["bf16"], strict=True)],
            }
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'loss of':<18}" + "".join(f"{name:>18}" for name in PRECISIONS) + f"{'fp32 - bf16':>24}{'fp8 - bf16':>24}")
    for row in rows:
        values = (f"{row[name]['mean']:.4f} ± {row[name]['deviation_of_seeds'] or 0:.4f}" for name in PRECISIONS)
        differences = (" ".join(f"{one:+.4f}" for one in row[name]["minus_bf16_by_seed"]) for name in ("fp32", "fp8"))
        print(f"{row['of']:<18}" + "".join(f"{value:>18}" for value in values) + "".join(f"{one:>24}" for one in differences))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    reason = fp8.unsupported(torch.device("cpu"))
    if reason:
        raise SystemExit(f"error: {reason}")
    runs = []
    for seed in range(args.seeds):
        for name in PRECISIONS:
            runs.append(run(args, name, seed))
            print(f"seed {seed}, {name}: held-out loss {runs[-1]['held_out_loss']:.4f}", flush=True)
    rows = summarise(args, runs)
    print_table(rows)
    options = {key: value for key, value in vars(args).items() if key != "output"}
    curves = [{**one, "losses": [round(loss, 4) for loss in one["losses"][9::10]]} for one in runs]  # every tenth step
    about = machine(threads=args.threads, torch=torch.__version__)
    write_json(args.output, {"machine": about, "options": options, "summary": rows, "runs": curves})
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
