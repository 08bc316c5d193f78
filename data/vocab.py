#!/usr/bin/env python3
"""Text to a vocabulary: WordPiece (two ways) for BERT, byte-level BPE for RoBERTa. The same text and options give the same bytes.

    python data/vocab.py --input work/shards --vocab_size 30000 --output work/vocab.txt --cased \\
        --model_size base --output_config work/bert_config.json

Methods:
    wordpiece      learnt by the library tokenizers; at most --vocab_size pieces
    sentencepiece  SentencePiece BPE, converted ("▁x" becomes "x", "x" becomes "##x"); exactly --vocab_size pieces
    bytelevel      byte-level BPE: --output is a folder with vocab.json, merges.txt and tokenizer.json; keeps case

Beside the output, <output>.vocab.json notes inputs, options and figures: run again with the same, nothing is done.
Memory stays flat: at most --max_words distinct words are held. For a very large text, --sample_bytes reads a part of it.
Give the same --cased or --do_lower_case to create_pretraining_data.py.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from berth.errors import ConfigError, run_main
from berth.text.counting import MAX_WORDS
from berth.text.options import add_case_options, wants_lowercase
from berth.text.sentencepiece_bpe import UNUSED
from berth.text.training import ALPHABET_LIMIT, MIN_FREQUENCY
from berth.text.vocabulary_stage import METHODS, VocabularyOptions, VocabularyResult, make_vocabulary

MOST_UNKNOWN = 0.01  # share of words that become [UNK] above which the alphabet is too small
CONFIGS = Path(__file__).resolve().parent.parent / "bert_configs"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, nargs="+", metavar="PATH", help="UTF-8 text files, or folders searched for *.txt: sentences or shards")
    add("--output", required=True, metavar="FILE", help="the vocab.txt to write (--method bytelevel: a folder)")
    add("--method", choices=METHODS, default="wordpiece", help="see above (default: wordpiece)")
    add("--vocab_size", required=True, type=int, metavar="N", help="entries of the vocabulary, special tokens included")
    add_case_options(parser)
    text = "pairs of pieces seen less often are not merged; not for sentencepiece"
    add("--min_frequency", type=int, default=MIN_FREQUENCY, metavar="N", help=f"{text} (default: {MIN_FREQUENCY})")
    text = "keep the N most frequent characters, the rest become [UNK]; Chinese or Japanese need 5000 or more"
    add("--limit_alphabet", type=int, default=ALPHABET_LIMIT, metavar="N", help=f"{text} (default: {ALPHABET_LIMIT})")
    text = "of the characters --limit_alphabet allows, keep the fewest that make up this share of the text, for example 0.9999"
    add("--character_coverage", type=float, default=1.0, metavar="SHARE", help=f"{text} (default: 1.0)")
    text = f"entries [unused0], [unused1], ... behind [PAD] (default: {UNUSED} for sentencepiece, 0 for wordpiece)"
    add("--unused", type=int, metavar="N", help=text)
    text = "sentencepiece: split off punctuation and CJK characters first, as BERT does, so that every piece can be used (default: on)"
    pretokenize = parser.add_mutually_exclusive_group()
    pretokenize.add_argument("--pretokenize", action="store_true", default=True, help=text)
    text = "sentencepiece: split at white space only, as the classic recipe does"
    pretokenize.add_argument("--no_pretokenize", action="store_false", dest="pretokenize", help=text)
    text_group = parser.add_argument_group("what is read")
    add = text_group.add_argument
    add("--sample_bytes", type=int, default=0, metavar="N", help="read about N bytes, spread over the text by --seed; 0 = all (default: 0)")
    add("--seed", type=int, default=12345, metavar="N", help="of --sample_bytes (default: 12345)")
    text = "hold at most N distinct words (about 150 bytes each); more, and the rarest are dropped and counted"
    add("--max_words", type=int, default=MAX_WORDS, metavar="N", help=f"{text} (default: {MAX_WORDS})")
    add("--processes", type=int, default=1, metavar="N", help="count words in N processes; does not change the result (default: 1)")
    out_group = parser.add_argument_group("what is written")
    add = out_group.add_argument
    add("--evaluate", metavar="FILE", help="report on this text (default: on the words that were counted)")
    add("--report", metavar="FILE", help="write the report as JSON, too")
    source = out_group.add_mutually_exclusive_group()
    source.add_argument("--bert_config", metavar="FILE", help="model configuration to copy with this vocabulary's vocab_size")
    sizes = sorted(path.stem for path in CONFIGS.glob("*.json"))
    source.add_argument("--model_size", choices=sizes, metavar="SIZE", help=f"the same with bert_configs/SIZE.json: {', '.join(sizes)}")
    text = "where to write that copy (default with --model_size: bert_config.json beside --output; bytelevel: config.json in it)"
    add("--output_config", metavar="FILE", help=text)
    text = "round its vocab_size up to a multiple of N, which tensor cores need; 1 = the real size (default: 8)"
    add("--pad_vocab_to_multiple", type=int, choices=(1, 8, 16, 32, 64, 128), default=8, metavar="N", help=text)
    add("--manifest", metavar="FILE", help="where inputs, options and figures are noted (default: <output>.vocab.json)")
    add("--verbose", action="store_true", help="show the log of SentencePiece (default: off)")
    return parser


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def read_options(arguments: argparse.Namespace) -> VocabularyOptions:
    """The command line as the options of the stage; checks what only the command line knows."""
    bytelevel, output = arguments.method == "bytelevel", Path(arguments.output)
    config, output_config = _path(arguments.bert_config), _path(arguments.output_config)
    if arguments.model_size is not None:
        config = CONFIGS / f"{arguments.model_size}.json"
        output_config = output_config or (output / "config.json" if bytelevel else output.with_name("bert_config.json"))
    if bytelevel and arguments.unused is not None:
        raise ConfigError("--unused is for WordPiece vocabularies; leave it out with --method bytelevel")
    return VocabularyOptions(
        inputs=tuple(Path(name) for name in arguments.input),
        output=output,
        vocab_size=arguments.vocab_size,
        method=arguments.method,
        lowercase=bool(arguments.do_lower_case) if bytelevel else wants_lowercase(arguments),
        min_frequency=arguments.min_frequency,
        limit_alphabet=arguments.limit_alphabet,
        character_coverage=arguments.character_coverage,
        unused=arguments.unused,
        pretokenize=arguments.pretokenize,
        max_words=arguments.max_words,
        sample_bytes=arguments.sample_bytes,
        seed=arguments.seed,
        evaluate=_path(arguments.evaluate),
        report=_path(arguments.report),
        config=config,
        output_config=output_config,
        pad_vocab_to_multiple=arguments.pad_vocab_to_multiple,
        manifest=_path(arguments.manifest),
        processes=arguments.processes,
        verbose=arguments.verbose,
    )


def summary(options: VocabularyOptions, result: VocabularyResult) -> list[str]:
    """What to tell the user, notices included."""
    counts = result.counts
    alphabet = f"{counts['alphabet']} of {counts['distinct_characters']} distinct characters"
    if options.method == "bytelevel":
        alphabet = "all 256 bytes"
    lines = [
        f"{options.output}: {result.size} pieces (asked for {options.vocab_size}), {alphabet}, from {counts['words']} words "
        f"({counts['distinct_words']} distinct)",
        *(f"  {line}" for line in result.report.lines()),
    ]
    if counts["rejected_rare_words"] or counts["rejected_long_words"]:
        rare, long = counts["rejected_rare_words"], counts["rejected_long_words"]
        lines.append(
            f"words {counts['words']} = used {counts['words'] - rare - long} + too rare to be held (--max_words) {rare} + longer than "
            f"100 characters {long}"
        )
    if counts["count_divisor"] > 1:
        lines.append(f"notice: the counts of words were divided by {counts['count_divisor']} for the trainer")
    if counts["alphabet"] < counts["distinct_characters"] and result.report.unk_word_share > MOST_UNKNOWN:
        lines.append(
            f"notice: {counts['distinct_characters'] - counts['alphabet']} characters were left out of the alphabet and "
            f"{100 * result.report.unk_word_share:.1f} % of words become [UNK]; raise --limit_alphabet (and --vocab_size with it)"
        )
    if result.size < options.vocab_size:
        lines.append("notice: the text has no more pairs to merge; more text or a lower --min_frequency gives more pieces")
    if options.output_config is not None:
        multiple = options.pad_vocab_to_multiple
        lines.append(f"{options.output_config}: vocab_size {-(-result.size // multiple) * multiple}")
    rate = counts["bytes_counted"] / 1e6 / max(result.seconds, 1e-3)
    lines.append(f"{result.seconds:.1f} s, {counts['bytes_counted'] / 1e6:.1f} MB, {rate:.1f} MB/s")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(build_parser().parse_args(argv))
    result = make_vocabulary(options)
    if result.made:
        print("\n".join(summary(options, result)))
    else:
        print(f"{options.output}: up to date ({result.size} pieces; same inputs and options as in {options.manifest_path})")


if __name__ == "__main__":
    run_main(main)
