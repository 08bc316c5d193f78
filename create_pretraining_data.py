#!/usr/bin/env python3
"""Text shards and a vocabulary to BERT pre-training records (hdf5): sentence pairs, masks, next-sentence labels.

One records file of everything:
    python create_pretraining_data.py --vocab_file vocab.txt --input_file shards/ --output_file all.hdf5
One a shard, several at a time; run again, it continues where it stopped:
    python create_pretraining_data.py --vocab_file vocab.txt --input_file shards/ --output_dir records/ --processes 8

The files are dealt out among the tasks of an MPI run (mpirun, srun --mpi=pmix) or of a Slurm array:
    srun --mpi=pmix -n 64 python create_pretraining_data.py ... --output_dir records/
    sbatch --array=0-63 --wrap 'python create_pretraining_data.py ... --output_dir records/'

Of a folder with shards (<prefix>_training_<i>.txt, <prefix>_test_<i>.txt) only these are read, otherwise every .txt.
Input is UTF-8, one sentence a line, blank lines between documents (data/sentences.py, data/shard.py). The same input,
options and seed give the same bytes however the work is spread. Phase 2 wants --max_seq_length 512
--max_predictions_per_seq 80.
"""

import argparse
import io
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from berth.corpus.shardset import select_shards
from berth.errors import ConfigError, DataError, run_main
from berth.records.create import (
    Job,
    Result,
    load_vocabulary,
    made_by_berth,
    made_of_older_shards,
    plan_file,
    plan_folder,
    run_jobs,
    strangers,
    write_manifest,
)
from berth.records.deal import MODES, Share, deal, find_share
from berth.records.options import LAYOUTS, MASKINGS, OBJECTIVES, RecordOptions
from berth.records.schema import RecordCounts
from berth.text.options import add_case_options, wants_lowercase
from berth.workers import stop_on_sigterm

MOST_UNKNOWN = 0.05  # share of [UNK] above which something is wrong


def build_parser() -> argparse.ArgumentParser:
    defaults = RecordOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--vocab_file", required=True, metavar="FILE", help="WordPiece vocab.txt")
    add("--input_file", required=True, metavar="PATH", help="a .txt shard, or a folder searched for *.txt")
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--output_file", metavar="FILE", help="write one hdf5 of all the input")
    output.add_argument("--output_dir", metavar="DIR", help="write one <shard>.hdf5 for every .txt")
    add_case_options(parser)

    def number(name: str, kind: type, default: float, text: str) -> None:
        add(name, type=kind, default=default, metavar="N" if kind is int else "P", help=f"{text} (default: {default})")

    number("--max_seq_length", int, defaults.max_seq_length, "tokens a row, [CLS] and [SEP] included")
    number("--max_predictions_per_seq", int, defaults.max_predictions_per_seq, "most masked tokens a row")
    number("--masked_lm_prob", float, defaults.masked_lm_prob, "share of the tokens of a row that is masked")
    number("--short_seq_prob", float, defaults.short_seq_prob, "probability of a shorter target, per document and copy")
    number("--dupe_factor", int, defaults.dupe_factor, "copies of the text, each with its own pairs and masks")
    number("--random_seed", int, defaults.random_seed, "decides pairs, masks and order")
    number("--processes", int, 1, "shards made at the same time (with --output_dir)")
    add("--do_whole_word_mask", action="store_true", help="mask whole words instead of word pieces")

    def choice(name: str, values: tuple[str, ...], default: str, text: str) -> None:
        add(name, choices=values, default=default, help=f"{text} (default: {default})")

    choice(
        "--objective", OBJECTIVES, defaults.objective,
        "mlm+nsp: sentence pairs with a next-sentence label; mlm: full rows of running text across documents, no label",
    )  # fmt: skip
    choice("--masking", MASKINGS, defaults.masking, "static: masks are drawn now; none: by the training, --dynamic_masking")
    choice(
        "--layout", LAYOUTS, defaults.layout,
        "padded: NVIDIA's schema; binned: the same, a file for each range of lengths; packed: no padding is stored",
    )  # fmt: skip
    number("--bin_size", int, defaults.bin_size, "lengths a bin of --layout binned spans")
    choice(
        "--distributed",
        MODES,
        "auto",
        "who shares the work: mpi, array (Slurm), srun (its tasks, without MPI), none, or auto: what started this",
    )
    add("--overwrite", action="store_true", help="make every file again; remove other records from --output_dir")
    add(
        "--remove_stale",
        action="store_true",
        help="remove records from --output_dir that were made of earlier shards of the same prefix (there are fewer now)",
    )
    add("--bert_model", metavar="NAME", help="accepted for old command lines; has no effect")
    return parser


def notices(arguments: argparse.Namespace, options: RecordOptions) -> None:
    """Say what the user may not expect."""
    ignored = select_shards(Path(arguments.input_file))[1]
    if ignored:
        print(
            f"notice: {len(ignored)} .txt file(s) in --input_file that are not shards are left out: "
            f"{', '.join(path.name for path in ignored[:5])}{' ...' if len(ignored) > 5 else ''}"
        )
    if arguments.bert_model is not None:
        print(f"notice: --bert_model {arguments.bert_model} has no effect; vocabulary and case options decide")
    if options.wanted_predictions > options.max_predictions_per_seq:
        print(
            f"notice: --max_predictions_per_seq {options.max_predictions_per_seq} caps full rows, which would have "
            f"{options.wanted_predictions} masked tokens at --masked_lm_prob {options.masked_lm_prob}"
        )


def plan(arguments: argparse.Namespace, options: RecordOptions) -> tuple[list[Job], list[Path]]:
    """The files to make and the records to remove when they are made; checks what is in the way."""
    source, vocabulary = Path(arguments.input_file), Path(arguments.vocab_file)
    if arguments.output_file is not None:
        if arguments.processes != 1:
            raise ConfigError("--processes needs --output_dir: one --output_file is made by one process")
        return [plan_file(source, Path(arguments.output_file), vocabulary, options)], []
    folder = Path(arguments.output_dir)
    jobs = plan_folder(source, folder, vocabulary, options)
    return jobs, superseded(folder, jobs, arguments) if source.is_dir() else []


def superseded(folder: Path, jobs: list[Job], arguments: argparse.Namespace) -> list[Path]:
    """Records in ``folder`` that do not belong to the input: refused, with --overwrite or --remove_stale to be removed at the end."""
    others = strangers(folder, jobs)
    removable = list(filter(made_by_berth, others)) if arguments.overwrite else []
    if arguments.remove_stale:
        removable += [path for path in others if path not in removable and made_of_older_shards(path, jobs)]
    # another rank or array task may have removed one since: it is in nobody's way
    others = [path for path in others if path not in removable and path.exists()]
    if others:
        raise DataError(
            f"{folder} holds records that are not from --input_file: {', '.join(path.name for path in others[:5])}"
            f"{' ...' if len(others) > 5 else ''}; training would mix them in. Use another --output_dir, --remove_stale to remove "
            "those of earlier shards of the same prefix, or --overwrite to remove all that berth made"
        )
    return removable


def watch(results: Iterable[Result], total: int, prefix: str) -> list[Result]:
    """Run through ``results`` with a bar on a terminal, a line for each file elsewhere."""
    done: list[Result] = []
    if sys.stderr.isatty() and not prefix:
        from tqdm import tqdm  # takes as long to load as small shards to make

        return list(tqdm(results, total=total, unit="file"))
    for number, result in enumerate(results, 1):
        done.append(result)
        how = "up to date" if result.skipped else f"made in {result.seconds:.1f} s"
        print(f"{prefix}[{number}/{total}] {result.output}: {result.counts.instances} instances, {how}", flush=True)
    return done


def summarize(results: list[Result], options: RecordOptions, seconds: float) -> None:
    counts: RecordCounts = results[0].counts
    for result in results[1:]:
        counts = counts + result.counts
    made = [result for result in results if not result.skipped]
    rate = sum(result.input_bytes for result in made) / 1e6 / seconds
    print(
        f"{counts.instances} instances from {counts.documents} documents, {counts.sentences} sentences, "
        f"{counts.tokens} tokens ({100 * counts.unknown_tokens / counts.tokens:.3f} % [UNK]); "
        f"mean fill {100 * counts.used_tokens / counts.instances / options.max_seq_length:.1f} %, "
        f"{counts.masked / counts.instances:.2f} masked per instance, "
        f"random next {100 * counts.random_next / counts.instances:.1f} % "
        f"({counts.forced_random} because nothing followed); "
        f"{counts.empty_sentences} sentences and {counts.empty_documents} documents without a token left out"
    )
    unknown = counts.unknown_tokens / counts.tokens
    if unknown > MOST_UNKNOWN:
        print(
            f"warning: {100 * unknown:.1f} % of the tokens are [UNK]: the vocabulary does not fit this text; give the --cased or "
            "--do_lower_case with which --vocab_file was trained, or train a vocabulary on this text (data/vocab.py)"
        )
    print(f"{len(made)} file(s) made, {len(results) - len(made)} up to date, {seconds:.1f} s, {rate:.1f} MB/s")


def share_of(arguments: argparse.Namespace) -> Share:
    """This process's share of the work. Raises :class:`ConfigError` for one output file shared by several."""
    share = find_share(arguments.distributed)
    if share.count > 1 and arguments.output_file is not None:
        raise ConfigError(
            f"{share.count} processes share this work ({share.kind}), but one --output_file is made by one process: use "
            "--output_dir, or --distributed none"
        )
    return share


def work(arguments: argparse.Namespace, options: RecordOptions, share: Share) -> None:
    start = time.perf_counter()
    load_vocabulary(Path(arguments.vocab_file))
    jobs, old = plan(arguments, options)
    if share.first:
        notices(arguments, options)
    mine = deal(jobs, [sum(file.stat().st_size for file in job.files) for job in jobs], share.count)[share.index]
    stop_on_sigterm([path for job in mine for path in job.outputs()])
    prefix = f"{share.kind} {share.index} of {share.count}: " if share.count > 1 else ""
    results = share.gather(watch(run_jobs(mine, arguments.processes, arguments.overwrite), len(mine), prefix))
    if share.sees_all:
        for path in old:
            path.unlink(missing_ok=True)
            print(f"removed {path}: not a shard of --input_file")
        if arguments.output_dir is not None:
            write_manifest(
                Path(arguments.output_dir), Path(arguments.vocab_file), options, results, others=Path(arguments.input_file).is_file()
            )
    elif share.comm is None:
        if not results:
            print(f"{prefix}no file for this task: there are {len(jobs)}")
        if share.first:  # nobody sees when the last task is done
            print(
                f"{prefix}when all tasks are done, run this once more with --distributed none and without --overwrite: it writes records.json"
            )
            if old:
                names = f"{', '.join(path.name for path in old[:5])}{' ...' if len(old) > 5 else ''}"
                print(f"{prefix}warning: {names}: not of --input_file and not removed by one of several tasks; training would read them")
    if results and (share.sees_all or share.comm is None):
        summarize(results, options, time.perf_counter() - start)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names that are not UTF-8
    share = share_of(arguments)
    options = RecordOptions(
        max_seq_length=arguments.max_seq_length,
        max_predictions_per_seq=arguments.max_predictions_per_seq,
        masked_lm_prob=arguments.masked_lm_prob,
        short_seq_prob=arguments.short_seq_prob,
        dupe_factor=arguments.dupe_factor,
        random_seed=arguments.random_seed,
        lowercase=wants_lowercase(arguments),
        whole_word_mask=arguments.do_whole_word_mask,
        objective=arguments.objective,
        masking=arguments.masking,
        layout=arguments.layout,
        bin_size=arguments.bin_size,
    )
    share.guarded(lambda: work(arguments, options, share))


if __name__ == "__main__":
    run_main(main)
