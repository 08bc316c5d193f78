#!/usr/bin/env python3
"""Raw text to sentences: one sentence a line, a blank line between documents.

The default segmenter, Punkt of the NLTK, is trained on the text itself, so it works offline and in any language that ends
sentences with '.', '?' or '!'; the marks of other scripts (such as the Chinese full stop) end one, too. Input must be UTF-8.

    python data/sentences.py --input my_texts/ --output work/sentences.txt
    python data/sentences.py --input extracted/ --output_dir work/sentences --processes 8
    python data/sentences.py --input zh.jsonl --output work/zh.txt --segmenter rules --language zh
    python data/sentences.py --input fi/ --output work/fi.txt --segmenter udpipe --segmenter_model fi.udpipe --language fi

With --output_dir the result is a folder of parts (sentences_00000.txt ...). Both are for data/filter.py and data/shard.py. Run
again, only what changed is made again.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from berth.corpus.documents import DOCUMENT_RULES, document_files, document_rule
from berth.corpus.segmenters import SEGMENTERS
from berth.corpus.sentences import make_sentences, model_path, output_of
from berth.errors import run_main


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, metavar="PATH", help="a .txt or .jsonl file, or a folder searched for them")
    add("--output", metavar="FILE", help="the sentences file to write (this or --output_dir)")
    add("--output_dir", metavar="DIR", help="folder for parts of about 16 MiB of input each (this or --output)")
    add(
        "--documents",
        choices=DOCUMENT_RULES,
        default="auto",
        help="what one document is: 'file' = one a file, blank lines part paragraphs, lines inside are joined; 'blank_line' = a "
        "blank line ends it, every line is a paragraph; 'line' = one a line; 'jsonl' = one JSON object a line; 'auto' = 'jsonl' for "
        ".jsonl, else 'file' for a folder and 'blank_line' for a single file (default: auto)",
    )
    add(
        "--join_lines", action="store_true",
        help="join the lines of a document before splitting: for hard-wrapped text whose documents end at blank lines (default: no)",
    )  # fmt: skip
    add(
        "--segmenter",
        choices=SEGMENTERS,
        default="nltk",
        help="what finds the ends of sentences; 'nltk' (Punkt) and 'rules' need nothing, the others their library (default: nltk)",
    )
    add(
        "--segmenter_model",
        metavar="PATH",
        help="nltk: a punkt.json that an earlier run saved, or 'installed' = NLTK's published model of --language if it is on this machine; "
        "stanza: folder of models; udpipe: .udpipe file; spacy: folder of a pipeline (default: nltk is trained on the text, spacy's sentencizer)",
    )
    add("--language", default="en", metavar="CODE", help="ISO 639-1 code, or xx for any; for nltk only with 'installed' (default: en)")
    add("--processes", type=int, default=1, metavar="N", help="processes on this machine; the bytes do not depend on it (default: 1)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    start = time.perf_counter()
    rule = document_rule(arguments.input, arguments.documents)
    files = document_files(arguments.input, rule)
    size = sum(file.stat().st_size for file in files)
    output = output_of(arguments.output, arguments.output_dir, arguments.input)
    result = make_sentences(
        arguments.input,
        output,
        rule,
        segmenter=arguments.segmenter,
        model=arguments.segmenter_model,
        language=arguments.language,
        join_lines=arguments.join_lines,
        processes=arguments.processes,
    )
    counts, seconds = result.counts, time.perf_counter() - start
    print(
        f"{output}: {counts['sentences']} sentences in {counts['documents_out']} documents from {len(files)} file(s), "
        f"{counts['characters']} characters that are not white space; "
        f"documents in {counts['documents_in']} = out {counts['documents_out']} + without text {counts['rejected_empty']}; "
        f"{counts['one_sentence_documents']} of one sentence"
    )
    if model_path(output).is_file() and arguments.segmenter == "nltk":
        print(f"sentence model: {model_path(output)}")
    print(f"{result.made} part(s) made, {result.kept} kept, {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s")


if __name__ == "__main__":
    run_main(main)
