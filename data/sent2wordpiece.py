#!/usr/bin/env python3
"""A SentencePiece vocabulary as a WordPiece one: second step of the classic route to a vocab.txt.

    python data/sent2wordpiece.py bert.vocab > vocab.txt
    python data/sent2wordpiece.py bert.vocab --output vocab.txt --size 32000 --add_characters

"▁x" becomes "x" and "x" becomes "##x"; <unk> <s> </s>, the lone "▁" and duplicates are dropped; [PAD], 100 times [unusedN], [UNK]
[CLS] [SEP] and [MASK] are put first. So a model of 32000 pieces gives about 32101 lines: --size makes it exactly what the model's
vocab_size says.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from berth.errors import run_main
from berth.files import atomic_open
from berth.text.lines import check_output
from berth.text.sentencepiece_bpe import UNUSED, convert_vocabulary, read_sentencepiece_vocabulary


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("input", metavar="VOCAB", help="the .vocab file that spmtrain.py wrote")
    add("-o", "--output", metavar="FILE", help="the vocab.txt to write (default: standard output)")
    add("-u", "--unused", type=int, default=UNUSED, metavar="INT", help=f"entries [unused0], [unused1], ... (default: {UNUSED})")
    text = "give every single character both forms, x and ##x; else a word that begins with a rare character is [UNK]"
    add("-c", "--add_characters", action="store_true", help=f"{text} (default: off)")
    add("-n", "--no_specials", action="store_true", help="leave out [PAD], [unusedN], [UNK] [CLS] [SEP] [MASK] (default: they come first)")
    add("-k", "--keep_control", action="store_true", help="keep <unk> <s> </s> as they are (default: dropped)")
    add("--size", type=int, metavar="N", help="exactly N lines: the last merged pieces are left out (default: as many as there are)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.output is not None:
        check_output("--output", arguments.output, [arguments.input])
    pieces = convert_vocabulary(
        read_sentencepiece_vocabulary(arguments.input),
        unused=arguments.unused,
        specials=not arguments.no_specials,
        keep_control=arguments.keep_control,
        add_characters=arguments.add_characters,
        size=arguments.size,
    )
    text = "".join(piece + "\n" for piece in pieces)
    if arguments.output is None:
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()
    else:
        with atomic_open(arguments.output) as handle:
            handle.write(text)
    print(f"{len(pieces)} pieces: vocab_size of the model must be {len(pieces)}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
