"""SentencePiece BPE vocabularies as WordPiece ones.

In: counted words, or the ``<prefix>.vocab`` of a SentencePiece model. Out: pieces of a vocab.txt.

The rule: ``▁x`` -> ``x``, ``x`` -> ``##x``; ``<unk> <s> </s>``, empty pieces, the lone ``▁`` and duplicates go; ``[PAD]``,
``[unusedN]``, ``[UNK] [CLS] [SEP] [MASK]`` come first. The classic recipe (``spmtrain.py`` on raw text, then ``sent2wordpiece.py``)
has three faults, which :func:`learn_sentencepiece` does not repeat:

* SentencePiece sees the raw text, and learns pieces with punctuation glued to words that BERT, which splits punctuation off first, can
  never use. Here it is given the words that BERT's own splitting leaves, with their counts (its TSV input: exact, in flat memory).
* The size comes out as asked for - 3 - 1 + 105: 32101 instead of 32000. Here the final size is what was asked for, exactly.
* A character gets its word-initial form only if ``▁x`` happens to be merged, else a word that begins with it is [UNK]. Here every
  character of the alphabet has both forms.

SentencePiece learns merges one after the other, so a longer vocabulary begins with the shorter one: it is asked for more than needed
and cut. Rejected: a second run with a corrected size (twice the time, and still a guess).
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from berth.errors import ConfigError, DataError
from berth.files import atomic_open
from berth.text.lines import read_lines
from berth.text.tokenizer import MAX_WORD_CHARACTERS
from berth.text.training import special_pieces
from berth.text.vocabulary import CONTINUATION, SPECIAL_TOKENS

WORD_START = "\u2581"  # ▁
UNUSED = 100
_UNKNOWN = "\u2585"  # what SentencePiece itself writes for characters it left out
_CONTROL = re.compile(r"<(?:unk|s|/s|pad|0x[0-9A-F]{2})>")
_TOO_HIGH = re.compile(r"Vocabulary size too high \((\d+)\)\. Please set it to a value <= (\d+)")
_TOO_SMALL = re.compile(r"Vocabulary size is smaller than required_chars\. (\d+) vs (\d+)")


def import_sentencepiece(needed_by: str) -> ModuleType:
    """The optional library, or a :class:`ConfigError` that says who needs it and how to install it."""
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError(f'{needed_by} needs the library sentencepiece: pip install "berth[sentencepiece]"') from error
    module: ModuleType = sentencepiece
    return module


def convert_piece(piece: str) -> str:
    """``▁x`` -> ``x``, ``x`` -> ``##x``; the lone ``▁`` and the empty piece give ''."""
    if piece.startswith(WORD_START):
        return piece[len(WORD_START) :]
    return CONTINUATION + piece if piece else ""


def convert_pieces(pieces: Iterable[str], seen: Iterable[str] = (), keep_control: bool = False) -> Iterator[str]:
    """WordPiece forms of SentencePiece pieces in their order, without those in ``seen`` and without duplicates."""
    known = set(seen)
    for piece in pieces:
        control = _CONTROL.fullmatch(piece) is not None
        converted = piece if control else convert_piece(piece)
        if converted and converted not in known and not any(c.isspace() for c in converted) and (keep_control or not control):
            known.add(converted)
            yield converted


# -------------------------------------------------------------------------------------------------- --method sentencepiece


def _tsv(words: Iterable[tuple[str, int]]) -> Iterator[str]:
    for word, count in words:
        if WORD_START not in word and _UNKNOWN not in word:
            yield f"{word}\t{count}"


def _longest(words: Sequence[tuple[str, int]]) -> int:
    return max((len(word.encode()) for word, _ in words), default=1)


def learn_sentencepiece(words: Sequence[tuple[str, int]], initial: Sequence[str], vocab_size: int, verbose: bool = False) -> list[str]:
    """``initial`` and the pieces SentencePiece merges, exactly ``vocab_size`` in all.

    Args:
        words: distinct words with counts, of characters of the alphabet only.
        initial: special tokens, the alphabet and its ``##`` forms.
        verbose: let SentencePiece write its log to stderr.

    Raises:
        ConfigError: the library is not installed, or the text gives fewer pieces (the message has the largest size).
    """
    sentencepiece = import_sentencepiece("--method sentencepiece")
    model = io.BytesIO()
    if vocab_size > len(initial):
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_tsv(words),
                model_writer=model,
                input_format="tsv",
                model_type="bpe",
                vocab_size=vocab_size + len(initial),  # some merges only give the word-initial form of a character
                hard_vocab_limit=False,
                character_coverage=1.0,
                normalization_rule_name="identity",
                max_sentencepiece_length=MAX_WORD_CHARACTERS,  # pieces may be whole words: BERT's splitting has cut enough
                split_by_number=False,
                split_by_unicode_script=False,
                max_sentence_length=max(4192, 2 * _longest(words)),
                num_threads=1,
                minloglevel=0 if verbose else 2,
            )
        except (RuntimeError, OSError) as error:
            raise DataError(f"SentencePiece could not learn from these words: {error}") from error
    merged: list[str] = []
    if model.getvalue():
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        learnt = (processor.id_to_piece(number) for number in range(processor.get_piece_size()))
        matchable = set(initial)  # a ## form that is not there belongs to a character that always stands alone
        for piece in convert_pieces(learnt, initial):
            if len(piece.removeprefix(CONTINUATION)) > 1 or piece in matchable:
                merged.append(piece)
    if len(initial) + len(merged) < vocab_size:
        raise ConfigError(
            f"--vocab_size {vocab_size} is more than this text gives: the largest possible with these options is "
            f"{len(initial) + len(merged)}; lower it, or give more text"
        )
    return [*initial, *merged[: vocab_size - len(initial)]]


# ------------------------------------------------------------------------------------------------------------ the two scripts


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What :func:`train_model` wrote, and how many sentences it read, took, and left out for their length."""

    model: Path
    vocabulary: Path
    sentences: int
    taken: int
    too_long: int


def _whole(options: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(options.get(name, default))
    except ValueError:
        raise ConfigError(f"--{name}={options[name]} must be a whole number") from None


def take_evenly(lines: Iterable[str], total: int, wanted: int, seed: int) -> Iterator[str]:
    """``wanted`` of ``total`` lines, every choice equally likely, in their order; the same for the same seed."""
    rng = random.Random(seed)
    for left, line in zip(range(total, 0, -1), lines, strict=True):
        if rng.random() * left < wanted:
            wanted -= 1
            yield line


def train_model(options: Mapping[str, str], seed: int = 12345, verbose: bool = False) -> TrainedModel:
    """Train a SentencePiece model with SentencePiece's own options; ``<model_prefix>.model`` and ``.vocab``, complete or absent.

    ``options``: name -> value as typed, ``input`` (files joined by commas) and ``model_prefix`` among them. ``seed`` decides which
    sentences ``input_sentence_size`` takes: SentencePiece itself takes others every time, so the choice is made here. The model is
    taken from memory, since a file would hold the name it was first written under.
    Raises :class:`ConfigError` for missing or wrong options, :class:`DataError` for a missing or empty input.
    """
    sentencepiece = import_sentencepiece("spmtrain.py")
    for name in ("input", "model_prefix", "vocab_size"):
        if not options.get(name):
            raise ConfigError(
                f"--{name} is required, for example: spmtrain.py FILE --model_prefix=bert --vocab_size=32000 --model_type=bpe"
            )
    files = [Path(name) for name in options["input"].split(",")]
    longest = _whole(options, "max_sentence_length", 4192)
    sentences = too_long = 0
    for line in itertools.chain.from_iterable(map(read_lines, files)):  # also checks that the files are there and all UTF-8
        sentences += bool(line)
        too_long += len(line) > longest or (len(line) * 4 > longest and len(line.encode()) > longest)
    if not sentences:
        raise DataError(f"{options['input']}: no text to train on")
    limit = _whole(options, "input_sentence_size", 0)
    model = io.BytesIO()
    given: dict[str, Any] = {"minloglevel": "0" if verbose else "2", **options, "model_writer": model}
    del given["model_prefix"]
    if 0 < limit < sentences and options.get("shuffle_input_sentence", "true").lower() not in ("false", "0", "f", "no", "n"):
        lines = (line for line in itertools.chain.from_iterable(map(read_lines, files)) if line)
        given.update(sentence_iterator=take_evenly(lines, sentences, limit, seed), input_sentence_size="0")
        del given["input"]
    try:
        sentencepiece.SentencePieceTrainer.train(**given)
    except (RuntimeError, OSError, ValueError) as error:
        raise _explained(error, options) from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    prefix = options["model_prefix"]
    result = TrainedModel(Path(f"{prefix}.model"), Path(f"{prefix}.vocab"), sentences, min(limit or sentences, sentences), too_long)
    with atomic_open(result.model, "wb") as handle:
        handle.write(model.getvalue())
    with atomic_open(result.vocabulary) as handle:
        for number in range(processor.get_piece_size()):
            handle.write(f"{processor.id_to_piece(number)}\t{processor.get_score(number):g}\n")
    return result


def _explained(error: Exception, arguments: Mapping[str, str]) -> Exception:
    """SentencePiece's errors in the words of its options."""
    text = str(error)
    if found := _TOO_HIGH.search(text):
        return ConfigError(f"--vocab_size={found[1]} is more than this text gives: the largest possible is {found[2]}")
    if found := _TOO_SMALL.search(text):
        return ConfigError(f"--vocab_size={found[1]} is too small: the characters alone need {found[2]}; or lower --character_coverage")
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return ConfigError(f"SentencePiece refused these options: {' '.join(text.split())}")


def read_sentencepiece_vocabulary(path: str | Path) -> list[str]:
    """The pieces of a ``.vocab`` file (``piece<TAB>score`` a line). Raises :class:`DataError` for any other file."""
    pieces = []
    for number, line in enumerate(read_lines(Path(path)), 1):
        piece, tab, score = line.rpartition("\t")
        try:
            float(score)
        except ValueError:
            tab = ""
        if not tab:
            raise DataError(f"{path}: line {number} is not 'piece<TAB>score'; give the .vocab file that spmtrain.py wrote")
        pieces.append(piece)
    if not pieces:
        raise DataError(f"{path}: empty; give the .vocab file that spmtrain.py wrote")
    return pieces


def convert_vocabulary(
    pieces: Sequence[str],
    *,
    unused: int = UNUSED,
    specials: bool = True,
    keep_control: bool = False,
    add_characters: bool = False,
    size: int | None = None,
) -> list[str]:
    """Pieces of a SentencePiece vocabulary -> lines of a vocab.txt.

    Args:
        pieces: in the order of the ``.vocab`` file.
        unused: number of ``[unusedN]``.
        specials: put the special tokens and ``[unusedN]`` first.
        keep_control: keep ``<unk> <s> </s>`` as they are.
        add_characters: every single character gets both forms, ``x`` and ``##x`` (at the end of the list, sorted).
        size: exact number of lines; merged pieces are left out from the end. None: as many as there are.

    Raises :class:`ConfigError` for a ``size`` that is too small or too large, or a negative ``unused``.
    """
    if unused < 0:
        raise ConfigError(f"--unused {unused} must not be negative")
    first = special_pieces(unused) if specials else []
    converted = list(convert_pieces(pieces, [*first, *SPECIAL_TOKENS], keep_control))
    bare = {piece.removeprefix(CONTINUATION) for piece in converted if piece != CONTINUATION}
    characters = sorted(piece for piece in bare if len(piece) == 1)
    added: list[str] = []
    if add_characters:
        there = set(converted)
        added = [form for form in (*characters, *(CONTINUATION + c for c in characters)) if form not in there]
    if size is not None:
        most = len(first) + len(converted) + len(added)
        too_many = most - size
        if too_many < 0:
            raise ConfigError(f"--size {size} is more than the {most} pieces there are; train SentencePiece with a larger --vocab_size")
        removable = [piece for piece in converted if len(piece.removeprefix(CONTINUATION)) > 1 and not _CONTROL.fullmatch(piece)]
        if too_many > len(removable):
            raise ConfigError(f"--size {size} is too small: specials and characters alone are {most - len(removable)}")
        cut = set(removable[len(removable) - too_many :])
        converted = [piece for piece in converted if piece not in cut]
    return [*first, *converted, *added]
