"""Whole training steps on one device: run_pretraining.py's against ``transformers``' BertForPreTraining, in turns.

    python benchmarks/gpu_pretrain.py --model large --seq 128 --fill 1.0 real --precision bf16 --peer hf-compiled

A step is forward, backward, clipping and LAMB: the same LAMB, rate, clipping and samples on both sides, dropout 0.1.
Berth's side is a command line of run_pretraining.py, which stands in the JSON; the peer is a plain loop with sdpa attention over batches padded to
the full length, as its users run it, eager (``hf``) or through torch.compile (``hf-compiled``). ``berth-eager`` is berth without compilation,
``berth-plain`` without any part of the fast path.

First berth and the peer (eager, ``--check_layers`` layers, dropout 0) take four steps from the same weights: losses and gradient norms must agree,
or nothing is timed. Then the sides alternate (A B A B ...), ``--steps`` steps a turn, between synchronisations of the device; a speed-up is the
median of the ratios within a round. Batches lie in host memory beforehand (the peer's pinned) and are copied within the step. With ``--records``
berth reads its batches while training, and the share of the time that it waits for them is printed.

TFLOP/s count what the model asks for at real tokens (berth/flops.py), whoever computes padding beside them; ``full seq/s`` is the same work in
sequences without padding; ``ceiling`` is the share of what a large matrix product reaches, measured between the turns. Prints a table and writes it
as JSON after every round, so that what was measured survives an interruption. Rejected: ratios of means over separate runs (clocks and neighbours
change between them); dropout 0 for the timing (nobody trains so); one micro-batch size for all GPUs (see benchmarks/tune.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_common import (
    FILLS,
    REPO,
    BerthSide,
    PeerSide,
    Side,
    device_facts,
    held_bytes,
    load_sizes,
    loss_of,
    make_rows,
    matmul_tflops,
    peak_gib,
    predictions_of,
    short_name,
    synchronize,
    where_time_goes,
    write_records,
)

import modeling
from berth.errors import ConfigError, TrainingError, run_main
from berth.files import write_json
from berth.flops import step_flops
from berth.kernels.fp8 import Fp8Linear
from berth.ranks import Place
from berth.training.distributed import choose_device

PRECISIONS = ("bf16", "fp16", "fp8", "tf32", "fp32")
OURS: dict[str, tuple[str, ...]] = {
    "berth": (),
    "berth-eager": ("--compile", "off"),
    "berth-plain": (
        "--compile", "off", "--unpad", "off", "--fused_loss", "off", "--fused_qkv", "off", "--fast_dropout", "off", "--no_copy_ahead",
        "--optimizer_backend", "berth",
    ),
}  # fmt: skip
"""Options of run_pretraining.py by side."""
PEERS = ("hf", "hf-compiled", "none")
TOLERANCES = {"fp32": (1e-5, 1e-4), "tf32": (1e-3, 1e-2), "fp16": (1e-3, 1e-2), "bf16": (2e-3, 2e-2), "fp8": (2e-2, 2e-1)}
"""How far losses and gradient norms of the sides may be apart, relatively; fp8 is compared with bf16."""
CHECK_STEPS, CHECK_SEQUENCES = 4, 16
"""Steps on one batch: a CUDA graph is recorded after two runs of a shape, and what is replayed must be right, too."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Both sides and their batches are in memory at once. benchmarks/tune.py looks for the best micro-batch and switches.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="large", help="tiny, small, base, large (bert_configs), or a configuration file")
    add("--seq", type=int, default=128, help="positions of a sequence; at most 20 of them are masked at 128, 80 at 512")
    add("--fill", nargs="+", choices=FILLS, default=["1.0"], help="1.0: no padding; real: half of the sequences are 52 to 100 %% full")
    add("--records", help="train on these records instead, read while training (one fill, named records)")
    add("--precision", choices=PRECISIONS, default="bf16", help="of both sides; fp8 against a peer in bf16")
    add("--peer", choices=PEERS, nargs="+", default=["hf-compiled"], help="transformers, eager or compiled; ratios are to the last one")
    add("--sides", choices=tuple(OURS), nargs="+", default=["berth"], help="berth's ways")
    add("--micro_batch", type=int, help="sequences of a forward pass (default: 32768 tokens' worth on a GPU, 1024 elsewhere)")
    add("--peer_micro_batch", type=int, help="the peer's, where another one serves it better (default: the same)")
    add("--accumulation", type=int, default=1, help="forward passes of a step")
    add("--rounds", type=int, default=5, help="turns of each side")
    add("--steps", type=int, default=4, help="optimizer steps of a turn")
    add(
        "--warmup",
        type=int,
        help="times that each side runs its steps untimed before its first turn on a fill (default: 4 on a GPU, else 1)",
    )
    add("--dropout", type=float, default=0.1, help="of hidden states and attention, both sides")
    add(
        "--run_options", default="", help="more options of run_pretraining.py for berth's sides, in one word: --run_options='--cuda_graphs'"
    )
    add("--check_layers", type=int, default=2, help="layers of the models that are compared first")
    add("--no_check", action="store_true", help="do not compare the sides first")
    add("--profile", action="store_true", help="where the time of berth's first side goes, by group of kernels")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--threads", type=int, help="threads of torch (default: torch decides)")
    add("--seed", type=int, default=0, help="of weights, samples and dropout")
    add("--output", type=Path, help="JSON to write (default: benchmarks/results/gpu_pretrain_<device>_<model>_<seq>_<precision>.json)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("seq", "micro_batch", "peer_micro_batch", "accumulation", "rounds", "steps", "warmup", "check_layers", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    if args.seq < 16:
        parser.error(f"--seq {args.seq}: must be at least 16")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout {args.dropout}: must be at least 0 and below 1")
    if "none" in args.peer and len(args.peer) > 1:
        parser.error("--peer none: excludes other peers")
    if args.records is not None and not Path(args.records).exists():
        parser.error(f"--records {args.records}: does not exist; give a folder of records (create_pretraining_data.py)")
    args.peer = [peer for peer in dict.fromkeys(args.peer) if peer != "none"]
    args.sides, args.fill = list(dict.fromkeys(args.sides)), list(dict.fromkeys(args.fill))
    return args


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is built once the device is known. ``folders``: records by the name of their fill."""

    args: argparse.Namespace
    device: torch.device
    micro_batch: int
    work: Path
    folders: dict[str, str]

    @property
    def share(self) -> int:
        """Sequences of an optimizer step."""
        return self.micro_batch * self.args.accumulation

    @property
    def pool(self) -> int:
        """Steps prepared beforehand; 0 with --records."""
        return 0 if self.args.records else self.args.steps

    def command(self, side: str, sizes: Path, folder: str, *, micro_batch: int, accumulation: int) -> list[str]:
        """The command line of run_pretraining.py of one of berth's sides."""
        args = self.args
        options: dict[str, Any] = {
            "input_dir": folder, "config_file": sizes, "output_dir": self.work / "output", "max_seq_length": args.seq,
            "train_batch_size": micro_batch * accumulation, "gradient_accumulation_steps": accumulation, "max_steps": 10**9,
            "optimizer": "lamb", "learning_rate": 1e-3, "warmup_proportion": 0.0, "lr_schedule": "constant", "precision": args.precision,
            "init_loss_scale": 2.0**16, "seed": args.seed, "tensorboard_dir": "none", "device": self.device.type,
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [*words, *OURS[side], *shlex.split(args.run_options)]


def make_plan(args: argparse.Namespace, work: Path) -> Plan:
    """Choose device and micro-batch, and write records of every fill."""
    device = choose_device(args.device, Place())
    micro_batch = args.micro_batch or max(1, (32768 if device.type == "cuda" else 1024) // args.seq)
    plan = Plan(args, device, micro_batch, work, {"records": args.records} if args.records else {})
    vocab_size = load_sizes(args.model, args.seq, dropout=args.dropout)["vocab_size"]
    if not args.records:
        for fill in args.fill:
            rows = make_rows(plan.share * args.steps, args.seq, fill, vocab_size, args.seed)
            write_records(work / f"fill-{fill}", rows)
            plan.folders[fill] = str(work / f"fill-{fill}")
    write_records(work / "check", make_rows(CHECK_SEQUENCES, args.seq, "real", vocab_size, args.seed))
    return plan


def write_sizes(plan: Plan, name: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
    sizes = load_sizes(plan.args.model, plan.args.seq, **changes)
    write_json(plan.work / f"{name}.json", sizes)
    return plan.work / f"{name}.json", sizes


# -- correctness first -----------------------------------------------------------------------------------------------------------------


def check_sides(plan: Plan) -> dict[str, Any]:
    """Losses and gradient norms of some steps of berth's sides and of the eager peer, from the same weights and without dropout.

    Raises :class:`TrainingError` when they do not agree within :data:`TOLERANCES`.
    """
    args = plan.args
    path, sizes = write_sizes(plan, "check", dropout=0.0, layers=args.check_layers)
    found: dict[str, Any] = {"layers": sizes["num_hidden_layers"], "sides": {}, "tolerances": TOLERANCES[args.precision]}
    for name in args.sides:
        argv = plan.command(name, path, str(plan.work / "check"), micro_batch=CHECK_SEQUENCES, accumulation=1)
        ours = BerthSide(name, argv, pool=1)
        sides: list[Side] = [ours, PeerSide("hf", ours, sizes, compiled=False)]
        for side in sides:
            side.prepare(CHECK_STEPS)
            results = [side.step()[1] for _ in range(CHECK_STEPS)]
            found["sides"][side.name] = {
                "losses": [loss_of(result) for result in results],
                "grad_norms": [float(result.grad_norm) for result in results],
            }
        fp8_layers = sum(isinstance(module, Fp8Linear) for module in ours.run.parallel.module.modules())
        found["sides"][name] |= {
            "fast_path": ours.run.fast.name,
            "optimizer": type(ours.run.parallel.optimizer).__name__,
            "graphs": recorded(ours),
            "fp8_layers": fp8_layers,
        }
        compare(found, name)
    return found


def recorded(side: BerthSide) -> dict[str, Any] | None:
    """How many CUDA graphs a side holds, and whether recording failed; None without --cuda_graphs.

    Raises :class:`TrainingError` when it failed or nothing was recorded: what is timed then would not be what was asked for.
    """
    graphs = side.run.step.graphs
    if graphs is None:
        return None
    if graphs.failed or not len(graphs):
        what = "recording failed" if graphs.failed else "nothing was recorded"
        raise TrainingError(f"{side.name} --cuda_graphs: {what} (see the log above); time it without --cuda_graphs")
    return {"recorded": len(graphs), "failed": graphs.failed}


def compare(found: dict[str, Any], name: str) -> None:
    """Raise :class:`TrainingError` when side ``name`` is further from the peer than allowed."""
    loss_tolerance, norm_tolerance = found["tolerances"]
    for what, tolerance in (("losses", loss_tolerance), ("grad_norms", norm_tolerance)):
        for step, (ours, theirs) in enumerate(zip(found["sides"][name][what], found["sides"]["hf"][what], strict=True), 1):
            if not abs(ours - theirs) <= tolerance * abs(theirs):
                raise TrainingError(
                    f"{name} and transformers do not compute the same: {what} of step {step} are {ours:.6g} and {theirs:.6g}, relatively more "
                    f"than {tolerance:g} apart; nothing was timed. Look for the part with --run_options, or time all the same with --no_check"
                )


# -- timing ----------------------------------------------------------------------------------------------------------------------------


def build_sides(plan: Plan) -> tuple[list[Side], dict[str, dict[str, int]], dict[str, str]]:
    """The sides, warm; the memory each holds between steps, and why a peer is left out."""
    args = plan.args
    path, sizes = write_sizes(plan, "timed", dropout=args.dropout)
    first = next(iter(plan.folders.values()))
    sides: list[Side] = []
    held: dict[str, dict[str, int]] = {}
    failed: dict[str, str] = {}
    for name in (*args.sides, *args.peer):
        before = held_bytes(plan.device)
        try:
            side: Side
            if name in OURS:
                argv = plan.command(name, path, first, micro_batch=plan.micro_batch, accumulation=args.accumulation)
                side = BerthSide(name, argv, plan.pool)
            else:
                beside = next(side for side in sides if isinstance(side, BerthSide))
                side = PeerSide(name, beside, sizes, compiled=name == "hf-compiled", micro_batch=args.peer_micro_batch)
            warm_up(side, plan)
        except RuntimeError as error:  # out of memory, or no compiler: berth alone is still worth a number
            if name in OURS:
                raise
            failed[name] = str(error).strip().splitlines()[0]
            print(f"{name} is left out: {failed[name]}", file=sys.stderr)
            continue
        after = held_bytes(plan.device)
        held[name] = {kind: after[kind] - before[kind] for kind in after}
        sides.append(side)
    return sides, held, failed


def warm_up(side: Side, plan: Plan) -> None:
    """Every prepared step some times: each may have a shape of its own to compile, to choose kernels for, and to record after a few runs."""
    steps = plan.args.steps * (plan.args.warmup or (4 if plan.device.type == "cuda" else 1))
    side.prepare(steps)
    for _ in range(steps):
        side.step()


def take_turn(side: Side, plan: Plan) -> dict[str, Any]:
    """Seconds of a turn, of them waiting for data, and what was skipped."""
    side.prepare(plan.args.steps)
    side.waited = 0.0
    synchronize(plan.device)
    start = time.perf_counter()
    steps = [side.step() for _ in range(plan.args.steps)]
    synchronize(plan.device)
    seconds = time.perf_counter() - start
    if isinstance(side, BerthSide):
        side.run.clock.take()
    return {
        "seconds": seconds,
        "waited": side.waited,
        "skipped": sum(bool(result.skipped) for _, result in steps),
        "loss": loss_of(steps[-1][1]),
        "batches": [batch for batch, _ in steps if batch is not None],
    }


def time_fill(plan: Plan, fill: str, sides: list[Side], held: dict[str, dict[str, int]], save: Any) -> dict[str, Any]:
    """All rounds on one fill; ``save`` is called with the result after each."""
    args = plan.args
    for side in sides:
        if Path(plan.folders[fill]) != Path(side.folder):
            side.follow(plan.folders[fill])
            warm_up(side, plan)
    counts = {"sequences": 0, "tokens": 0, "squares": 0, "masked": 0}
    turns: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    ceilings: list[float] = []
    result: dict[str, Any] = {}
    for _ in range(args.rounds):
        for side in sides:
            turn = take_turn(side, plan)
            batches = turn.pop("batches")
            if side is sides[0]:
                ceilings.append(matmul_tflops(plan.device, args.precision, repeats=5))
                for key in counts:
                    counts[key] += sum(getattr(batch, key) for batch in batches)
            turns[side.name].append(turn)
        result = summarise(plan, fill, turns, counts, statistics.median(ceilings))
        save(result)
    for side in sides:
        result["sides"][side.name]["peak_gib"] = peak_gib(side, plan.device, held[side.name])
    save(result)
    return result


def summarise(plan: Plan, fill: str, turns: dict[str, list[dict[str, Any]]], counts: dict[str, int], ceiling: float) -> dict[str, Any]:
    """Rates by side. ``counts`` are of all rounds of one side; every side had the same samples."""
    args = plan.args
    sizes = modeling.BertConfig.from_dict(load_sizes(args.model, args.seq, dropout=args.dropout))
    total = {key: float(value) for key, value in counts.items()}
    flops = step_flops(sizes, tokens=counts["tokens"], squares=counts["squares"], masked=counts["masked"], pairs=counts["sequences"])
    full = step_flops(sizes, tokens=args.seq, squares=args.seq**2, masked=predictions_of(args.seq), pairs=1)
    rounds = len(next(iter(turns.values())))
    reference = [turn["seconds"] for turn in list(turns.values())[-1]]
    described: dict[str, Any] = {}
    for name, listed in turns.items():
        seconds = [turn["seconds"] for turn in listed]
        middle = statistics.median(seconds)
        described[name] = {
            "seconds_per_step": [value / args.steps for value in seconds],
            "sequences_per_second": total["sequences"] / rounds / middle,
            "tokens_per_second": total["tokens"] / rounds / middle,
            "tflops": flops / rounds / middle / 1e12,
            "share_of_ceiling": flops / rounds / middle / 1e12 / ceiling,
            "full_length_sequences_per_second": flops / rounds / middle / full,
            "speedup": statistics.median(theirs / own for own, theirs in zip(seconds, reference, strict=True)),
            "data_wait_share": sum(turn["waited"] for turn in listed) / sum(seconds),
            "skipped_steps": sum(turn["skipped"] for turn in listed),
            "last_loss": listed[-1]["loss"],
        }
    return {
        "fill": total["tokens"] / (total["sequences"] * args.seq),
        "distribution": fill,
        "predictions_per_sequence": total["masked"] / total["sequences"],
        "tokens_per_step": total["tokens"] / rounds / args.steps,
        "gflops_per_sequence": flops / total["sequences"] / 1e9,
        "ceiling_tflops": ceiling,
        "rounds": rounds,
        "speedup_to": list(turns)[-1],
        "sides": described,
    }


# -- output ----------------------------------------------------------------------------------------------------------------------------


def print_table(result: dict[str, Any], with_waiting: bool) -> None:
    fill = f"fill {result['fill']:.3f} ({result['distribution']})"
    print(
        f"\n{fill}, {result['predictions_per_sequence']:.1f} predictions a sequence; a matrix product reaches {result['ceiling_tflops']:.4g} TFLOP/s"
    )
    head = f"{'side':<14}{'ms/step':>10}{'seq/s':>10}{'tokens/s':>12}{'TFLOP/s':>10}{'ceiling':>9}{'full seq/s':>12}{'peak GiB':>10}{'speed-up':>10}"
    print(head + (f"{'waits':>8}" if with_waiting else ""))
    for name, side in result["sides"].items():
        peak = side.get("peak_gib")
        line = f"{name:<14}{statistics.median(side['seconds_per_step']) * 1e3:>10.1f}{side['sequences_per_second']:>10.1f}"
        line += f"{side['tokens_per_second']:>12.0f}{side['tflops']:>10.4g}{side['share_of_ceiling']:>9.1%}"
        memory = "-" if peak is None else f"{peak['reserved']:.1f}"
        line += f"{side['full_length_sequences_per_second']:>12.1f}{memory:>10}{side['speedup']:>10.2f}"
        print(line + (f"{side['data_wait_share']:>8.1%}" if with_waiting else ""))
    skipped = {name: side["skipped_steps"] for name, side in result["sides"].items() if side["skipped_steps"]}
    if skipped:
        print(f"steps skipped for gradients that are not finite (their time is that of a step without an update): {skipped}")


def print_profile(profile: dict[str, Any]) -> None:
    print(f"\n{profile['side']}: {profile['wall_us']:.0f} us a step, of them idle {profile['idle_us']:.0f}")
    print(f"{'group':<36}{'us a step':>12}{'share':>8}{'calls':>9}")
    for name, group in profile["groups"].items():
        print(f"{name:<36}{group['us']:>12.0f}{group['share']:>8.1%}{group['calls']:>9.0f}")


def shown(word: str, plan: Plan) -> str:
    """A word of a command line, without the folders of this machine."""
    word = word.replace(str(plan.work), "<work>")
    return Path(word).name if os.path.isabs(word) else word


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything; the report that is also on disk, at ``args.output``."""
    plan = make_plan(args, work)
    model = Path(args.model).stem
    output = args.output or REPO / f"benchmarks/results/gpu_pretrain_{short_name(plan.device)}_{model}_{args.seq}_{args.precision}.json"
    options = {key: shown(value, plan) if isinstance(value, str) else value for key, value in vars(args).items() if key != "output"}
    report: dict[str, Any] = {"machine": device_facts(plan.device), "options": options, "complete": False, "results": {}}
    if not args.no_check and args.peer:
        report["check"] = check_sides(plan)
        agreed = {name: [f"{loss:.6g}" for loss in side["losses"]] for name, side in report["check"]["sides"].items()}
        print(f"{CHECK_STEPS} steps with {report['check']['layers']} layers and without dropout agree: {agreed}")
    sides, held, failed = build_sides(plan)
    ours = [side for side in sides if isinstance(side, BerthSide)]
    report |= {
        "batch": {"micro_batch": plan.micro_batch, "accumulation": args.accumulation, "sequences": plan.share},
        "parameters": ours[0].run.parameters,
        "commands": {side.name: ["run_pretraining.py", *(shown(word, plan) for word in side.argv)] for side in ours},
        "fast_path": {side.name: [side.run.fast.name, *side.run.fast.reasons] for side in ours},
        "failed": failed,
    }
    for fill in plan.folders:

        def save(result: dict[str, Any], fill: str = fill) -> None:
            report["results"][fill] = result
            write_json(output, report)

        print_table(time_fill(plan, fill, sides, held, save), bool(args.records))
    if args.profile:
        report["profile"] = {"side": ours[0].name, **where_time_goes(ours[0], plan.device, min(args.steps, 3))}
        print_profile(report["profile"])
    report["graphs"] = {side.name: recorded(side) for side in ours}
    for side in sides:
        side.close()
    report["complete"] = True
    write_json(output, report)
    print(f"written: {output}")
    return report


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.peer:
        try:
            import transformers  # noqa: F401 - before anything is timed
        except ImportError as error:
            raise ConfigError(f"--peer {' '.join(args.peer)}: {error}; install transformers, or use --peer none") from error
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


if __name__ == "__main__":
    run_main(main)
