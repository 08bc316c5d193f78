"""The vocabulary projection and its loss on this machine: the fused operation against the same in separate steps, in turns.

    python benchmarks/cross_entropy.py --rounds 8

A round is forward and backward of one batch of M rows: the projection to V logits, summed cross-entropy, the number of correct predictions,
gradients of hidden states, weight and bias. Sides, in turns (A B C A B C ...), so that other work on the machine hits all:

fused     berth.kernels.cross_entropy.linear_cross_entropy
rowwise   F.linear, modeling.VocabularyCrossEntropy and a count of hits that reads the logits once more
plain     F.linear, F.cross_entropy and argmax

The ratio is the median of the ratios within a round, of elapsed time and of the processor time of all threads; with ``--threads 1`` the
latter says something on a busy machine as well. The memory of a side is how far two rounds raise the peak of a process of its own; inputs
and gradients are there before. bf16 means autocast. Works on a GPU too. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from arguments import add_device, at_least, check_device, result_file  # noqa: E402
from machine import machine  # noqa: E402

import modeling  # noqa: E402 - found beside this folder, installed or not
from berth.files import write_json  # noqa: E402
from berth.kernels.cross_entropy import linear_cross_entropy, unsupported  # noqa: E402

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Result = tuple[torch.Tensor, torch.Tensor]


def rowwise(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor) -> Result:
    logits = F.linear(hidden, weight, bias)
    loss = modeling.VocabularyCrossEntropy.apply(logits, labels)
    likely = logits.gather(1, labels[:, None]).squeeze(1) >= logits.amax(1)
    return loss, (logits[likely].argmax(1) == labels[likely]).sum()


def plain(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor) -> Result:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.float(), labels, reduction="sum"), (logits.argmax(1) == labels).sum()


SIDES: dict[str, Callable[..., Result]] = {"fused": linear_cross_entropy, "rowwise": rowwise, "plain": plain}
PRECISIONS = ("fp32", "bf16")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds of each side, after one untimed round")
    parser.add_argument("--rows", type=int, nargs="+", default=[580, 4096], help="predicted positions of a batch (M)")
    parser.add_argument("--precision", choices=(*PRECISIONS, "both"), default="both", help="bf16 means autocast")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (H)")
    parser.add_argument("--vocab_size", type=int, default=30528, help="rows of the word embedding (V)")
    add_device(parser)
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (None: torch decides)")
    parser.add_argument("--output", type=Path, default=result_file("cross_entropy.json"), help="JSON to write")
    parser.add_argument("--memory_of", choices=tuple(SIDES), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    at_least(parser, args, 1, ("rounds", "rows", "hidden", "vocab_size", "threads"))
    check_device(parser, args)
    return args


def make_inputs(args: argparse.Namespace, rows: int) -> Inputs:
    """Hidden states, weight, bias and labels; seven of ten labels are the largest logit, as late in a training."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, args.hidden, generator=generator)
    weight = torch.randn(args.vocab_size, args.hidden, generator=generator) * 0.1
    labels = torch.randint(0, args.vocab_size, (rows,), generator=generator)
    right = torch.rand(rows, generator=generator) < 0.7
    labels[right] = torch.cat([F.linear(part, weight).argmax(1) for part in hidden[right].split(64)])
    bias = torch.zeros(args.vocab_size)
    hidden, weight, bias = (x.to(args.device).requires_grad_() for x in (hidden, weight, bias))
    return hidden, weight, bias, labels.to(args.device)


def one_round(args: argparse.Namespace, side: str, precision: str, inputs: Inputs) -> tuple[float, int]:
    """Forward and backward; gradients start as None, as after ``zero_grad(set_to_none=True)``. Returns mean loss and hits."""
    for tensor in inputs[:3]:
        tensor.grad = None
    with torch.autocast(args.device, torch.bfloat16, enabled=precision == "bf16"):
        loss, correct = SIDES[side](*inputs)
    mean = loss / inputs[3].numel()
    mean.backward()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return mean.item(), int(correct)


def time_sides(args: argparse.Namespace, precision: str, rows: int) -> dict[str, Any]:
    inputs = make_inputs(args, rows)
    first = {side: one_round(args, side, precision, inputs) for side in SIDES}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    processor: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            start, processor_start = time.perf_counter(), time.process_time()
            one_round(args, side, precision, inputs)
            times[side].append((time.perf_counter() - start) * 1000)
            processor[side].append((time.process_time() - processor_start) * 1000)
    return {
        "times_ms": times,
        "processor_ms": processor,
        "min_ms": {side: min(values) for side, values in times.items()},
        "median_ms": {side: statistics.median(values) for side, values in times.items()},
        "fused_to": ratios(times),
        "fused_to_processor": ratios(processor),
        "peak_mb": {side: measure_memory(args, side, precision, rows) for side in SIDES},
        "loss": {side: loss for side, (loss, _) in first.items()},
        "correct": {side: correct for side, (_, correct) in first.items()},
    }


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Median over the rounds of the fused side's time divided by each side's."""
    return {side: statistics.median(a / b for a, b in zip(times["fused"], values, strict=True)) for side, values in times.items()}


def measure_memory(args: argparse.Namespace, side: str, precision: str, rows: int) -> float:
    """What :func:`print_memory` finds in a process of its own, in 1e6 bytes."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory_of", side, "--rows", str(rows), "--precision", precision]
    command += ["--hidden", str(args.hidden), "--vocab_size", str(args.vocab_size), "--device", args.device]
    if args.threads is not None:
        command += ["--threads", str(args.threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_memory(args: argparse.Namespace) -> None:
    """Print how far two rounds raise the peak above inputs and gradients."""
    inputs = make_inputs(args, args.rows[0])
    small = (inputs[0][:1].detach().requires_grad_(), *inputs[1:3], inputs[3][:1])
    one_round(args, args.memory_of, args.precision, small)  # libraries and gradients
    before = used_since_reset(args.device)
    for _ in range(2):
        one_round(args, args.memory_of, args.precision, inputs)
    print(round((peak(args.device) - before) / 1e6, 1))


def used_since_reset(device: str) -> int:
    """Bytes in use now, from where :func:`peak` starts anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets the peak
    return peak(device)


def peak(device: str) -> int:
    """Most bytes in use on the device (resident on a CPU; Linux only) since :func:`used_since_reset`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def print_table(results: dict[str, dict[str, Any]]) -> None:
    print(f"{'case':<16}{'side':<10}{'min ms':>9}{'median ms':>11}{'fused / it':>12}{'processor':>11}{'peak MB':>9}")
    for case, result in results.items():
        for side in SIDES:
            times = f"{result['min_ms'][side]:>9.1f}{result['median_ms'][side]:>11.1f}"
            compared = f"{result['fused_to'][side]:>12.3f}{result['fused_to_processor'][side]:>11.3f}"
            print(f"{case:<16}{side:<10}{times}{compared}{result['peak_mb'][side]:>9.0f}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.memory_of is not None:
        print_memory(args)
        return
    precisions = PRECISIONS if args.precision == "both" else (args.precision,)
    results = {f"{precision} M={rows}": time_sides(args, precision, rows) for rows in args.rows for precision in precisions}
    print_table(results)
    options = {key: value for key, value in vars(args).items() if key not in ("output", "memory_of")}
    about = machine(threads=torch.get_num_threads(), cpu_capability=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__)
    if args.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        about |= {"gpu": torch.cuda.get_device_name(device), "plain_parts": unsupported(device, torch.bfloat16)}
    write_json(args.output, {"machine": about, "options": options, "results": results})
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
