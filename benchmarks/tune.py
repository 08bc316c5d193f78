"""Finds the fastest micro-batch and switches of the fast path for the GPU (or CPU) at hand, and writes the row of the performance matrix.

    python benchmarks/tune.py --platform dgx-h200 --phase 1 --precision bf16 --minutes 20

Every candidate is a process of its own (benchmarks/gpu_pretrain.py without a peer), so that one that runs out of memory or crashes is a line in the
table and no more. First the micro-batch grows, doubling, with the default switches, until memory ends or throughput falls twice in a row; then the
switches change one at a time and stay where they help; then micro-batches next to the best are tried; at last the best two take turns. Only
micro-batches that divide the recipe's batch of one process are candidates: others could not be trained with. Every step takes about as many
sequences, so that the optimizer weighs the same. For a row of several processes a candidate compiles as those do,
layer by layer. Prints a table and the row, writes both as JSON (after every candidate).

Rejected: a full grid (hours); trying inside one process (fragmented memory, and the first illegal access ends all); estimating what fits (the search
finds out anyway).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from berth.errors import ConfigError, LaunchError, run_main  # noqa: E402 - found beside this folder, installed or not
from berth.files import write_json  # noqa: E402
from berth.launch.matrix import Matrix, load_matrix  # noqa: E402
from berth.launch.plan import option_words  # noqa: E402
from berth.launch.rows import DEFAULT_RECIPE, Row  # noqa: E402

SWITCHES: dict[str, dict[str, tuple[str | bool, ...]]] = {
    "cuda": {
        "compile": ("layers", "off"),
        "cuda_graphs": (True,),
        "unpad": ("off",),
        "fused_qkv": ("off",),
        "fused_loss": ("off",),
    },
    "cpu": {"unpad": ("off",), "fused_qkv": ("on",), "fused_loss": ("off",), "fast_dropout": ("off",), "compile": ("layers",)},
}
"""Values besides the default by device, what gains most first."""
BETTER = 1.005
"""A change stays when it is faster by this factor: less is noise."""
FALLS = 2


@dataclasses.dataclass(frozen=True)
class Candidate:
    """``options``: switches of run_pretraining.py that are not at their default, as (name, value)."""

    micro_batch: int
    options: tuple[tuple[str, str | bool], ...] = ()

    def having(self, name: str, value: str | bool) -> Candidate:
        """The same with this switch."""
        return dataclasses.replace(self, options=tuple(sorted({**dict(self.options), name: value}.items())))

    def __str__(self) -> str:
        return " ".join([f"micro-batch {self.micro_batch}", *option_words(dict(self.options))])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """``tokens_per_second`` of a candidate (real tokens; 0: it did not run, and ``note`` says why), and what the run's JSON says of it."""

    candidate: Candidate
    tokens_per_second: float
    note: str = ""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Measure = Callable[[Candidate], Outcome]


# -- the search, which measures nothing itself -----------------------------------------------------------------------------------------


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})


def doublings(sizes: Sequence[int], first: int) -> list[int]:
    """Of ascending ``sizes``, the first from ``first`` on (or the largest), then always the next at least twice as large."""
    chosen = [next((size for size in sizes if size >= first), sizes[-1])]
    while larger := [size for size in sizes if size >= 2 * chosen[-1]]:
        chosen.append(larger[0])
    return chosen


class Search:
    """The order in which candidates are tried; every one at most once.

    Args:
        measure: tries one.
        sizes: micro-batches that can be trained with, ascending.
        first: where growing begins.
        switches: values to try by switch.
        time_left: whether another candidate may begin.
        possible: whether a run of the row would take a candidate's switches.
    """

    def __init__(
        self,
        measure: Measure,
        sizes: Sequence[int],
        first: int,
        switches: Mapping[str, Sequence[str | bool]],
        time_left: Callable[[], bool],
        possible: Callable[[Candidate], bool] = lambda candidate: True,
    ) -> None:
        self.measure, self.sizes, self.first, self.switches, self.time_left = measure, sizes, first, switches, time_left
        self.possible = possible
        self.outcomes: dict[Candidate, Outcome] = {}
        self.best: Outcome | None = None

    def improve(self, outcome: Outcome | None, factor: float = 1.0) -> None:
        """Make ``outcome`` the best if it is faster by more than ``factor``."""
        if outcome is not None and outcome.tokens_per_second > (self.best.tokens_per_second * factor if self.best is not None else 0.0):
            self.best = outcome

    def attempt(self, candidate: Candidate) -> Outcome | None:
        """Measure ``candidate`` unless that was done; ``None`` when time is up."""
        if candidate not in self.outcomes:
            if not self.time_left():
                return None
            self.outcomes[candidate] = self.measure(candidate)
        return self.outcomes[candidate]

    def run(self) -> bool:
        """Search; whether it came to its end."""
        return all(outcome is not None for stage in (self.grow, self.switch, self.refine) for outcome in stage())

    def grow(self) -> Iterator[Outcome | None]:
        """Doubling micro-batches, until one does not run or throughput has fallen twice in a row."""
        most, falls = 0.0, 0
        for size in doublings(self.sizes, self.first):
            outcome = self.attempt(Candidate(size))
            yield outcome
            if outcome is None or not outcome.tokens_per_second:
                return
            self.improve(outcome)
            falls = falls + 1 if outcome.tokens_per_second < most else 0
            most = max(most, outcome.tokens_per_second)
            if falls == FALLS:
                return

    def switch(self) -> Iterator[Outcome | None]:
        """Each switch on the best so far; it stays where it is faster by :data:`BETTER`."""
        for name, values in self.switches.items():
            start = self.best
            for value in values if start is not None else ():
                assert start is not None
                candidate = start.candidate.having(name, value)
                if not self.possible(candidate):
                    continue
                outcome = self.attempt(candidate)
                yield outcome
                self.improve(outcome, BETTER)

    def refine(self) -> Iterator[Outcome | None]:
        """Sizes next to the best one, with its switches, up and down as long as that gains."""
        start = self.best
        if start is None:
            return
        at = self.sizes.index(start.candidate.micro_batch)
        for way in (1, -1):
            place, before = at + way, start.tokens_per_second
            while 0 <= place < len(self.sizes):
                candidate = dataclasses.replace(start.candidate, micro_batch=self.sizes[place])
                if not self.possible(candidate):
                    break
                outcome = self.attempt(candidate)
                yield outcome
                if outcome is None or outcome.tokens_per_second <= before:
                    break
                self.improve(outcome)
                place, before = place + way, outcome.tokens_per_second


def play_off(search: Search, measure: Measure, rounds: int) -> dict[Candidate, list[float]]:
    """Tokens a second of the best candidate and of the fastest other, which take turns ``rounds`` times more; their measurements so far included."""
    best = search.best
    if best is None:
        return {}
    others = [outcome for outcome in search.outcomes.values() if outcome.tokens_per_second and outcome is not best]
    second = max(others, key=lambda outcome: outcome.tokens_per_second, default=None)
    rates = {outcome.candidate: [outcome.tokens_per_second] for outcome in (best, second) if outcome is not None}
    for _ in range(rounds):
        for candidate in rates:
            if second is not None and search.time_left():
                again = measure(candidate)
                if again.tokens_per_second:
                    rates[candidate].append(again.tokens_per_second)
    return rates


def winner(rates: Mapping[Candidate, Sequence[float]]) -> Candidate:
    """The first, unless another's median is faster by :data:`BETTER`."""
    first = next(iter(rates))
    medians = {candidate: statistics.median(listed) * (BETTER if candidate == first else 1.0) for candidate, listed in rates.items()}
    return max(medians, key=lambda candidate: medians[candidate])


def switches_of(row: Row) -> dict[str, tuple[str | bool, ...]]:
    """Values to try besides the default by switch. Several processes compile by layers anyway."""
    switches = SWITCHES[row.platform.device]
    return switches | {"compile": ("off",)} if row.platform.device == "cuda" and row.world_size > 1 else dict(switches)


def possible(row: Row, candidate: Candidate) -> bool:
    """Whether a run of ``row`` takes these switches: CUDA graphs need packed batches, and in several processes more than one micro-batch a step."""
    options = dict(candidate.options)
    if not options.get("cuda_graphs"):
        return True
    return options.get("unpad") != "off" and (row.world_size == 1 or row.train_batch_size > candidate.micro_batch)


# -- measuring -------------------------------------------------------------------------------------------------------------------------


def why_it_failed(code: int, output: str) -> str:
    """One line on a process that ended with ``code`` and said ``output``."""
    if "out of memory" in output.lower() or "OutOfMemoryError" in output:
        return "out of memory"
    if code < 0:
        return f"killed by signal {signal.Signals(-code).name}"
    lines = [line for line in output.strip().splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1][:200]}" if lines else f"exit code {code}"


def measure_in_process(candidate: Candidate, args: argparse.Namespace, row: Row, program: Sequence[str], limit: float) -> Outcome:
    """Run ``program`` (gpu_pretrain.py) for one candidate, for ``limit`` seconds at most."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "candidate.json"
        values = {
            "model": args.model, "seq": row.phase_recipe.max_seq_length, "fill": args.fill, "precision": row.precision, "peer": "none",
            "sides": "berth", "micro_batch": candidate.micro_batch, "accumulation": max(1, args.sequences // candidate.micro_batch),
            "rounds": args.rounds, "steps": args.steps, "device": row.platform.device, "threads": args.threads, "output": output,
        }  # fmt: skip
        options = dict(candidate.options)
        if row.platform.device == "cuda" and row.world_size > 1:
            options = {"compile": "layers"} | options
        words = [*program, *option_words(values), f"--run_options={' '.join(option_words(options))}"]
        # a group of its own: compilers that it started end with it
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return Outcome(candidate, 0.0, f"longer than {limit:.0f} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode:
            return Outcome(candidate, 0.0, why_it_failed(process.returncode, said))
        report = json.loads(output.read_text(encoding="utf-8"))
    side = report["results"][args.fill]["sides"]["berth"]
    keep = ("sequences_per_second", "tflops", "share_of_ceiling", "full_length_sequences_per_second", "peak_gib")
    details = {**{key: side[key] for key in keep}, "fast_path": report["fast_path"]["berth"], "machine": report["machine"]}
    return Outcome(candidate, side["tokens_per_second"], details=details)


# -- the row ---------------------------------------------------------------------------------------------------------------------------


def matrix_entry(row: Row, candidate: Candidate, source: str) -> str:
    """A group for ``rows:`` of slurm/configurations.yml with the one row that ``candidate`` makes of ``row``."""
    # on and off are truth values in YAML 1.1 unless they are quoted; JSON is YAML
    values: dict[str, Any] = {
        "platform": row.platform.name, "nodes": row.nodes, "phase": row.phase, "precision": row.precision,
        "micro_batch": candidate.micro_batch,
    }  # fmt: skip
    line = ", ".join(f"{key}: {value}" for key, value in values.items())
    if row.ranks_per_node is not None:
        line += f", ranks_per_node: {row.ranks_per_node}"
    if candidate.options:
        line += ", options: {" + ", ".join(f"{name}: {json.dumps(value)}" for name, value in candidate.options) + "}"
    recipe = "" if row.recipe.name == DEFAULT_RECIPE else f"    recipe: {row.recipe.name}\n"
    return f"  - source: {json.dumps(source)}\n{recipe}    rows:\n      - {{{line}}}\n"


def check_entry(entry: str, row: Row, candidate: Candidate, matrix: Matrix, extra: Sequence[Path] = ()) -> str:
    """Read ``entry`` as the launcher does, after the ``extra`` files of ``matrix``. Which row it replaces: its name, or "" for none.

    Raises :class:`ConfigError` when the launcher would refuse it for anything else than being there already.
    """
    made = dataclasses.replace(row, micro_batch=candidate.micro_batch, options=dict(candidate.options))
    replaced = next((known.name for known in matrix.rows if known.name == made.name), "")
    if not replaced:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tuned.yml"
            path.write_text("rows:\n" + entry, encoding="utf-8")
            read = next(found for found in load_matrix(matrix.folder, [*extra, path]).rows if found.name == made.name)
        if dict(read.options) != dict(made.options):
            raise ConfigError(f"the row {made.name} is read with options {dict(read.options)}, not {dict(made.options)}")
    return replaced


# -- the program -----------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--platform", required=True, help="key of slurm/configurations.yml; it says the device and how many ranks share the global batch")
    add("--phase", type=int, choices=(1, 2), default=1, help="phase of the recipe, which says the sequence length")
    add("--precision", help="default: the platform's first")
    add("--recipe", default=DEFAULT_RECIPE, help="of slurm/recipes.yml")
    add("--nodes", type=int, default=1, help="nodes of the row")
    add("--ranks_per_node", type=int, help="processes a node, where not all GPUs are used")
    add("--matrix", type=Path, action="append", default=[], help="further matrix file, with a platform or recipe of your own")
    add("--model", default="large", help="as for gpu_pretrain.py")
    add("--fill", choices=("1.0", "real"), default="real", help="as for gpu_pretrain.py")
    add("--first", type=int, default=8, help="micro-batch to begin with")
    add("--most", type=int, help="largest micro-batch to try")
    add("--switches", nargs="*", choices=sorted(SWITCHES["cuda"]), help="switches to try (default: all that the device has)")
    add("--sequences", type=int, help="sequences of an optimizer step, by accumulation (default: 1024 on a GPU, 32 elsewhere)")
    add("--rounds", type=int, default=3, help="timed turns of a candidate, of which the median counts")
    add("--steps", type=int, default=2, help="optimizer steps of a turn")
    add("--finals", type=int, default=2, help="times that the best two are measured again in turns")
    add("--minutes", type=float, default=30.0, help="no candidate begins after this, and none runs longer than is left")
    add("--candidate_minutes", type=float, default=6.0, help="a candidate that takes longer is given up")
    add("--threads", type=int, help="threads of torch (default: torch decides)")
    add("--output", type=Path, help="JSON to write (default: benchmarks/results/tune_<platform>_phase<phase>_<precision>.json)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("nodes", "first", "most", "sequences", "rounds", "steps", "ranks_per_node", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    if args.finals < 0:
        parser.error(f"--finals {args.finals}: must not be negative")
    for name in ("minutes", "candidate_minutes"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} {getattr(args, name)}: must be positive")
    return args


def base_row(args: argparse.Namespace, matrix: Matrix) -> Row:
    """The row to tune, with micro-batch 1. Raises :class:`ConfigError` for unknown names and batches that do not come out even."""
    matrix.select(args.platform, None, args.phase, args.precision, args.recipe)
    platform = matrix.platforms[args.platform]
    return matrix.make_row(
        args.platform, args.nodes, args.phase, args.precision or platform.precisions[0], 1, args.recipe, ranks_per_node=args.ranks_per_node,
        options={}, source="benchmarks/tune.py",
    )  # fmt: skip


def print_outcome(outcome: Outcome) -> None:
    if not outcome.tokens_per_second:
        print(f"{outcome.candidate!s:<60}{outcome.note:>30}", flush=True)
        return
    found = outcome.details
    peak = found["peak_gib"]
    memory = "" if peak is None else f"{peak['reserved']:>8.1f} GiB"
    rates = f"{found['sequences_per_second']:>10.1f} seq/s{outcome.tokens_per_second:>10.0f} tokens/s{found['tflops']:>8.4g} TFLOP/s"
    print(f"{outcome.candidate!s:<60}{rates}{memory}", flush=True)


def without_folders(value: Any) -> Any:
    """An option as it stands in a report: of files only their names."""
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    return Path(value).name if isinstance(value, Path) or (isinstance(value, str) and os.path.isabs(value)) else value


def as_json(outcome: Outcome) -> dict[str, Any]:
    candidate = outcome.candidate
    return {
        "micro_batch": candidate.micro_batch,
        "options": dict(candidate.options),
        "tokens_per_second": outcome.tokens_per_second,
        "note": outcome.note,
        **{key: value for key, value in outcome.details.items() if key != "machine"},
    }


def tune(args: argparse.Namespace, matrix: Matrix, measure: Measure | None = None) -> dict[str, Any]:
    """Search and report; ``measure`` replaces the processes (tests). Raises :class:`LaunchError` when not one candidate ran."""
    row = base_row(args, matrix)
    args.sequences = args.sequences or (1024 if row.platform.device == "cuda" else 32)
    sizes = [size for size in divisors(row.train_batch_size) if size <= (args.most or row.train_batch_size)]
    switches = {name: values for name, values in switches_of(row).items() if args.switches is None or name in args.switches}
    output = args.output or REPO / f"benchmarks/results/tune_{row.platform.name}_phase{row.phase}_{row.precision}.json"
    until = time.monotonic() + args.minutes * 60
    report: dict[str, Any] = {
        "options": {key: without_folders(value) for key, value in vars(args).items() if key != "output"},
        "complete": False,
        "candidates": [],
    }

    def timed(candidate: Candidate) -> Outcome:
        limit = min(args.candidate_minutes * 60, max(until - time.monotonic(), 1.0))
        program = [sys.executable, str(REPO / "benchmarks/gpu_pretrain.py")]
        outcome = measure(candidate) if measure is not None else measure_in_process(candidate, args, row, program, limit)
        print_outcome(outcome)
        report["candidates"].append(as_json(outcome))
        report.setdefault("machine", outcome.details.get("machine"))
        write_json(output, report)
        return outcome

    search = Search(timed, sizes, args.first, switches, lambda: time.monotonic() < until, lambda candidate: possible(row, candidate))
    report["complete"] = search.run()
    rates = play_off(search, timed, args.finals)
    if not rates:
        notes = "; ".join(dict.fromkeys(f"{one.candidate}: {one.note}" for one in search.outcomes.values()))
        raise LaunchError(f"no candidate ran ({notes}); try a smaller --first, or look at one with benchmarks/gpu_pretrain.py")
    best = winner(rates)
    about = report.get("machine") or {}
    where = about.get("gpu") or about.get("cpu") or row.platform.title
    rate = statistics.median(rates[best])
    source = f"benchmarks/tune.py on {where}, torch {about.get('torch', '?')}, {about.get('date', '')[:10]}: {rate:.0f} real tokens/s a GPU"
    if row.platform.device == "cpu":
        source = source.removesuffix(" a GPU")
    entry = matrix_entry(row, best, source)
    replaced = check_entry(entry, row, best, matrix, args.matrix)
    report |= {
        "play_off": [{"candidate": str(candidate), "tokens_per_second": listed} for candidate, listed in rates.items()],
        "best": {"micro_batch": best.micro_batch, "options": dict(best.options), "tokens_per_second": rate},
        "entry": entry,
        "replaces": replaced,
    }
    write_json(output, report)
    print(f"\nbest: {best}, {rate:.0f} real tokens/s{'' if report['complete'] else ' (time was up before the search was)'}")
    print(f"for rows: of slurm/configurations.yml{f' (in place of the row {replaced})' if replaced else ''}:\n{entry}")
    print(f"written: {output}")
    return report


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tune(args, load_matrix(extra=args.matrix))


if __name__ == "__main__":
    run_main(main)
