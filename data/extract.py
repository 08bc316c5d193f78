#!/usr/bin/env python3
"""Stage 'extract': dumps, text, JSON lines, Parquet or Hugging Face datasets to JSON lines, one document a line.

Reads a MediaWiki dump (.xml, .xml.bz2 plain or multistream, .xml.gz, or '-' for standard input), WikiExtractor's output, a folder of
.txt files or one .txt file, .jsonl, .parquet, and datasets that 'datasets' saved or can load from the local disk. Several inputs are
put side by side, each with its weight. Nothing is downloaded. Run again, it makes only what is missing or changed.

    python data/extract.py --input huwiki-20261101-pages-articles-multistream.xml.bz2 --output_dir work/extracted --processes 8
    python data/extract.py --input books/ news.jsonl --weight 2 0.5 --output_dir work/extracted
    zstdcat enwiki.xml.zst | python data/extract.py --input - --output_dir work/extracted
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from berth.corpus.documents import DOCUMENT_RULES
from berth.corpus.extract import FORMATS, ExtractOptions, extract
from berth.errors import run_main
from berth.workers import stop_on_sigterm


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, nargs="+", metavar="PATH", help="files or folders; '-' is a MediaWiki dump on standard input")
    add("--output_dir", required=True, metavar="DIR", help="folder for the parts <source>_00000.jsonl and extract.json; made when missing")
    add("--format", choices=FORMATS, default="auto", help="what the inputs are; auto: by their names (default: auto)")
    add("--text_column", default="text", metavar="NAME", help="jsonl, parquet, datasets: where the text is (default: text)")
    add("--split", default="train", metavar="NAME", help="datasets: which split (default: train)")
    add(
        "--documents",
        choices=[rule for rule in DOCUMENT_RULES if rule != "jsonl"],
        default="auto",
        help="txt: what one document is: 'file' = one a file, blank lines part paragraphs; 'blank_line' = a blank line ends it; 'line' = "
        "one a line; 'auto' = 'file' for a folder, 'blank_line' for a single file (default: auto)",
    )
    add(
        "--weight",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="W",
        help="copies of each input's documents, one number for all or one for each input; 2.5 = two copies, and a third one of half the "
        "documents, 0.1 = a tenth of the documents (default: 1)",
    )
    add("--namespaces", type=int, nargs="+", default=[0], metavar="N", help="mediawiki: namespaces to read, 0 = articles (default: 0)")
    add("--keep_lists", action="store_true", help="mediawiki: list items become paragraphs (default: dropped, as in the BERT paper)")
    add("--keep_headings", action="store_true", help="mediawiki: section titles become paragraphs (default: dropped)")
    add("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="worker processes (default: all cores)")
    add("--seed", type=int, default=12345, metavar="N", help="chooses documents for weights that are not whole numbers (default: 12345)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, print the counts."""
    given = build_parser().parse_args(argv)
    options = ExtractOptions(
        tuple(given.input), given.output_dir, given.format, given.text_column, given.split, given.documents, tuple(given.weight),
        tuple(given.namespaces), given.keep_lists, given.keep_headings, given.processes, given.seed,
    )  # fmt: skip
    stop_on_sigterm()
    start = time.perf_counter()
    result = extract(options)
    seconds, counts = time.perf_counter() - start, result.counts
    rejected = {name.removeprefix("rejected_"): value for name, value in sorted(counts.items()) if name.startswith("rejected_")}
    print(
        f"{options.output_dir}: {counts['documents_in']} documents in"
        + (f" + {counts['copies']} copies" if counts["copies"] else "")
        + f" = {counts['documents_out']} out + {sum(rejected.values())} rejected"
        + (f" ({', '.join(f'{value} {name}' for name, value in rejected.items())})" if rejected else "")
    )
    print(
        f"{counts['paragraphs']} paragraphs, {counts['characters']} characters, "
        f"{counts['control_characters_removed']} control characters removed; parts: {result.made} made, {result.kept} kept; "
        f"{seconds:.1f} s, {counts['characters'] / 1e6 / max(seconds, 1e-9):.1f} M characters of text a second"
    )


if __name__ == "__main__":
    run_main(main)
