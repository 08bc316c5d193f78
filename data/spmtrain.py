#!/usr/bin/env python3
"""Train a SentencePiece model: <model_prefix>.model and <model_prefix>.vocab. First step of the classic route to a vocab.txt.

    python data/spmtrain.py work/sentences.txt --model_prefix=work/bert --vocab_size=32000 --model_type=bpe \\
        --input_sentence_size=100000000 --shuffle_input_sentence=true --character_coverage=0.9999
    python data/sent2wordpiece.py work/bert.vocab --output work/vocab.txt --size 32000

Every other option of SentencePiece's trainer is passed on; write it as --name=value. The same text and options give the same files.
'data/vocab.py --method sentencepiece' does both steps at once and better: no pieces with punctuation glued to words (BERT splits
punctuation off, so they can never be used), exactly the size asked for, and memory that does not grow with the text.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from berth.errors import ConfigError, run_main
from berth.text.lines import check_output
from berth.text.sentencepiece_bpe import train_model

PASSED = ("model_prefix", "vocab_size", "model_type", "character_coverage", "input_sentence_size", "shuffle_input_sentence")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [FILE] --model_prefix=NAME --vocab_size=N [--name=value ...]",
    )
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="UTF-8 text, one sentence a line; the same as --input")
    add("--input", metavar="FILES", help="UTF-8 text files, joined by commas")
    add("--model_prefix", metavar="NAME", help="write NAME.model and NAME.vocab (required)")
    add("--vocab_size", metavar="N", help="pieces of the model, <unk> <s> </s> included (required)")
    add("--model_type", default="bpe", metavar="TYPE", help="bpe, unigram, char or word; WordPiece needs bpe (default: bpe)")
    add("--character_coverage", metavar="SHARE", help="share of the characters to keep (default: SentencePiece's, 0.9995)")
    add("--input_sentence_size", metavar="N", help="load at most N sentences; 0 = all (default: 0)")
    add("--shuffle_input_sentence", metavar="BOOL", help="take them by chance, not from the start (default: SentencePiece's, true)")
    add("--random_seed", type=int, default=12345, metavar="N", help="of that choice (default: 12345)")
    add("--verbose", action="store_true", help="show SentencePiece's log (default: off)")
    return parser


def read_arguments(argv: Sequence[str] | None) -> tuple[dict[str, str], argparse.Namespace]:
    """SentencePiece's options by name, and the command line. Raises :class:`ConfigError`."""
    arguments, rest = build_parser().parse_known_args(argv)
    if (arguments.file is None) == (arguments.input is None):
        raise ConfigError("name the text once: as FILE, or as --input=FILE")
    options = {name: value for name in PASSED if (value := getattr(arguments, name)) is not None}
    options["input"] = arguments.file if arguments.file is not None else arguments.input
    for word in rest:
        found = re.fullmatch(r"--(\w+)=(.*)", word, re.DOTALL)
        if found is None:
            raise ConfigError(f"{word} is not understood; options for SentencePiece are written --name=value, the text file comes first")
        options[found[1]] = found[2]
    return options, arguments


def main(argv: Sequence[str] | None = None) -> None:
    options, arguments = read_arguments(argv)
    for suffix in (".model", ".vocab"):
        if "model_prefix" in options:
            check_output("--model_prefix", options["model_prefix"] + suffix, options["input"].split(","))
    trained = train_model(options, arguments.random_seed, arguments.verbose)
    print(
        f"{trained.model}, {trained.vocabulary}: from {trained.taken} of {trained.sentences} sentences; "
        f"next: python data/sent2wordpiece.py {trained.vocabulary} --output vocab.txt"
    )
    if trained.too_long:
        print(
            f"notice: SentencePiece leaves out {trained.too_long} sentence(s) for their length "
            "(--max_sentence_length, 4192 bytes unless given)"
        )


if __name__ == "__main__":
    run_main(main)
