#!/usr/bin/env python3
"""Raw text to sentences.txt: one sentence a line, a blank line between documents.

The sentence splitter (Punkt) is trained on the text itself, so it works offline and in any language that ends sentences
with '.', '?' or '!'. Input must be UTF-8.

    python data/sentences.py --input my_texts/ --output work/sentences.txt
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from berth.corpus.documents import DOCUMENT_RULES
from berth.corpus.sentences import make_sentences
from berth.errors import run_main
from berth.text.lines import check_output


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--input", required=True, metavar="PATH", help="a .txt file, or a folder searched for *.txt")
    parser.add_argument("--output", required=True, metavar="FILE", help="the sentences file to write")
    parser.add_argument(
        "--documents",
        choices=DOCUMENT_RULES,
        default="auto",
        help="what one document is: 'file' = one a file, blank lines part paragraphs; 'blank_line' = a blank line ends "
        "it; 'auto' = 'file' for a folder, 'blank_line' for a single file (default: auto)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    check_output("--output", arguments.output, [arguments.input])
    counts = make_sentences(arguments.input, arguments.output, arguments.documents)
    print(
        f"{arguments.output}: {counts.sentences} sentences in {counts.documents} documents from {counts.files} file(s), "
        f"{counts.characters} characters, {counts.empty_documents} empty document(s) skipped, "
        f"{time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    run_main(main)
