"""Sentence segmenters on one text: speed, and agreement of their boundaries with NLTK's own Punkt.

    python benchmarks/segmenters.py --input speeches/ --rounds 3
    python benchmarks/segmenters.py --input hu.jsonl --language hu --segmenters nltk rules sentencex

The reference is ``nltk.tokenize.punkt`` with parameters that NLTK's trainer learns from the first two million characters.
``nltk`` is berth's own Punkt (``berth/corpus/punkt.py``), trained on the same. Precision: the share of a segmenter's boundaries
that the reference has; recall: the share of the reference's that it finds (boundaries inside paragraphs only).

MB are bytes of UTF-8 over CPU seconds (user and system) of one process, splitting only; ``train`` is CPU seconds of training. The
segmenters take turns, so that other work on the machine hits all; the speed is that of the best round. ``--stage`` also times the whole stage
(``data/sentences.py`` from file to file, training, reading and writing included) once a round. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from machine import machine  # noqa: E402
from nltk import __version__ as nltk_version  # noqa: E402
from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer  # noqa: E402

from berth.corpus.documents import DOCUMENT_RULES, document_files, document_rule, read_documents  # noqa: E402
from berth.corpus.segmenters import SEGMENTERS, choose_segmenter, split_paragraph, training_sample  # noqa: E402
from berth.errors import ConfigError  # noqa: E402
from berth.files import write_json  # noqa: E402

REFERENCE = "nltk library"
Split = Callable[[str], list[str]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--input", required=True, help="text: a file or a folder, as for data/sentences.py")
    parser.add_argument("--documents", choices=DOCUMENT_RULES, default="auto", help="what one document is")
    parser.add_argument("--language", default="en", help="for sentencex, spacy and rules")
    parser.add_argument("--segmenters", nargs="+", choices=SEGMENTERS, default=["nltk", "rules", "sentencex", "spacy"], help="to compare")
    parser.add_argument("--segmenter_model", default=None, help="model of stanza or udpipe, when they are compared")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed")
    parser.add_argument("--megabytes", type=float, default=50.0, help="of the text to use, from its beginning")
    parser.add_argument("--stage", action="store_true", help="also time data/sentences.py from file to file with each segmenter")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks/results/segmenters.json", help="JSON to write")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    return args


def read_paragraphs(args: argparse.Namespace) -> list[str]:
    """Paragraphs of the text, about ``--megabytes`` of them."""
    found: list[str] = []
    left = args.megabytes * 1e6
    for document in read_documents(args.input, args.documents):
        for paragraph in document.paragraphs:
            found.append(paragraph)
            left -= len(paragraph.encode())
        if left <= 0:
            break
    return found


def make_sides(args: argparse.Namespace, paragraphs: list[str]) -> tuple[dict[str, Split], dict[str, float], dict[str, str]]:
    """Splitting functions, seconds of training, and why something was left out."""
    start = time.process_time()
    trainer = PunktTrainer()
    trainer.train("\n\n".join(training_sample(paragraphs)), finalize=True)
    library = PunktSentenceTokenizer(trainer.get_params())
    seconds = {REFERENCE: time.process_time() - start}

    def reference(text: str) -> list[str]:
        starts = [begin for begin, _ in library.span_tokenize(text)]
        edges = [0, *starts[1:], len(text)]
        return [text[begin:end].strip() for begin, end in itertools.pairwise(edges)]

    sides: dict[str, Split] = {REFERENCE: reference}
    missing: dict[str, str] = {}
    for name in args.segmenters:
        start = time.process_time()
        model = args.segmenter_model if name in ("stanza", "udpipe") else None
        try:
            starts = choose_segmenter(name, args.language, model, paragraphs).open()
        except ConfigError as error:
            missing[name] = str(error)
            continue
        seconds[name] = time.process_time() - start

        def split(text: str, starts: Callable[[str], list[int]] = starts) -> list[str]:
            return split_paragraph(starts, text)

        sides[name] = split
    return sides, seconds, missing


def boundaries(sentences: list[list[str]]) -> set[tuple[int, int]]:
    """(paragraph, characters that are not white space before the boundary) of every boundary inside a paragraph."""
    found = set()
    for number, lines in enumerate(sentences):
        at = 0
        for line in lines[:-1]:
            at += len(line) - line.count(" ")
            found.add((number, at))
    return found


def measure(args: argparse.Namespace, paragraphs: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Results of every side, and what was left out."""
    sides, training, missing = make_sides(args, paragraphs)
    size = sum(len(paragraph.encode()) for paragraph in paragraphs) / 1e6
    times: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, set[tuple[int, int]]] = {}
    counts: dict[str, int] = {}
    for _ in range(args.rounds):
        for name, split in sides.items():
            start = time.process_time()
            sentences = [split(paragraph) for paragraph in paragraphs]
            times[name].append(time.process_time() - start)
            found[name], counts[name] = boundaries(sentences), sum(map(len, sentences))
    results: dict[str, dict[str, Any]] = {}
    for name in sides:
        same = len(found[name] & found[REFERENCE])
        results[name] = {
            "mb_per_second": size / min(times[name]),
            "seconds": times[name],
            "train_seconds": training[name],
            "sentences": counts[name],
            "precision": same / max(1, len(found[name])),
            "recall": same / max(1, len(found[REFERENCE])),
        }
    if args.stage:
        time_stages(args, results)
    return results, missing


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def time_stages(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """Add ``stage_mb_per_second``: data/sentences.py as a user runs it, the start of Python included."""
    rule = document_rule(args.input, args.documents)
    size = sum(file.stat().st_size for file in document_files(args.input, rule)) / 1e6
    for name in results.keys() - {REFERENCE}:
        seconds = []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable, str(REPO / "data/sentences.py"), "--input", args.input, "--documents", rule,
                    "--output", f"{folder}/out.txt", "--segmenter", name, "--language", args.language,
                ]  # fmt: skip
                command += ["--segmenter_model", args.segmenter_model] if name in ("stanza", "udpipe") else []
                start = _children_seconds()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds.append(_children_seconds() - start)
        results[name] |= {"stage_seconds": seconds, "stage_mb_per_second": size / min(seconds)}


def print_table(results: dict[str, dict[str, Any]]) -> None:
    print(f"{'segmenter':<14}{'MB/s':>8}{'stage MB/s':>12}{'train s':>9}{'sentences':>11}{'precision':>11}{'recall':>9}")
    for name, result in results.items():
        stage = f"{result['stage_mb_per_second']:.1f}" if "stage_mb_per_second" in result else "-"
        print(
            f"{name:<14}{result['mb_per_second']:>8.1f}{stage:>12}{result['train_seconds']:>9.2f}{result['sentences']:>11}"
            f"{result['precision']:>11.4f}{result['recall']:>9.4f}"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    paragraphs = read_paragraphs(args)
    results, missing = measure(args, paragraphs)
    print_table(results)
    for name, reason in missing.items():
        print(f"{name}: left out: {reason}")
    options = {key: value for key, value in vars(args).items() if key not in ("output", "input")} | {"input": Path(args.input).name}
    characters = sum(map(len, paragraphs))
    report = {
        "machine": machine(nltk=nltk_version),
        "options": options,
        "characters": characters,
        "paragraphs": len(paragraphs),
        "results": results,
    }
    write_json(args.output, report)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
