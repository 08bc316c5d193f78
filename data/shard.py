#!/usr/bin/env python3
"""Sentences to shards: <prefix>_training_<i>.txt and <prefix>_test_<i>.txt of about equal size.

Documents stay whole, each shard gets at least two. Memory does not grow with the text. Run again, it writes only what is
missing or changed; shards of the same prefix left in the folder by an earlier run are replaced; a folder with shards of
another prefix is refused. Lines of the input end in LF or CRLF, as data/sentences.py and data/filter.py write them.

    python data/shard.py --input work/sentences.txt --output_dir work/shards --prefix text \\
        --n_training_shards 8 --n_test_shards 1 --fraction_test_set 0.1 --seed 12345
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from berth.corpus.shards import make_shards
from berth.errors import run_main
from berth.workers import stop_on_sigterm


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, metavar="PATH", help="sentences: a file, or a folder of parts")
    add("--output_dir", required=True, metavar="DIR", help="folder for the shards; made when missing")
    add("--prefix", default="text", metavar="NAME", help="start of the shard names (default: text)")
    add("--n_training_shards", type=int, default=256, metavar="N", help="number of training shards (default: 256)")
    add("--n_test_shards", type=int, default=256, metavar="N", help="number of test shards, 0 for none (default: 256)")
    add(
        "--fraction_test_set",
        type=float,
        default=0.1,
        metavar="F",
        help="share of the text, in bytes, that goes to the test shards, 0 to 1 (default: 0.1)",
    )
    add("--seed", type=int, default=12345, metavar="N", help="which documents become the test set (default: 12345)")
    add("--processes", type=int, default=1, metavar="N", help="how many work at the same time; the shards are the same (default: 1)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    stop_on_sigterm()
    counts = make_shards(
        arguments.input,
        arguments.output_dir,
        arguments.prefix,
        arguments.n_training_shards,
        arguments.n_test_shards,
        arguments.fraction_test_set,
        arguments.seed,
        arguments.processes,
    )
    print(
        f"{arguments.output_dir}: {counts.sentences} sentences in {counts.documents} documents; "
        f"{counts.training_shards} training shards with {counts.training_documents} documents, "
        f"{counts.smallest_shard}-{counts.largest_shard} bytes each; "
        f"{counts.test_shards} test shards with {counts.test_documents} documents, {counts.test_bytes} bytes"
        + (f"; {counts.shards_kept} of them were up to date" if counts.shards_kept else "")
        + (f"; {counts.stale_removed} shard(s) of an earlier run removed" if counts.stale_removed else "")
    )


if __name__ == "__main__":
    run_main(main)
