"""Attention with dropout, forward and backward: packed sequences (berth's varlen_attention) against padded ones with a mask (torch's), in turns.

    python benchmarks/attention.py --rounds 10
    python benchmarks/attention.py --shape 32x128x4 --precision fp32 --threads 1

Batches look like pretraining data at a fill of about 0.88: half of the sequences are full, the others 52 to 100 % full, in falling order of
length. Both sides get contiguous projections of their tokens and give the gradients of query, key and value; dropout 0.1. On a GPU a third
side is torch's own attention of packed sequences (torch.nn.attention.varlen), which has no dropout.

First the sides are compared without dropout. Then they alternate (A B A B ...), so that other work on the machine hits both; the ratio is the
median of the ratios within a round. TFLOP/s count the products of the real tokens (12 N D L^2 a sequence), whatever a side computes besides.
On a CPU the times are of the clock and, as "cpu", of the process, which other work on the machine disturbs less. Prints a table and writes it
as JSON.
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

# before torch is imported: threads that spin while they wait keep those they wait for from running, on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from arguments import add_device, at_least, check_device, result_file  # noqa: E402
from machine import machine  # noqa: E402

from berth.files import write_json  # noqa: E402 - found beside this folder, installed or not
from berth.kernels.attention import unsupported, varlen_attention  # noqa: E402

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_SHAPES = {"cpu": ["32x128x4", "32x128x12", "8x512x4", "8x512x12"], "cuda": ["256x128x16", "64x512x16"]}
DROPOUT = 0.1
# Largest difference of the sides, of the norm, without dropout.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.015}
Side = Callable[[float], list[torch.Tensor]]


def shape(text: str) -> tuple[int, int, int]:
    """Sequences, positions and heads of "32x128x4"."""
    try:
        sequences, length, heads = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be SEQUENCESxPOSITIONSxHEADS, as 32x128x4") from None
    if min(sequences, length, heads) < 1:
        raise argparse.ArgumentTypeError(f"{text}: every number must be at least 1")
    return sequences, length, heads


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="A quiet machine gives a sharper result; the ratio of the two sides is robust against a busy one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--shape", type=shape, action="append", help=f"SEQUENCESxPOSITIONSxHEADS, may be repeated (None: {DEFAULT_SHAPES[device]})"
    )
    parser.add_argument("--head_size", type=int, default=64, help="D")
    parser.add_argument("--precision", choices=(*PRECISIONS, "all"), default="all", help="of queries, keys and values")
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of each side, after two untimed ones")
    parser.add_argument("--threads", type=int, action="append", help="threads of torch, may be repeated (None: torch decides)")
    add_device(parser)
    parser.add_argument("--seed", type=int, default=0, help="of lengths, numbers and dropout")
    parser.add_argument("--output", type=Path, default=result_file("attention.json"), help="JSON to write")
    args = parser.parse_args(argv)
    at_least(parser, args, 1, ("rounds", "head_size", "threads"))
    check_device(parser, args)
    args.shape = args.shape or [shape(text) for text in DEFAULT_SHAPES[args.device]]
    args.threads = args.threads or [torch.get_num_threads()]
    return args


def draw_lengths(sequences: int, positions: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [sequences]; see the module docstring."""
    full = torch.rand(sequences, generator=generator) < 0.5
    cut = torch.rand(sequences, generator=generator) * 0.48 + 0.52
    lengths = torch.where(full, torch.ones(sequences), cut).mul(positions).round().long().clamp_min(1)
    return lengths.sort(descending=True).values


def make_sides(args: argparse.Namespace, size: tuple[int, int, int], dtype: torch.dtype) -> tuple[dict[str, Side], torch.Tensor]:
    """What is timed: functions of the dropout that give output and gradients, all as packed tokens [T, N, D]; and the lengths."""
    sequences, positions, heads = size
    generator = torch.Generator().manual_seed(args.seed)
    lengths = draw_lengths(sequences, positions, generator)
    mask_BS = torch.arange(positions) < lengths[:, None]
    where = mask_BS.flatten().nonzero().squeeze(1).to(args.device)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(args.device, torch.int32)
    padded = torch.randn(4, sequences, positions, heads, args.head_size, generator=generator).to(args.device, dtype)
    padded[3] *= mask_BS[..., None, None].to(args.device)  # nothing comes back from padding
    packed = padded.flatten(1, 2)[:, where]
    mask = mask_BS[:, None, None].to(args.device)

    def leaves(x: torch.Tensor) -> list[torch.Tensor]:
        return [part.clone().requires_grad_() for part in x[:3]]

    packed_leaves, padded_leaves = leaves(packed), leaves(padded)

    def finish(out: torch.Tensor, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    def berth(dropout_p: float) -> list[torch.Tensor]:
        return finish(varlen_attention(*packed_leaves, cu_seqlens, positions, dropout_p), packed_leaves, packed[3])

    def torch_padded(dropout_p: float) -> list[torch.Tensor]:
        query, key, value = (x.transpose(1, 2) for x in padded_leaves)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p).transpose(1, 2)
        return finish(out, padded_leaves, padded[3])

    def torch_packed(dropout_p: float) -> list[torch.Tensor]:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(*packed_leaves, cu_seqlens, cu_seqlens, positions, positions)
        return finish(out, packed_leaves, packed[3])

    sides: dict[str, Side] = {"berth": berth, "padded": torch_padded}
    if args.device == "cuda" and unsupported(args.device, dtype, args.head_size) is None:
        sides["varlen_attn, no dropout"] = torch_packed
    compare(sides, where, TOLERANCE["fp32" if dtype == torch.float32 else "bf16"])
    return sides, lengths


def compare(sides: dict[str, Side], where: torch.Tensor, tolerance: float) -> None:
    """Without dropout all sides give the same output and gradients at the real tokens; else the benchmark ends here."""
    want = [x.flatten(0, 1)[where].double() for x in sides["padded"](0.0)]
    for name in sides.keys() - {"padded"}:
        for number, (got, expected) in enumerate(zip(sides[name](0.0), want, strict=True)):
            error = ((got.double() - expected).norm() / expected.norm()).item()
            if not error <= tolerance:
                sys.exit(
                    f"error: {name}: result {number} of output, gradients of query, key, value differs from padded by {error:.2g} of its norm"
                )


def stopwatch(device: str) -> Callable[[Side], dict[str, float]]:
    """A function that runs a side with dropout once and gives milliseconds."""

    def on_gpu(side: Side) -> dict[str, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        side(DROPOUT)
        end.record()
        end.synchronize()
        return {"ms": start.elapsed_time(end)}

    def on_cpu(side: Side) -> dict[str, float]:
        start, start_cpu = time.perf_counter(), time.process_time()
        side(DROPOUT)
        return {"ms": (time.perf_counter() - start) * 1000, "cpu_ms": (time.process_time() - start_cpu) * 1000}

    return on_gpu if device == "cuda" else on_cpu


def time_sides(args: argparse.Namespace, size: tuple[int, int, int], precision: str) -> dict[str, Any]:
    """Times of every round, what they come to, and the fill."""
    torch.manual_seed(args.seed)
    sides, lengths = make_sides(args, size, PRECISIONS[precision])
    measure = stopwatch(args.device)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(args.rounds + 2):
        for name, side in sides.items():
            measured = measure(side)
            if number > 1:
                times[name].append(measured)
    tera = 12 * size[2] * args.head_size * lengths.square().sum().item() / 1e12
    result: dict[str, Any] = {
        "shape": dict(zip(("sequences", "positions", "heads"), size, strict=True)),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "fill": lengths.double().mean().item() / size[1],
        "times": times,
    }
    for kind in times["berth"][0]:
        result[f"min_{kind}"] = {name: min(t[kind] for t in rounds) for name, rounds in times.items()}
        pairs = zip(times["berth"], times["padded"], strict=True)
        result[f"ratio_{kind}"] = statistics.median(ours[kind] / theirs[kind] for ours, theirs in pairs)
    result["teraflops"] = {name: tera / (milliseconds / 1000) for name, milliseconds in result["min_ms"].items()}
    return result


def print_row(result: dict[str, Any]) -> None:
    size = "x".join(str(number) for number in result["shape"].values())
    for name, milliseconds in result["min_ms"].items():
        ratios = f"{result['ratio_ms']:>8.3f}{result.get('ratio_cpu_ms', float('nan')):>8.3f}" if name == "berth" else f"{'1':>8}{'1':>8}"
        threads, speed = result["threads"], result["teraflops"][name]
        blank = " " * 16 if name.startswith("varlen") else ratios
        print(
            f"{size:<12}{result['precision']:<6}{threads:>3}  {name:<24}{result['fill']:>6.2f}{milliseconds:>10.2f}{speed:>9.3f}{blank}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    results = []
    print(f"{'shape':<12}{'type':<6}{'thr':>3}  {'side':<24}{'fill':>6}{'min ms':>10}{'TFLOP/s':>9}{'ratio':>8}{'cpu':>8}")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for size in args.shape:
            for precision in PRECISIONS if args.precision == "all" else (args.precision,):
                reason = unsupported(args.device, PRECISIONS[precision], args.head_size)
                if reason:
                    print(f"{'x'.join(map(str, size)):<12}{precision:<6}left out: {reason}")
                    continue
                results.append(time_sides(args, size, precision))
                print_row(results[-1])
    about = machine(
        gpu=torch.cuda.get_device_name() if args.device == "cuda" else None,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__,
        omp_wait_policy=os.environ["OMP_WAIT_POLICY"],
        load=os.getloadavg()[0],
    )
    options = {key: value for key, value in vars(args).items() if key != "output"}
    write_json(args.output, {"machine": about, "options": options, "results": results})
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
