"""How long a training step waits for its data when the device takes sequences at a given rate.

    python benchmarks/data_wait.py --records workdir/records/hdf5_..._seq_len_128_... --rates 2050 2300

Steps come from records on disk as run_pretraining.py takes them: shuffled over all files, checked, packed without padding, prepared ahead by its
thread. The device is a clock: a step of N sequences at a rate R takes N / R seconds, in which this process sleeps, as a host does that has
launched its kernels. What is waited for is the time in ``next()``. The last line of each length is the rate at which one process prepares
batches with nothing else to do: that many devices of the rate above it could feed by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from arguments import at_least, result_file  # noqa: E402
from machine import machine  # noqa: E402

from berth.errors import run_main  # noqa: E402 - found beside this folder, installed or not
from berth.files import write_json  # noqa: E402
from berth.records.reader import RecordsIndex, SampleStream, open_index  # noqa: E402
from berth.training.batches import BatchPlan, step_batches  # noqa: E402

VOCABULARY = 1 << 16  # every id that narrow records can hold


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--records", type=Path, required=True, help="folder of training records, of any length")
    parser.add_argument("--rates", type=float, nargs="+", default=[2050.0, 2300.0], help="sequences a second of the device")
    parser.add_argument("--train_batch_size", type=int, default=1024, help="sequences of a step")
    parser.add_argument("--micro_batch", type=int, default=128, help="sequences of a forward pass")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each rate is kept up")
    parser.add_argument("--num_workers", type=int, default=2, help="steps prepared ahead, as the option of run_pretraining.py")
    parser.add_argument("--padded", action="store_true", help="padded micro-batches instead of packed ones")
    parser.add_argument("--output", type=Path, default=result_file("data_wait.json"), help="JSON; results of other lengths are kept")
    args = parser.parse_args(argv)
    if not args.records.exists():
        parser.error(f"--records {args.records}: does not exist; give a folder of records (create_pretraining_data.py)")
    at_least(parser, args, 0, ("num_workers",))
    if args.train_batch_size < 1 or args.micro_batch < 1 or args.train_batch_size % args.micro_batch:
        parser.error(f"--train_batch_size {args.train_batch_size}: must be a multiple of --micro_batch {args.micro_batch}")
    if min(args.rates) <= 0 or args.seconds <= 0:
        parser.error("--rates and --seconds must be positive")
    return args


def plan_of(args: argparse.Namespace) -> BatchPlan:
    size, micro = args.train_batch_size, args.micro_batch
    return BatchPlan(size, micro, size // micro, 0, 1, unpad=not args.padded)


def wait_share(args: argparse.Namespace, index: RecordsIndex, rate: float) -> dict[str, float]:
    """Seconds waited for data and its share of the time, after two steps that fill the queue."""
    plan = plan_of(args)
    batches = step_batches(SampleStream(index, 1, VOCABULARY, group=args.train_batch_size), plan, 0, args.num_workers)
    step, waited, worst = args.train_batch_size / rate, 0.0, 0.0
    for _ in range(2):
        next(batches)
        time.sleep(step)
    begin, cpu = time.perf_counter(), time.process_time()
    steps = max(3, round(args.seconds / step))
    for _ in range(steps):
        asked = time.perf_counter()
        next(batches)
        took = time.perf_counter() - asked
        waited, worst = waited + took, max(worst, took)
        time.sleep(step)
    total = time.perf_counter() - begin
    share = {
        "rate": rate,
        "share": waited / total,
        "worst_ms": 1000 * worst,
        "steps": steps,
        "cpu_share": (time.process_time() - cpu) / total,
    }
    batches.close()
    return share


def most(args: argparse.Namespace, index: RecordsIndex) -> float:
    """Sequences a second of one process that does nothing else: three epochs, or as long as a rate is kept up."""
    plan, stream = plan_of(args), SampleStream(index, 1, VOCABULARY, group=args.train_batch_size)
    begin, at = time.perf_counter(), 0
    while at < 3 * index.rows and time.perf_counter() - begin < args.seconds:
        plan.build(stream, at)
        at += args.train_batch_size
    return at / (time.perf_counter() - begin)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    index = open_index(args.records, "training")
    form = "padded" if args.padded else "packed"
    print(f"{index.rows} sequences of {index.seq_length} tokens, {form}, steps of {args.train_batch_size}")
    print(f"{'sequences/s':>12}{'waits for data':>16}{'longest, ms':>13}{'CPU of a core':>15}")
    results = []
    for rate in args.rates:
        result = wait_share(args, index, rate)
        results.append(result)
        print(f"{rate:>12,.0f}{result['share']:>16.3%}{result['worst_ms']:>13.2f}{result['cpu_share']:>15.1%}")
    limit = most(args, index)
    print(f"{limit:>12,.0f}  with nothing else to do")
    save(args, index.seq_length, {"form": form, "rates": results, "most": limit, "sequences": index.rows})


def save(args: argparse.Namespace, length: int, measured: dict[str, Any]) -> None:
    """One entry a length in the file."""
    known = json.loads(args.output.read_text(encoding="utf-8"))["results"] if args.output.exists() else {}
    options = {key: value for key, value in vars(args).items() if key not in ("output", "records")}
    entry = {"options": options, **measured}
    write_json(args.output, {"machine": machine(load=os.getloadavg()[0]), "results": known | {f"{length} {measured['form']}": entry}})
    print(f"written: {args.output}")


if __name__ == "__main__":
    run_main(main)
