"""One LAMB step over the tensors of BERT-large: the plain loop, torch's batched kernels, berth's fast path, apex; and AdamW as yardstick.

    python benchmarks/gpu_lamb.py --rounds 20

The fast path is Triton's on a GPU and the fused one on a CPU. All sides update the same parameters and moments, take turns in an order that
rotates, and are told the gradient norm (2.0, so that every step clips), as training tells it; the norm itself is a row of its own. Before that, each
side's results on a small model are compared with float64; a side that is wrong, or absent, is not timed.

``floor_bytes`` is what a step must move when a trust ratio needs two passes and neither pass keeps anything: 40 bytes a decayed parameter, 28 a plain
one; the floor in milliseconds is that at the bandwidth of a large copy, which takes its turns, too. Prints a table and writes it as JSON
(``cpu_lamb.json`` or ``gpu_lamb.json``) with the machine it ran on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from arguments import add_device, at_least, check_device, result_file  # noqa: E402
from machine import machine  # noqa: E402

import modeling  # noqa: E402 - found beside this folder, installed or not
import optimization  # noqa: E402
from berth.files import write_json  # noqa: E402
from berth.training.backends import Choice, make_lamb, probe  # noqa: E402

DECAYED_BYTES, PLAIN_BYTES, NORM_BYTES = 40, 28, 4
TOLERANCE = 1e-5
COPY_ELEMENTS = 1 << 27
LR, NORM = 1e-6, 2.0
Groups = list[dict[str, Any]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="A quiet machine gives a sharper result; the ratios are of steps that were taken one after the other.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each side, after one untimed step")
    add_device(parser)
    parser.add_argument("--layers", type=int, default=24, help="encoder layers")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size; feed-forward 4 times as wide")
    parser.add_argument("--vocab_size", type=int, default=30528, help="rows of the word embedding")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch on a CPU (None: torch decides)")
    parser.add_argument(
        "--output", type=Path, default=None, help=f"JSON to write (None: {result_file('gpu_lamb.json')}, on a CPU cpu_lamb.json)"
    )
    args = parser.parse_args(argv)
    at_least(parser, args, 1, ("rounds", "layers", "hidden", "vocab_size", "threads"))
    check_device(parser, args)
    if args.hidden % 64:
        parser.error(f"--hidden {args.hidden}: must be a multiple of 64, the size of a head")
    return args


def shapes_of(layers: int, hidden: int, vocab_size: int) -> list[tuple[str, torch.Size]]:
    """Names and shapes of the model's parameters."""
    values = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
    }
    with torch.device("meta"):
        model = modeling.BertForPreTraining(modeling.BertConfig.from_dict(values))
    return [(name, parameter.shape) for name, parameter in model.named_parameters()]


def make_groups(shapes: list[tuple[str, torch.Size]], device: torch.device, dtype: torch.dtype = torch.float32) -> Groups:
    """Parameters like a model's at its start, with gradients; the same values for every dtype."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: torch.Size, size: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * size).to(dtype)

    named = [(name, torch.nn.Parameter(normal(shape, 0.02))) for name, shape in shapes]
    for _, parameter in named:
        parameter.grad = normal(parameter.shape, 1e-3)
    return optimization.parameter_groups(named)


def tensors_of(groups: Groups) -> list[torch.nn.Parameter]:
    return [parameter for group in groups for parameter in group["params"]]


def makers(device: torch.device) -> tuple[dict[str, Callable[[Groups], torch.optim.Optimizer]], list[str]]:
    """A function that makes the optimizer for each side, and why sides are missing."""
    sides: dict[str, Callable[[Groups], torch.optim.Optimizer]] = {
        "loop": lambda groups: optimization.Lamb(groups, lr=LR, foreach=False, fused=False),
        "foreach": lambda groups: optimization.Lamb(groups, lr=LR, foreach=True),
    }
    absent = []
    if device.type == "cuda":
        found = probe(device, (("triton_lamb",), ("fused_lamb",)))
        absent = list(found.problems)
        for side, kind in (("triton", found.triton_lamb), ("apex", found.fused_lamb)):
            if kind is not None:
                sides[side] = lambda groups, kind=kind: make_lamb(Choice(kind, None, ""), groups, lr=LR, max_grad_norm=1.0)
    elif optimization.fused_problem() is None:
        sides["fused"] = lambda groups: optimization.Lamb(groups, lr=LR, fused=True)
    else:
        absent = [f"fused: {optimization.fused_problem()}"]
    return sides, absent


def largest_error(make: Callable[[Groups], torch.optim.Optimizer], device: torch.device) -> float:
    """Of parameters and moments after 3 clipped steps with a large rate on a small model, against float64; relative to the largest value."""
    shapes = shapes_of(layers=2, hidden=128, vocab_size=1003)
    groups, reference = make_groups(shapes, device), make_groups(shapes, device, torch.float64)
    pairs = [(make(groups), tensors_of(groups)), (optimization.Lamb(reference, foreach=False), tensors_of(reference))]
    for step in range(3):
        for optimizer, tensors in pairs:
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            for index, parameter in enumerate(tensors):  # apex has overwritten the gradients
                parameter.grad = (
                    (torch.arange(parameter.numel(), device=device) * (0.1 + step) + index).sin().view_as(parameter).to(parameter)
                )
            optimizer.step()
    worst = 0.0
    for ours, exact in zip(pairs[0][1], pairs[1][1], strict=True):
        moments = ((pairs[0][0].state[ours][key], pairs[1][0].state[exact][key]) for key in ("exp_avg", "exp_avg_sq"))
        for left, right in ((ours.detach(), exact.detach()), *moments):
            worst = max(worst, float((left - right).abs().max() / right.abs().max()))
    return worst


def make_steps(args: argparse.Namespace, device: torch.device, groups: Groups) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """A function that takes one step for each side, and what was found out about the sides before."""
    sides, absent = makers(device)
    errors = {side: largest_error(make, device) for side, make in sides.items()}
    tensors = tensors_of(groups)
    moments = {p: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.full_like(p, 1e-6)} for p in tensors}
    norm = torch.tensor(NORM, dtype=torch.float64, device=device)
    steps: dict[str, Callable[[], Any]] = {}
    for side, make in sides.items():
        if errors[side] <= TOLERANCE:
            optimizer = make([dict(group) for group in groups])
            optimizer.state.update({p: dict(values) for p, values in moments.items()})
            steps[side] = lambda optimizer=optimizer: optimizer.step(grad_norm=norm)
        else:
            absent.append(f"{side}: differs from float64 by {errors[side]:.1e}")
    adamw = torch.optim.AdamW([dict(group) for group in groups], lr=LR, fused=True)
    where = device if device.type == "cuda" else torch.device("cpu")
    adamw.state.update({p: {"step": torch.zeros((), device=where), **values} for p, values in moments.items()})
    steps["adamw"] = adamw.step
    gradients = [p.grad for p in tensors]
    steps["norm"] = lambda: optimization.global_norm(gradients)
    source = torch.ones(COPY_ELEMENTS, device=device)
    target = torch.empty_like(source)
    steps["copy"] = lambda: target.copy_(source)
    return steps, {"relative_errors": errors, "absent": absent}


def time_steps(steps: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every timed step, the host's part included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {side: [] for side in steps}
    order = list(steps)
    for number in range(rounds + 1):
        for side in order:
            wait()
            start = time.perf_counter()
            steps[side]()
            wait()
            if number:  # the first round allocates and compiles
                times[side].append((time.perf_counter() - start) * 1000)
        order = order[1:] + order[:1]
    return times


def summarise(times: dict[str, list[float]], groups: Groups) -> dict[str, Any]:
    """Minimum, median, speed against the loop, and distance from the floor, of each side."""
    decayed, plain = (sum(p.numel() for p in group["params"]) for group in groups)
    floor_bytes = DECAYED_BYTES * decayed + PLAIN_BYTES * plain
    copy_gb_s = 8 * COPY_ELEMENTS / statistics.median(times["copy"]) / 1e6
    floor_ms = floor_bytes / copy_gb_s / 1e6
    sides = {}
    for side, listed in times.items():
        median = statistics.median(listed)
        sides[side] = {"min_ms": min(listed), "median_ms": median}
        if side not in ("norm", "copy"):
            sides[side] |= {
                "faster_than_loop": statistics.median(loop / ours for loop, ours in zip(times["loop"], listed, strict=True)),
                "faster_than_loop_minima": min(times["loop"]) / min(listed),
                "floor_gb_s": floor_bytes / median / 1e6,
                "times_the_floor": median / floor_ms,
            }
    return {
        "parameters": decayed + plain,
        "floor_bytes": floor_bytes,
        "norm_bytes": NORM_BYTES * (decayed + plain),
        "copy_gb_s": copy_gb_s,
        "floor_ms": floor_ms,
        "sides": sides,
        "times_ms": times,
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"floor {result['floor_bytes'] / 1e9:.2f} GB: {result['floor_ms']:.2f} ms at {result['copy_gb_s']:.1f} GB/s of a copy")
    print(f"{'side':<10}{'min ms':>10}{'median ms':>11}{'x loop':>8}{'of min':>8}{'GB/s':>9}{'/ floor':>9}")
    for side, row in result["sides"].items():
        line = f"{side:<10}{row['min_ms']:>10.2f}{row['median_ms']:>11.2f}"
        if "floor_gb_s" in row:
            line += f"{row['faster_than_loop']:>8.2f}{row['faster_than_loop_minima']:>8.2f}{row['floor_gb_s']:>9.1f}{row['times_the_floor']:>9.2f}"
        print(line)
    for line in result["absent"]:
        print(f"not timed: {line}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    groups = make_groups(shapes_of(args.layers, args.hidden, args.vocab_size), device)
    steps, checks = make_steps(args, device, groups)
    result = summarise(time_steps(steps, args.rounds, device), groups) | checks
    print_table(result)
    about = machine(
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        load_average=round(os.getloadavg()[0], 1),  # of all processes, this one among them
    )
    output = args.output or result_file("gpu_lamb.json" if device.type == "cuda" else "cpu_lamb.json")
    options = {key: value for key, value in vars(args).items() if key != "output"}
    write_json(output, {"machine": about, "options": options, "result": result})
    print(f"written: {output}")


if __name__ == "__main__":
    main()
