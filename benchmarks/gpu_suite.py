"""Everything worth knowing of one GPU session, in one command and eight minutes: is it right, how fast is it, where does the time go.

    python benchmarks/gpu_suite.py --out suite

Parts, each a process of its own with a limit: what the machine is; tests/gpu (kernels against references on the device); ceilings of matrix
products and copies; whole steps at 128 and 512 against transformers compiled, full and at a real fill, with a table of kernel groups; LAMB;
attention; loss. ``suite.json`` and ``suite.md`` in ``--out`` are written anew after every part, so that an interruption keeps what is done; each
part's own output stands beside them. A part that fails, or for which no time is left, is named as such, and the exit code is 1. ``--smoke`` runs the
same parts at tiny sizes, on a CPU too: for the test that holds them together.

Rejected: one process for all (one illegal access would end everything); the parts in the order of the code (what matters most comes first).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from berth.errors import run_main  # noqa: E402 - found beside this folder, installed or not
from berth.files import atomic_open, write_json  # noqa: E402

LINES = 400  # of a part's output that are kept
GRACE = 10.0  # seconds a part gets to say what it has found, when its time is up


@dataclasses.dataclass(frozen=True)
class Part:
    """``argv``: the program and its arguments. ``limit`` in seconds. ``output``: JSON that it writes, if any, in the suite's folder."""

    name: str
    argv: tuple[str, ...]
    limit: float
    output: str = ""


def parts(out: Path, *, smoke: bool, model: str, precision: str, device: str) -> list[Part]:
    """All parts, what matters most first; together they may take longer than the budget."""
    python, here = sys.executable, REPO / "benchmarks"
    threads = ("--threads", 1)  # of the smoke run, which other tests may run beside

    def script(name: str, *words: object, limit: float, part: str = "") -> Part:
        part = part or Path(name).stem
        return Part(part, (python, str(here / name), *map(str, words), "--output", str(out / f"{part}.json")), limit, f"{part}.json")

    def pretrain(seq: int, limit: float, *more: object) -> Part:
        sizes: tuple[object, ...] = ("--rounds", 5, "--steps", 5)
        if smoke:
            sizes = ("--rounds", 1, "--steps", 1, "--micro_batch", 2, "--warmup", 1, *threads)
        peer = "hf" if smoke else "hf-compiled"
        return script(
            "gpu_pretrain.py", "--model", model, "--seq", seq, "--fill", "1.0", "real", "--precision", precision, "--peer", peer,
            "--sides", "berth", *sizes, "--device", device, "--profile", *more, limit=limit, part=f"pretrain_{seq}",
        )  # fmt: skip

    ours = (python, str(here / "gpu_suite.py"), "--out", str(out), *(["--smoke"] if smoke else []), "--device", device)
    lengths = (32, 64) if smoke else (128, 512)
    kernels: dict[str, tuple[object, ...]] = {
        "gpu_lamb.py": (),
        "attention.py": ("--shape", "256x128x16", "--shape", "64x512x16", "--precision", "bf16"),
        "cross_entropy.py": ("--rows", 5120, "--hidden", 1024, "--precision", "bf16"),
    }
    if smoke:
        kernels = {
            "gpu_lamb.py": ("--layers", 1, "--hidden", 64, "--vocab_size", 512, "--rounds", 1, *threads),
            "attention.py": ("--shape", "4x32x2", "--precision", "fp32", "--rounds", 1, *threads),
            "cross_entropy.py": ("--rows", 16, "--hidden", 64, "--vocab_size", 512, "--precision", "fp32", "--rounds", 1, *threads),
        }
    lamb, attention, loss = (script(name, *words, "--device", device, limit=45) for name, words in kernels.items())
    tests = (python, "-m", "pytest", str(REPO / "tests/gpu"), "-q", "-p", "no:cacheprovider", "-rfEsx")
    return [
        Part("machine", (*ours, "--part", "machine"), 60, "machine.json"),
        Part("correctness", tests, 240),
        Part("ceilings", (*ours, "--part", "ceilings"), 45, "ceilings.json"),
        pretrain(lengths[0], 210),
        lamb,
        attention,
        pretrain(lengths[1], 180, "--no_check"),  # nothing but the length is another one
        loss,
    ]


# -- parts that are no script of their own ---------------------------------------------------------------------------------------------


def describe_machine(device: str) -> dict[str, Any]:
    """Versions, device, and what nvidia-smi says of clocks, power and temperature where it is there."""
    from gpu_common import device_facts

    facts = device_facts(_device(device))
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,mig.mode.current"
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=False
        )
        facts["nvidia_smi"] = dict(zip(fields.split(","), said.stdout.strip().split(", "), strict=False))
    return facts


def measure_ceilings(device: str, smoke: bool) -> dict[str, Any]:
    """TFLOP/s of square products by precision, and GB/s of copies; a precision the device has not is named with the reason."""
    from gpu_common import copy_gbps, matmul_tflops

    place, size = _device(device), 256 if smoke else None
    found: dict[str, Any] = {"matmul_tflops": {}, "problems": {}}
    for precision in ("bf16", "fp16", "fp8", "tf32", "fp32"):
        try:
            found["matmul_tflops"][precision] = matmul_tflops(place, precision, size)
        except RuntimeError as error:
            found["problems"][precision] = str(error).strip().splitlines()[0]
    found["copy_gbps"] = copy_gbps(place, 8 if smoke else None)
    return found


def _device(name: str) -> Any:
    from berth.ranks import Place
    from berth.training.distributed import choose_device

    return choose_device(name, Place())


OWN: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "machine": lambda args: describe_machine(args.device),
    "ceilings": lambda args: measure_ceilings(args.device, args.smoke),
}


# -- running ---------------------------------------------------------------------------------------------------------------------------


def run_part(part: Part, out: Path, seconds: float) -> dict[str, Any]:
    """Run ``part`` for ``seconds`` at most; how it ended, the end of what it said, and its JSON (also of one that was cut short)."""
    started = time.monotonic()
    if part.output:
        (out / part.output).unlink(missing_ok=True)
    log = out / f"{part.name}.log"
    with log.open("w", encoding="utf-8") as handle:
        process = subprocess.Popen(part.argv, stdout=handle, stderr=subprocess.STDOUT, cwd=REPO, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            status = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
            process.send_signal(signal.SIGINT)  # pytest prints its failures so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - started, 1), "argv": shown(part, out)}
    result["said"] = [without_folders(line, out) for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES:]]
    if part.output and (out / part.output).exists():
        result["json"] = json.loads((out / part.output).read_text(encoding="utf-8"))
    return result


def shown(part: Part, out: Path) -> list[str]:
    """Its command line, without the folders of this machine."""
    return [without_folders(word, out) for word in part.argv[1:]]


def without_folders(words: str, out: Path) -> str:
    """``words`` without the folders of this machine."""
    for folder, name in ((out, "<out>"), (REPO, "."), (Path.home(), "~")):
        words = words.replace(str(folder), name)
    return words


def run_all(wanted: Sequence[Part], out: Path, minutes: float) -> dict[str, Any]:
    """All parts within ``minutes``; the report is on disk after each. An interruption ends the part that runs and keeps the rest."""
    until = time.monotonic() + minutes * 60
    report: dict[str, Any] = {"minutes": minutes, "complete": False, "parts": {}}
    for part in wanted:
        left = until - time.monotonic()
        if left < 1:
            report["parts"][part.name] = {"status": "no time left", "seconds": 0.0, "argv": shown(part, out), "said": []}
        else:
            print(f"{part.name} (at most {min(part.limit, left):.0f} s) ...", flush=True)
            report["parts"][part.name] = run_part(part, out, min(part.limit, left))
            print(f"{part.name}: {report['parts'][part.name]['status']}, {report['parts'][part.name]['seconds']} s", flush=True)
        write_report(report, out)
    report["complete"] = True
    write_report(report, out)
    return report


# -- the page --------------------------------------------------------------------------------------------------------------------------


def write_report(report: dict[str, Any], out: Path) -> None:
    """``suite.json`` and ``suite.md`` as far as the report goes."""
    write_json(out / "suite.json", report)
    with atomic_open(out / "suite.md") as handle:
        handle.write(page(report))


def page(report: dict[str, Any]) -> str:
    """The report as Markdown: parts, ceilings, whole steps, kernel groups, and the end of what failing parts said."""
    found = report["parts"]
    lines = ["# One session on a GPU", ""]
    facts = found.get("machine", {}).get("json", {})
    lines += [f"{key}: {value}  " for key, value in facts.items()]
    lines += ["", *_table(("part", "ended", "seconds"), [(name, part["status"], part["seconds"]) for name, part in found.items()])]
    ceilings = found.get("ceilings", {}).get("json")
    if ceilings:
        rates = [(f"matrix product, {name}", f"{rate:.4g} TFLOP/s") for name, rate in ceilings["matmul_tflops"].items()]
        lines += ["", "## Ceilings", "", *_table(("what", "reached"), [*rates, ("copy", f"{ceilings['copy_gbps']:.4g} GB/s")])]
    for name, part in found.items():
        if name.startswith("pretrain_") and "json" in part:
            lines += _steps_of(name, part["json"])
    for name, part in found.items():
        if part["said"] and (part["status"] != "done" or "json" not in part):
            lines += ["", f"## {name}: {part['status']}", "", "```", *part["said"][-25:], "```"]
    return "\n".join(lines) + "\n"


def _steps_of(name: str, report: dict[str, Any]) -> list[str]:
    options = report["options"]
    lines = ["", f"## Whole steps: {options['model']}, {options['seq']} positions, {options['precision']}", ""]
    rows = []
    for result in report["results"].values():
        for side, rates in result["sides"].items():
            peak = rates.get("peak_gib")
            rows.append(
                (
                    f"{result['fill']:.3f}", side, f"{rates['sequences_per_second']:.1f}", f"{rates['tokens_per_second']:.0f}",
                    f"{rates['tflops']:.4g}", f"{rates['share_of_ceiling']:.1%}", f"{rates['full_length_sequences_per_second']:.1f}",
                    "-" if peak is None else f"{peak['reserved']:.1f}", f"{rates['speedup']:.2f}",
                )
            )  # fmt: skip
    lines += _table(("fill", "side", "seq/s", "tokens/s", "TFLOP/s", "of ceiling", "full seq/s", "peak GiB", "speed-up"), rows)
    profile = report.get("profile")
    if profile:
        lines += ["", f"Where a step of {profile['side']} goes ({profile['wall_us']:.0f} us, idle {profile['idle_us']:.0f}), {name}:", ""]
        groups = [(group, f"{had['us']:.0f}", f"{had['share']:.1%}", f"{had['calls']:.0f}") for group, had in profile["groups"].items()]
        lines += _table(("kernels", "us a step", "share", "calls"), groups)
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


# -- the program -----------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for suite.json, suite.md and the output of every part")
    add("--minutes", type=float, default=8.0, help="of all parts together")
    add("--only", nargs="+", help="names of the parts to run (default: all)")
    add("--model", help="of the whole steps (default: large; tiny with --smoke)")
    add("--precision", choices=("bf16", "fp16", "fp8", "tf32", "fp32"), default="bf16", help="of the whole steps")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="cpu needs --smoke")
    add("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    add("--part", choices=sorted(OWN), help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not 0 < args.minutes < 1e6:
        parser.error(f"--minutes {args.minutes}: must be positive")
    if args.device == "cpu" and not args.smoke:
        parser.error("--device cpu: the sizes are a GPU's; add --smoke")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        write_json(args.out / f"{args.part}.json", OWN[args.part](args))
        return 0
    model = args.model or ("tiny" if args.smoke else "large")
    wanted = parts(args.out, smoke=args.smoke, model=model, precision=args.precision, device=args.device)
    unknown = [name for name in args.only or () if name not in {part.name for part in wanted}]
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: no such part; there are {', '.join(part.name for part in wanted)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what runs is ended on the way out
    report = run_all([part for part in wanted if args.only is None or part.name in args.only], args.out, args.minutes)
    print(f"written: {args.out / 'suite.json'}, {args.out / 'suite.md'}")
    return 0 if all(part["status"] == "done" for part in report["parts"].values()) else 1


if __name__ == "__main__":
    run_main(main)
