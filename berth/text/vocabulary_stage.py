"""The ``vocab`` stage: text files -> a vocabulary, its report, a matching model configuration, and a manifest.

In: UTF-8 text (files or folders). Out: vocab.txt (``wordpiece``, ``sentencepiece``) or a folder (``bytelevel``), and beside it
``<output>.vocab.json``:

``format``, ``format_version``, ``method``, ``complete``, ``options``, ``library`` (name and version of the trainer), ``inputs``
(``file``, ``bytes``, ``sha256``), ``outputs`` (name -> ``bytes``, ``sha256``), ``counts``, ``report`` (:class:`VocabularyReport`),
``seconds``.

Run again with the same inputs, options and trainer, and the outputs as they were, nothing is done. Everything is learnt and measured
before the first file is written; the manifest comes last.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from berth.errors import ConfigError, DataError
from berth.files import printable_name, read_json, sha256_file, write_json
from berth.text.bytelevel import FILES, SPECIALS, learn_bytelevel, write_bytelevel
from berth.text.counting import MAX_WORDS, WordCounts, count_text
from berth.text.lines import check_output, text_files
from berth.text.report import VocabularyReport, evaluate_bytelevel, evaluate_wordpiece, file_words
from berth.text.sentencepiece_bpe import UNUSED, import_sentencepiece, learn_sentencepiece
from berth.text.training import ALPHABET_LIMIT, MIN_FREQUENCY, initial_pieces, learn_merges, scale_counts, usable_words, write_pieces
from berth.text.vocabulary import Vocabulary

FORMAT, FORMAT_VERSION = "berth vocabulary", 1
METHODS = ("wordpiece", "sentencepiece", "bytelevel")


@dataclasses.dataclass(frozen=True)
class VocabularyOptions:
    """What decides the bytes of a vocabulary (all but ``processes`` and ``verbose``), and what is read and written.

    ``unused`` None: 100 for ``sentencepiece``, 0 for ``wordpiece``. ``config`` is a model configuration to copy to ``output_config`` with
    ``vocab_size`` rounded up to ``pad_vocab_to_multiple``. ``sample_bytes`` 0: everything.
    """

    inputs: tuple[Path, ...]
    output: Path
    vocab_size: int
    method: str = "wordpiece"
    lowercase: bool = True
    min_frequency: int = MIN_FREQUENCY
    limit_alphabet: int = ALPHABET_LIMIT
    character_coverage: float = 1.0
    unused: int | None = None
    pretokenize: bool = True
    max_words: int = MAX_WORDS
    sample_bytes: int = 0
    seed: int = 12345
    evaluate: Path | None = None
    report: Path | None = None
    config: Path | None = None
    output_config: Path | None = None
    pad_vocab_to_multiple: int = 8
    manifest: Path | None = None
    processes: int = 1
    verbose: bool = False

    @property
    def manifest_path(self) -> Path:
        """``<output>.vocab.json`` unless named."""
        return self.manifest or self.output.with_name(f"{self.output.name}.vocab.json")

    @property
    def rule(self) -> str:
        """What a word is while counting; see :mod:`berth.text.counting`."""
        if self.method == "bytelevel":
            return "bytes"
        return "bert" if self.pretokenize else "whitespace"

    def identity(self) -> dict[str, Any]:
        """The options that decide the bytes, as JSON."""
        names = ("vocab_size", "method", "lowercase", "min_frequency", "limit_alphabet", "character_coverage", "pretokenize", "max_words",
                 "sample_bytes", "seed", "pad_vocab_to_multiple")  # fmt: skip
        return {**{name: getattr(self, name) for name in names}, "unused": self.unused_count}

    @property
    def unused_count(self) -> int:
        """Number of ``[unusedN]``."""
        if self.unused is not None:
            return self.unused
        return UNUSED if self.method == "sentencepiece" else 0

    def check(self) -> None:
        """Raise :class:`ConfigError` for options that contradict each other, :class:`DataError` for a configuration that is not there."""
        if self.method not in METHODS:
            raise ConfigError(f"--method {self.method} is not one of {', '.join(METHODS)}")
        if (self.config is None) != (self.output_config is None):
            raise ConfigError("--bert_config (or --model_size) and --output_config go together: give both or neither")
        if self.method == "bytelevel" and self.lowercase:
            raise ConfigError("--method bytelevel keeps the text as it is, case included: leave --do_lower_case out")
        if self.method != "sentencepiece" and not self.pretokenize:
            raise ConfigError("--no_pretokenize goes with --method sentencepiece only")
        if self.method == "sentencepiece":
            import_sentencepiece("--method sentencepiece")
        if self.vocab_size < 1 or self.min_frequency < 1 or self.pad_vocab_to_multiple < 1 or self.processes < 1:
            raise ConfigError(
                f"--vocab_size {self.vocab_size}, --min_frequency {self.min_frequency}, --pad_vocab_to_multiple "
                f"{self.pad_vocab_to_multiple} and --processes {self.processes} must be at least 1"
            )
        read = [*self.inputs, *filter(None, [self.evaluate, self.config])]
        vocabulary = self.output / FILES[1] if self.method == "bytelevel" else self.output  # a .txt, which must not become input
        outputs = {"--output": vocabulary, "--output_config": self.output_config, "--report": self.report,
                   "--manifest": self.manifest_path}  # fmt: skip
        taken: list[Path] = []
        for option, path in outputs.items():
            if path is not None:
                check_output(option, path, [*read, *taken])
                taken.append(path)
        if self.method == "bytelevel" and self.output.exists() and not self.output.is_dir():
            raise ConfigError(f"--output {self.output} is a file; --method bytelevel writes a folder")
        if self.method != "bytelevel" and self.output.is_dir():
            raise ConfigError(f"--output {self.output} is a folder; name the vocab.txt to write")
        if self.evaluate is not None and not self.evaluate.is_file():
            raise DataError(f"--evaluate {self.evaluate}: no such file")


@dataclasses.dataclass(frozen=True)
class VocabularyResult:
    """What the stage did. ``made`` False: everything was up to date and ``report`` is that of the earlier run."""

    made: bool
    size: int
    counts: dict[str, int]
    report: VocabularyReport
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Learnt:
    """A vocabulary in memory: its pieces, its report, how to write it."""

    pieces: tuple[str, ...]
    report: VocabularyReport
    alphabet: int
    outputs: tuple[Path, ...]
    write: functools.partial[Any]


# --------------------------------------------------------------------------------------------------------- learning


def _wordpiece(options: VocabularyOptions, counts: WordCounts) -> _Learnt:
    """WordPiece, by either of the two trainers."""
    alphabet, initial = initial_pieces(
        counts, options.vocab_size, options.limit_alphabet, options.character_coverage, options.unused_count
    )  # fmt: skip
    words = usable_words(counts.words, alphabet)
    if options.method == "wordpiece":
        pieces = tuple(learn_merges(words, initial, options.vocab_size, options.min_frequency))
    else:
        pieces = tuple(learn_sentencepiece(words, initial, options.vocab_size, options.verbose))
    vocabulary = Vocabulary(pieces, hashlib.sha256("".join(piece + "\n" for piece in pieces).encode()).hexdigest())
    report = evaluate_wordpiece(vocabulary, counts, rule=options.rule, lowercase=options.lowercase, file=options.evaluate)
    return _Learnt(pieces, report, len(alphabet), (options.output,), functools.partial(write_pieces, options.output, pieces))


def _bytelevel(options: VocabularyOptions, counts: WordCounts) -> _Learnt:
    learnt = learn_bytelevel(sorted(counts.words.items()), options.vocab_size, options.min_frequency)
    parts = iter([(counts.words, counts.characters, counts.long_words)])
    if options.evaluate is not None:
        parts = file_words(options.evaluate, "bytes", False)
    report = evaluate_bytelevel(Tokenizer(learnt.model()), SPECIALS, parts)
    outputs = tuple(options.output / name for name in FILES)
    return _Learnt(tuple(learnt.pieces), report, 256, outputs, functools.partial(write_bytelevel, options.output, learnt))


# ---------------------------------------------------------------------------------------------------- configuration


def read_config(path: Path) -> dict[str, Any]:
    """A model configuration. Raises :class:`DataError` when it is missing or not a JSON object."""
    try:
        config = read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"--bert_config {path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"--bert_config {path}: not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"--bert_config {path}: must hold a JSON object")
    return config


def matching_config(config: dict[str, Any], size: int, multiple: int, method: str) -> dict[str, Any]:
    """``config`` with ``vocab_size`` = ``size`` rounded up to ``multiple``; for ``bytelevel`` also RoBERTa's ids and positions."""
    matched = {**config, "vocab_size": -(-size // multiple) * multiple}
    if method == "bytelevel":
        ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
        positions = int(config.get("max_position_embeddings", 512)) + 2  # RoBERTa counts positions from pad_token_id + 1
        matched.update(
            ids, model_type="roberta", architectures=["RobertaForMaskedLM"], type_vocab_size=1, max_position_embeddings=positions
        )
    return matched


# --------------------------------------------------------------------------------------------------------- manifest


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _library(method: str) -> dict[str, str]:
    name = "sentencepiece" if method == "sentencepiece" else "tokenizers"
    return {name: importlib.metadata.version(name)}


def _head(options: VocabularyOptions, files: Sequence[Path]) -> dict[str, Any]:
    """What must be equal for a vocabulary to be up to date, and the names of the inputs."""
    extra = {name: _described(path) for name, path in (("evaluate", options.evaluate), ("bert_config", options.config)) if path is not None}
    return {
        "format": FORMAT, "format_version": FORMAT_VERSION, "method": options.method, "options": options.identity(),
        "library": _library(options.method), "inputs": [{"file": printable_name(file.name), **_described(file)} for file in files], "read": extra,
    }  # fmt: skip


def _outputs(options: VocabularyOptions, learnt_outputs: Sequence[Path]) -> dict[str, Path]:
    """Names in the manifest -> files, so that a folder can be moved with everything in it."""
    named = {path.name: path for path in learnt_outputs}
    for name, path in (("output_config", options.output_config), ("report", options.report)):
        if path is not None:
            named[name] = path
    return named


def up_to_date(options: VocabularyOptions, head: dict[str, Any]) -> VocabularyResult | None:
    """The result of an earlier run with the same inputs and options whose outputs are unchanged, or None."""
    try:
        manifest = read_json(options.manifest_path)
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or any(manifest.get(key) != value for key, value in head.items()):
        return None
    vocabulary = [options.output / name for name in FILES] if options.method == "bytelevel" else [options.output]
    wanted = _outputs(options, vocabulary)
    outputs = manifest.get("outputs", {})
    try:
        if outputs.keys() != wanted.keys() or any(_described(path) != outputs[name] for name, path in wanted.items()):
            return None
        report = VocabularyReport(**{**manifest["report"], "longest_pieces": tuple(manifest["report"]["longest_pieces"])})
        return VocabularyResult(False, int(manifest["counts"]["size"]), manifest["counts"], report, 0.0)
    except (OSError, KeyError, TypeError, AttributeError):
        return None


# ------------------------------------------------------------------------------------------------------------ stage


def make_vocabulary(options: VocabularyOptions) -> VocabularyResult:
    """Make the vocabulary of ``options``, or find it made.

    Raises :class:`ConfigError` (options, a size the text or the alphabet does not allow, a missing library) and
    :class:`DataError` (missing, empty or undecodable text); nothing is written then.
    """
    start = time.perf_counter()
    options.check()
    config = read_config(options.config) if options.config is not None else None
    files = list(dict.fromkeys(file for path in options.inputs for file in text_files(path)))
    head = _head(options, files)
    earlier = up_to_date(options, head)
    if earlier is not None:
        return earlier
    counts = count_text(
        files, options.rule, options.lowercase, max_words=options.max_words, sample_bytes=options.sample_bytes, seed=options.seed,
        processes=options.processes,
    )  # fmt: skip
    learnt = _bytelevel(options, counts) if options.method == "bytelevel" else _wordpiece(options, counts)
    numbers = {
        "size": len(learnt.pieces), "requested_size": options.vocab_size, "files": len(files),
        "bytes_in": sum(file.stat().st_size for file in files), "bytes_counted": counts.bytes_read,
        "words": counts.running_words, "distinct_words": len(counts.words),
        "rejected_long_words": counts.long_words, "rejected_rare_words": counts.dropped_words,
        "distinct_characters": len(counts.characters), "alphabet": learnt.alphabet,
        "count_divisor": 1 if options.method == "sentencepiece" else scale_counts(list(counts.words.items()), 1)[2],
    }  # fmt: skip
    options.manifest_path.unlink(missing_ok=True)  # a run that is killed from here on leaves no manifest of other outputs
    learnt.write()
    if config is not None and options.output_config is not None:
        write_json(options.output_config, matching_config(config, len(learnt.pieces), options.pad_vocab_to_multiple, options.method))
    described = dataclasses.asdict(learnt.report)
    if options.report is not None:
        write_json(options.report, {"counts": numbers, "report": described})
    seconds = round(time.perf_counter() - start, 3)
    outputs = {name: _described(path) for name, path in _outputs(options, learnt.outputs).items()}
    write_json(options.manifest_path, {**head, "complete": True, "outputs": outputs, "counts": numbers, "report": described,
                                       "seconds": seconds})  # fmt: skip
    return VocabularyResult(True, len(learnt.pieces), numbers, learnt.report, seconds)
