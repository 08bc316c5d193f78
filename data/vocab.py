#!/usr/bin/env python3
"""Text to vocab.txt: train a WordPiece vocabulary. The same text and options give the same bytes.

    python data/vocab.py --input work/sentences.txt --vocab_size 30000 --output work/vocab.txt \\
        --bert_config bert_configs/base.json --output_config work/bert_config.json

Give the same --cased or --do_lower_case to create_pretraining_data.py.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from berth.errors import ConfigError, DataError, run_main
from berth.files import read_json, write_json
from berth.text.lines import check_output
from berth.text.options import add_case_options, wants_lowercase
from berth.text.training import ALPHABET_LIMIT, MIN_FREQUENCY, VocabularyCounts, train_wordpiece

MOST_UNKNOWN = 0.01  # share of words that become [UNK] above which the alphabet is too small


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, nargs="+", metavar="FILE", help="UTF-8 text files: sentences file or shards")
    add("--vocab_size", required=True, type=int, metavar="N", help="at most so many pieces, special tokens included")
    add("--output", required=True, metavar="FILE", help="the vocab.txt to write")
    add_case_options(parser)
    add(
        "--min_frequency",
        type=int,
        default=MIN_FREQUENCY,
        metavar="N",
        help=f"pairs of pieces seen less often are not merged (default: {MIN_FREQUENCY})",
    )
    add(
        "--limit_alphabet",
        type=int,
        default=ALPHABET_LIMIT,
        metavar="N",
        help=f"keep the N most frequent characters, the rest become [UNK] (default: {ALPHABET_LIMIT})",
    )
    add("--bert_config", metavar="FILE", help="model configuration to copy with the real vocab_size")
    add("--output_config", metavar="FILE", help="where to write that copy (needs --bert_config)")
    return parser.parse_args()


def read_config(path: str) -> dict[str, object]:
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"--bert_config {path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"--bert_config {path}: not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"--bert_config {path}: must hold a JSON object")
    return config


def report(output: str, counts: VocabularyCounts) -> None:
    print(
        f"{output}: {counts.size} pieces (asked for {counts.requested_size}), {counts.alphabet} of "
        f"{counts.distinct_characters} distinct characters, from {counts.words} words ({counts.distinct_words} "
        f"distinct); {100 * counts.unk_share:.4f} % of words become [UNK]"
    )
    if counts.alphabet < counts.distinct_characters and counts.unk_share > MOST_UNKNOWN:
        print(
            f"notice: {counts.distinct_characters - counts.alphabet} characters were left out of the alphabet and "
            f"{100 * counts.unk_share:.1f} % of words become [UNK]; raise --limit_alphabet (and --vocab_size with it)"
        )
    if counts.size < counts.requested_size:
        print("notice: the text has no more pairs to merge; more text or a lower --min_frequency gives more pieces")


def main() -> None:
    arguments = parse_arguments()
    if (arguments.bert_config is None) != (arguments.output_config is None):
        raise ConfigError("--bert_config and --output_config go together: give both or neither")
    check_output("--output", arguments.output, [*arguments.input, *filter(None, [arguments.bert_config])])
    if arguments.output_config:
        check_output("--output_config", arguments.output_config, [*arguments.input, arguments.bert_config, arguments.output])
    config = read_config(arguments.bert_config) if arguments.bert_config else None
    counts = train_wordpiece(
        arguments.input,
        arguments.vocab_size,
        arguments.output,
        lowercase=wants_lowercase(arguments),
        min_frequency=arguments.min_frequency,
        alphabet_limit=arguments.limit_alphabet,
    )
    report(arguments.output, counts)
    if config is not None:
        write_json(arguments.output_config, {**config, "vocab_size": counts.size})
        print(f"{arguments.output_config}: vocab_size {counts.size}")


if __name__ == "__main__":
    run_main(main)
