#!/usr/bin/env python3
"""Read everything back and check it: manifests and checksums, shards, vocabulary, and every row of the records.

    python data/verify.py --input work/records --vocab_file work/vocab.txt --text work/shards
    python data/verify.py --input work --processes 8 --output_json work/verify.json

Records: schema, ids, segments, masks (positions, numbers, 80/10/10), next-sentence labels, counts, equal options in a folder, and how
many test rows are training rows, too. Files of the public scripts are accepted. Ends with 1 when anything is wrong, and names
the file, the row (or line) and the rule. Nothing is changed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from berth.errors import DataError, run_main
from berth.files import write_json
from berth.records.verify import as_json, find_units, problem_lines, table, verify
from berth.text.vocabulary import Vocabulary
from berth.workers import stop_on_sigterm


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--input", nargs="+", required=True, metavar="PATH",
        help="records, manifests, shards, or folders with them; what lies below a folder is included",
    )  # fmt: skip
    add("--vocab_file", metavar="FILE", help="the vocabulary of the records (default: ids are only compared with each other)")
    add("--text", nargs="+", default=[], metavar="PATH", help="text files, or folders of which every .txt is checked (default: none)")
    add("--output_json", metavar="FILE", help="write the result as JSON (default: only the table is printed)")
    add("--processes", type=int, default=1, metavar="N", help="files read at the same time (default: 1)")
    add("--max_errors", type=int, default=20, metavar="N", help="problems printed, and kept for each file (default: 20)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    stop_on_sigterm()
    vocabulary = Vocabulary.load(arguments.vocab_file) if arguments.vocab_file is not None else None
    units = find_units([Path(path) for path in arguments.input], [Path(path) for path in arguments.text])
    report = verify(units, vocabulary, arguments.processes, arguments.max_errors)
    print(table(report))
    if arguments.output_json is not None:
        write_json(arguments.output_json, as_json(report))
    if report.wrong:
        print("\n".join(problem_lines(report, arguments.max_errors)), file=sys.stderr)
        files = sum(1 for file in report.files if file.wrong)
        raise DataError(f"{report.wrong} problem(s) in {files} of {len(report.files)} file(s)")


if __name__ == "__main__":
    run_main(main)
