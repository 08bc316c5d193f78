"""What sharding costs and saves: step time of every stage against unsharded, and the bytes each rank holds.

    python benchmarks/sharding.py --rounds 8

Starts the ranks as processes over gloo on this machine. Each holds one model a stage; stages take turns step by step (A B C D A B ...), so that
other work on the machine hits all of them, and the ratio is the median of the ratios to ``none`` within a round. Without a network between the
ranks and with few of them, time shows what the stages do beside the reduction, not what a cluster would show.

Memory is counted, not sampled: storages of parameters, gradients (after the backward pass) and optimizer state (after the update) on rank 0.
With it stands the formula in bytes a parameter, and what it says of BERT-large. DeepSpeed's stages are timed where it is installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from machine import machine  # noqa: E402

import modeling  # noqa: E402 - found beside this folder, installed or not
from berth.errors import ConfigError  # noqa: E402
from berth.files import write_json  # noqa: E402
from berth.training.backends import Choice  # noqa: E402
from berth.training.distributed import Communicator, Rank  # noqa: E402
from berth.training.metrics import StepClock  # noqa: E402
from berth.training.options import SHARDINGS  # noqa: E402
from berth.training.parallel import Parallel, Recipe, Replicated  # noqa: E402
from berth.training.sharded import FullySharded, Zero1  # noqa: E402

BERT_LARGE = 336_232_258
"""Parameters of BERT-large with both pretraining heads, vocabulary 30,528."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="A quiet machine gives a sharper result; the ratios are robust against a busy one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each stage, after one untimed step")
    parser.add_argument("--optimizer", choices=("lamb", "adamw"), default="lamb", help="optimizer of all stages")
    parser.add_argument("--layers", type=int, default=4, help="encoder layers")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size; 64 a head, feed-forward 4 times as wide")
    parser.add_argument("--vocab_size", type=int, default=8192, help="rows of the word embedding")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences of 64 positions a rank and step")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks/results/sharding.json", help="JSON to write")
    args = parser.parse_args(argv)
    for name, least in (("ranks", 2), ("rounds", 1), ("layers", 1), ("hidden", 64), ("vocab_size", 1000), ("batch_size", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.hidden % 64:
        parser.error(f"--hidden {args.hidden}: must be a multiple of 64, the size of a head")
    return args


def bytes_per_parameter(stage: str, ranks: int) -> dict[str, float]:
    """Float32 bytes that each rank holds of every parameter between passes, by what they are."""
    share = 4 / ranks
    whole = {"parameters": 4.0, "gradients": 4.0}
    return {
        "none": {**whole, "state": 8.0},
        "zero1": {**whole, "state": 2 * share},
        "zero2": {"parameters": share, "gradients": share, "state": 2 * share},
        "zero3": {"parameters": share, "gradients": share, "state": 2 * share},
    }[stage]


def peak_per_parameter(stage: str, ranks: int, layers: int, layer: int, total: int) -> float:
    """Bytes of every parameter at the worst moment of a step in float32 without accumulation.

    To what is held comes in the backward pass, for zero2: all parameters gathered; for zero3: the embeddings and heads, and two layers of
    ``layer`` parameters (one at work, one on its way); for both: whole gradients of the embeddings and heads, and of the layer at work.
    Apart: activations, buffers of collectives, the scratch of the update, and under autocast 2 bytes for a 16-bit copy (all stages).
    """
    held = sum(bytes_per_parameter(stage, ranks).values())
    root = total - layers * layer
    if stage == "zero2":
        return held + 4 + 4 * (root + layer) / total
    if stage == "zero3":
        return held + 4 * (2 * root + 3 * layer) / total
    return held


def make_model(args: argparse.Namespace) -> modeling.BertForPreTraining:
    torch.manual_seed(0)
    config = modeling.BertConfig.from_dict(
        {
            "vocab_size": args.vocab_size,
            "hidden_size": args.hidden,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.hidden // 64,
            "intermediate_size": 4 * args.hidden,
            "max_position_embeddings": 64,
        }
    )
    return modeling.BertForPreTraining(config).train()


def make_batch(args: argparse.Namespace, seed: int) -> dict[str, Tensor]:
    """Full sequences of random ids, of which 15 % are to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, args.vocab_size, (args.batch_size, 64), generator=generator)
    chosen = torch.rand(ids.shape, generator=generator) < 0.15
    chosen[:, 1] = True
    nsp = torch.randint(0, 2, (args.batch_size,), generator=generator)
    return {"input_ids": ids, "labels": torch.where(chosen, ids, -100), "next_sentence_label": nsp}


def native(stage: str, args: argparse.Namespace, communicator: Communicator) -> Parallel:
    recipe = Recipe(args.optimizer, 1e-4, 0.01, 1.0, Choice(None, None, "benchmark"))
    model, clock = make_model(args), StepClock(communicator.device)
    if stage == "none":
        return Replicated(model, communicator, clock, recipe)
    if stage == "zero1":
        return Zero1(model, communicator, clock, recipe)
    return FullySharded(model, communicator, clock, recipe, stage=int(stage[-1]))


def deepspeed(stage: int, args: argparse.Namespace, communicator: Communicator) -> Parallel:
    """``ImportError`` or ``ConfigError`` where DeepSpeed is not installed."""
    from berth.training.ds_engine import DeepSpeedParallel

    options: Any = SimpleNamespace(
        deepspeed="",
        deepspeed_zero_stage=stage,
        micro_batch=args.batch_size,
        gradient_accumulation_steps=1,
        max_grad_norm=1.0,
        reduce_dtype="fp32",
    )
    recipe = Recipe(args.optimizer, 1e-4, 0.01, 1.0, Choice(None, None, "benchmark"))
    return DeepSpeedParallel(make_model(args), communicator, StepClock(communicator.device), recipe, options)


def held_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind the tensors (of a distributed one: the rank's part), each storage once."""
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors if tensor is not None]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in local}.values())


def one_step(parallel: Parallel, batch: dict[str, Tensor]) -> dict[str, int]:
    """A step; the gradients' bytes between backward pass and update, and what else is held after it."""
    with parallel.micro_batch(last=True):
        parallel.backward(parallel.module(**batch).loss)
    parameters = list(parallel.module.parameters())
    gradients = held_bytes(parameter.grad for parameter in parameters)
    parallel.update(1.0, 1.0)
    state = held_bytes(value for entry in parallel.optimizer.state.values() for key, value in entry.items() if key != "step")
    return {"parameters": held_bytes(parameters), "gradients": gradients, "state": state}


def deepspeed_stages(args: argparse.Namespace, communicator: Communicator) -> Iterator[tuple[str, Parallel]]:
    """Nothing where it is not installed."""
    try:
        for stage in (1, 2, 3):
            yield f"deepspeed {stage}", deepspeed(stage, args, communicator)
    except (ImportError, ConfigError) as error:
        if communicator.is_main:
            print(f"without DeepSpeed: {error}")


def rank_main(rank: int, args: argparse.Namespace, port: int, file: str) -> None:
    """What each process does; rank 0 leaves its measurements in ``file``."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    communicator = Communicator(Rank(rank, args.ranks, rank, "torchrun"), torch.device("cpu"), datetime.timedelta(minutes=5))
    stages = {stage: native(stage, args, communicator) for stage in SHARDINGS} | dict(deepspeed_stages(args, communicator))
    held: dict[str, dict[str, int]] = {}
    times: dict[str, list[float]] = {stage: [] for stage in stages}
    for turn in range(args.rounds + 1):
        batch = make_batch(args, turn * args.ranks + rank)
        for stage, parallel in stages.items():
            communicator.barrier()
            start = time.perf_counter()
            held[stage] = one_step(parallel, batch)
            if turn:  # the first lays out buffers
                times[stage].append((time.perf_counter() - start) * 1000)
    if communicator.is_main:
        own = {stage: held[stage] for stage in SHARDINGS}  # DeepSpeed hides its own
        write_json(Path(file), {"times_ms": times, "held_bytes": own})
    communicator.barrier()
    communicator.close()


def summarise(measured: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """By stage: milliseconds, ratio to ``none``, bytes held, and the formula's."""
    parameters = sum(parameter.numel() for parameter in make_model(args).parameters())
    times = measured["times_ms"]
    result: dict[str, Any] = {}
    for stage, listed in times.items():
        ratios = [mine / plain for mine, plain in zip(listed, times["none"], strict=True)]
        result[stage] = {
            "times_ms": listed,
            "min_ms": min(listed),
            "median_ms": statistics.median(listed),
            "ratio": statistics.median(ratios),
        }
        if stage in measured["held_bytes"]:
            held = measured["held_bytes"][stage]
            formula = bytes_per_parameter(stage, args.ranks)
            result[stage] |= {"held_bytes": held, "formula_bytes": {key: round(each * parameters) for key, each in formula.items()}}
    return {"parameters": parameters, "stages": result}


def bert_large() -> dict[str, Any]:
    """GiB on each of some numbers of GPUs, by stage: held between passes, and at the worst moment of a step."""
    hidden, layers = 1024, 24
    layer = 12 * hidden * hidden + 13 * hidden
    return {
        str(ranks): {
            stage: {
                "held_gib": BERT_LARGE * sum(bytes_per_parameter(stage, ranks).values()) / 2**30,
                "peak_gib": BERT_LARGE * peak_per_parameter(stage, ranks, layers, layer, BERT_LARGE) / 2**30,
            }
            for stage in SHARDINGS
        }
        for ranks in (8, 64)
    }


def print_tables(results: dict[str, Any], large: dict[str, Any]) -> None:
    print(f"{results['parameters']:,} parameters; MB held on a rank (formula)")
    print(f"{'stage':<13}{'min ms':>9}{'median ms':>11}{'ratio':>8}{'parameters':>18}{'gradients':>18}{'state':>18}")
    for stage, found in results["stages"].items():
        line = f"{stage:<13}{found['min_ms']:>9.1f}{found['median_ms']:>11.1f}{found['ratio']:>8.2f}"
        for part in found.get("held_bytes", {}):
            line += f"{found['held_bytes'][part] / 1e6:>10.2f} ({found['formula_bytes'][part] / 1e6:.2f})"
        print(line)
    print(f"\nBERT-large, GiB a GPU: {'held':>10}{'peak':>8}")
    for ranks, stages in large.items():
        for stage, sizes in stages.items():
            print(f"{ranks + ' GPUs ' + stage:<22}{sizes['held_gib']:>11.2f}{sizes['peak_gib']:>8.2f}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        torch.multiprocessing.spawn(rank_main, (args, port, str(file)), nprocs=args.ranks)
        results = summarise(json.loads(file.read_text(encoding="utf-8")), args)
    large = bert_large()
    print_tables(results, large)
    options = {key: value for key, value in vars(args).items() if key != "output"}
    write_json(
        args.output, {"machine": machine(threads=1, torch=torch.__version__), "options": options, "results": results, "bert_large": large}
    )
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
