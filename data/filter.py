#!/usr/bin/env python3
"""Sentence files: keep documents that are running text of a language, once; clean what is kept.

A document is kept or rejected as a whole. Tests, in this order, the first that fails is its reason: avg_len, min_sents, max_sents,
min_toks, max_toks, no_word_ratio, punct_ratio, upper_ratio, digit_ratio, foreign_ratio, min_words, langdetect (the heuristics of
TurkuNLP, made for European languages in Latin script). Then duplicates, if --dedup asks for it. Before all tests text is cleaned:
Unicode NFC, no control, format, private-use or unassigned characters, single spaces.

    python data/filter.py --input sentences.txt --output filtered.txt --language hu
    python data/filter.py --input sentences/ --output_dir filtered --language fi --dedup minhash --processes 8
    python data/filter.py --input sentences.txt --output rejected.txt --language hu --invert --limit 1000
    python data/filter.py --input sentences.txt --output clean.txt --no_heuristics --dedup exact

The input is made by data/sentences.py: one sentence a line, blank lines between documents. Documents in = documents out +
rejected, by reason, is printed and in the manifest. Run again, only what changed is made again.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from berth.corpus.dedup import MinHash
from berth.corpus.filtering import DEDUP, FilterOptions, filter_documents, report
from berth.corpus.filters import DETECTORS, Limits
from berth.corpus.languages import LANGUAGES
from berth.corpus.sentences import output_of
from berth.errors import run_main
from berth.files import write_json
from berth.text.lines import check_output, text_files

_LIMITS = (  # short letter, option, type, what is rejected
    ("-a", "avg_len", float, "documents with fewer words per sentence"),
    ("-s", "min_sents", int, "documents with fewer sentences"),
    ("-S", "max_sents", int, "documents with more sentences"),
    ("-t", "min_toks", int, "documents with fewer tokens (white space parts tokens)"),
    ("-T", "max_toks", int, "documents with more tokens"),
    ("-n", "no_word_ratio", float, "documents with a larger share of sentences that have no word"),
    ("-p", "punct_ratio", float, "documents with a larger share of characters that are ASCII punctuation"),
    ("-u", "upper_ratio", float, "documents with a larger share of upper-case characters"),
    ("-d", "digit_ratio", float, "documents with a larger share of digits"),
    ("-F", "foreign_ratio", float, "documents with a larger share of letters outside the alphabet"),
    ("-w", "min_words", int, "documents with fewer words"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, metavar="PATH", help="a sentences file, or a folder searched for *.txt")
    add("--output", metavar="FILE", help="the sentences file to write (this or --output_dir)")
    add("--output_dir", metavar="DIR", help="folder for parts of about 16 MiB of input each (this or --output)")
    add("--language", default="", metavar="CODE", help=f"of the text; gives the alphabet. One of {' '.join(LANGUAGES)}; no default")
    add(
        "-W", "--word_chars", "--word-chars", default="", metavar="CHARS",
        help="lower-case letters of the alphabet instead of the language's, ranges allowed: a-záéíóöőúüű",
    )  # fmt: skip
    add("--no_heuristics", action="store_true", help="none of the tests, only cleaning and deduplication (default: tests are made)")
    for letter, name, kind, what in _LIMITS:
        spellings = [letter, f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
        default = getattr(Limits(), name)
        add(*spellings, type=kind, default=default, metavar="N", help=f"reject {what} (default: {default})")
    add(
        "-l",
        "--langdetect",
        metavar="CODE",
        help="reject documents detected as another language; 'none': no detection (default: --language)",
    )
    add("--detector", choices=DETECTORS, default="langdetect", help="library that detects languages (default: langdetect)")
    add("--no_clean", action="store_true", help="leave characters as they are (default: clean)")
    add(
        "--charset",
        metavar="NAME",
        help="remove characters that this encoding lacks, such as latin2; refused when letters of the language are among them",
    )
    add(
        "--dedup",
        choices=DEDUP,
        default="none",
        help="exact: equal but for case and white space; minhash: also near ones; the first stays (default: none)",
    )
    add(
        "--minhash_threshold",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="share of common shingles that makes near duplicates (default: 0.8)",
    )
    add("--minhash_permutations", type=int, default=128, metavar="N", help="hashes in a signature (default: 128)")
    add("--shingle", type=int, default=5, metavar="N", help="words in a shingle; characters in languages without spaces (default: 5)")
    add("-i", "--invert", action="store_true", help="write the rejected documents instead, to look at them")
    add("-L", "--limit", type=int, metavar="N", help="read the first N documents only (default: all)")
    add("--report", metavar="FILE", help="write counts by reason as JSON, too (default: only printed, and in the manifest)")
    add("--processes", type=int, default=1, metavar="N", help="processes on this machine; the bytes do not depend on it (default: 1)")
    return parser


def options_of(arguments: argparse.Namespace) -> FilterOptions:
    limits = Limits(**{name: getattr(arguments, name) for _, name, _, _ in _LIMITS})
    return FilterOptions(
        language=arguments.language,
        word_chars=arguments.word_chars,
        limits=None if arguments.no_heuristics else limits,
        langdetect=arguments.langdetect,
        detector=arguments.detector,
        clean=not arguments.no_clean,
        charset=arguments.charset,
        dedup=arguments.dedup,
        minhash=MinHash(arguments.minhash_threshold, arguments.minhash_permutations, arguments.shingle),
        invert=arguments.invert,
        limit=arguments.limit,
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    start = time.perf_counter()
    size = sum(file.stat().st_size for file in text_files(Path(arguments.input)))
    output = output_of(arguments.output, arguments.output_dir, arguments.input)
    if arguments.report:
        check_output("--report", arguments.report, [arguments.input, output])
    result, remarks = filter_documents(arguments.input, output, options_of(arguments), arguments.processes)
    counts, seconds = result.counts, time.perf_counter() - start
    for remark in remarks:
        print(remark)
    rows = report(counts)
    width = max(len(row["reason"]) for row in rows)
    for row in rows:
        print(f"{row['reason']:<{width}} {row['documents']:>10} {row['percent']:>7.2f} %")
    rejected = counts["documents_in"] - counts["documents_passed"]
    print(
        f"{output}: documents in {counts['documents_in']} = passed {counts['documents_passed']} + rejected {rejected}; "
        f"{counts['documents_out']} written ({'the rejected ones' if arguments.invert else 'those that passed'}), {counts['sentences_out']} of "
        f"{counts['sentences_in']} sentences; cleaning removed {counts['characters_removed']} characters"
    )
    print(f"{result.made} part(s) made, {result.kept} kept, {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s")
    if arguments.report:
        write_json(arguments.report, {"input": str(arguments.input), "output": str(output), "counts": counts, "reasons": rows})


if __name__ == "__main__":
    run_main(main)
