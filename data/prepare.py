#!/usr/bin/env python3
"""All of data preparation in one command: raw text -> documents -> sentences -> shards -> vocabulary -> records of both phases.

From flags:
    python -m data.prepare --workdir work --input my_texts --language hu --cased --vocab_size 32000 --processes 8
From a configuration (see data/prepare.yaml for one with every section explained):
    python -m data.prepare --config prepare.yaml

Stages: download, extract, format, sentences, filter, shard, vocab, records, verify. download, format and filter run only when the
configuration has their section (or --set gives one of their options); extract only when the input is not plain text already. Every
stage is a script of its own; the lines that are printed can be run by hand. Stages whose input and options have not
changed are skipped, interrupted ones go on.

Below the work folder: documents/ sentences/ filtered/ shards/ vocab/ (vocab.txt, bert_config.json) records/ verify.json prepare.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import create_pretraining_data
from berth import prepare
from berth.errors import run_main
from data import download, extract, filter, formatting, sentences, shard, verify, vocab

PARSERS = {
    "download": download.build_parser, "extract": extract.build_parser, "format": formatting.build_parser,
    "sentences": sentences.build_parser, "filter": filter.build_parser, "shard": shard.build_parser, "vocab": vocab.build_parser,
    "records": create_pretraining_data.build_parser, "verify": verify.build_parser,
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML with the options below and a section for each stage; flags go before it")
    add("--workdir", metavar="DIR", help="everything is written below it; made when missing")
    add("--input", nargs="+", metavar="PATH", help="text files or folders, dumps, JSON lines, Parquet, datasets (see data/extract.py)")
    add("--language", metavar="CODE", help="of the text, such as hu; for the stages that ask for it")
    add("--cased", action="store_true", default=None, help="keep upper case and accents (default: lower-case, strip accents)")
    add("--vocab_size", type=int, metavar="N", help="entries of the vocabulary (default: 30000)")
    add("--vocab_file", metavar="FILE", help="use this vocabulary instead of training one")
    add("--prefix", metavar="NAME", help="start of the shards' names (default: text)")
    add("--processes", type=int, metavar="N", help="how many work at the same time (default: what each script takes, mostly 1)")
    add("--seed", type=int, metavar="N", help="of every random choice (default: 12345)")
    add("--stages", nargs="+", choices=prepare.STAGES, metavar="STAGE", help="run only these, over what the others left")
    add("--set", nargs="+", default=[], metavar="STAGE.OPTION=VALUE", help="an option of a stage's script, such as filter.min_sents=1")
    add("--dry_run", action="store_true", help="print the command line of every stage and end")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    config = prepare.load_config(Path(arguments.config)) if arguments.config else {}
    for name in ("workdir", "input", "language", "cased", "vocab_file", "prefix", "processes", "seed"):
        if getattr(arguments, name) is not None:
            config[name] = getattr(arguments, name)
    settings = [f"vocab.vocab_size={arguments.vocab_size}"] if arguments.vocab_size is not None else []
    prepare.apply_settings(config, [*settings, *arguments.set])
    commands = prepare.plan(config, {stage: build() for stage, build in PARSERS.items()}, arguments.stages or ())
    if arguments.dry_run:
        print("\n".join(command.line for command in commands))
        return
    workdir = Path(config["workdir"])
    print(prepare.summarize(prepare.run(commands, workdir), workdir))


if __name__ == "__main__":
    run_main(main)
