#!/usr/bin/env python3
"""Stage 'format': one article a line, an empty line after each (the classic formatted text).

Reads WikiExtractor's output (the first line of an article, its title, is dropped), the JSON lines of data/extract.py, or a folder
of .txt files. Strict UTF-8. The other stages do not need it: data/sentences.py reads JSON lines, and keeps paragraphs.

    python data/formatting.py --input_folder extracted/ --output_file wikicorpus_hu_one_article_per_line.txt
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from berth.corpus.formatting import FORMATS, format_articles
from berth.errors import run_main
from berth.workers import stop_on_sigterm


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input_folder", required=True, metavar="DIR", help="WikiExtractor output, JSON lines parts, or .txt files (also one such file)")
    add("--output_file", required=True, metavar="FILE", help="the text to write; the manifest is FILE.format.json")
    add("--format", choices=FORMATS, default="auto", help="what the folder holds; auto: by the file names (default: auto)")
    add("--text_column", default="text", metavar="NAME", help="jsonl: where the text is (default: text)")
    add("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="worker processes (default: all cores)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, print the counts."""
    given = build_parser().parse_args(argv)
    stop_on_sigterm()
    start = time.perf_counter()
    result = format_articles(given.input_folder, given.output_file, given.format, given.text_column, given.processes)
    seconds, counts = time.perf_counter() - start, result.counts
    print(
        f"{given.output_file}: {counts['documents_in']} articles in = {counts['documents_out']} out + {counts['rejected_empty']} rejected "
        f"(empty); {counts['characters']} characters; parts: {result.made} made, {result.kept} kept; {seconds:.1f} s"
    )


if __name__ == "__main__":
    run_main(main)
