"""Train a WordPiece vocabulary, the same bytes every time.

In: counted words (:mod:`berth.text.counting`), or UTF-8 text files. Out: the pieces of a vocab.txt in the order ``[PAD]``, ``[unusedN]``
if wanted, ``[UNK] [CLS] [SEP] [MASK]``, the alphabet by code point, its ``##`` forms, then merged pieces, most useful first.

The merges are learnt by the Rust BPE trainer of ``tokenizers`` (what its WordPiece trainer runs). Left alone it numbers
the ``##`` characters in hash-map order, different in every process, and ties between equally frequent pairs are broken by
these numbers: three runs gave three vocabularies. Here the whole alphabet is given to it beforehand in sorted order, as
initial tokens, so every number is fixed before the first word is counted. Characters outside the alphabet and the words
that hold them take no part. Rejected: a trainer in Python (deterministic, but minutes where this takes seconds).

The trainer has no way to be told how often a word occurs but to be fed it that often (0.15 us each, 2026-11-21). Up to 100 million
running words that is done and is exact; of more (about 600 MB of text) all counts are divided by the same number first, rounded,
which moves merges only where two pairs are about equally frequent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from berth.errors import ConfigError
from berth.files import atomic_open
from berth.text.counting import WordCounts, count_characters, count_text
from berth.text.report import evaluate_wordpiece
from berth.text.tokenizer import bert_normalizer
from berth.text.vocabulary import CONTINUATION, SPECIAL_TOKENS, Vocabulary

ALPHABET_LIMIT = 1000
MIN_FREQUENCY = 2
FED_WORDS = 100_000_000
_BATCH_WORDS = 10_000


@dataclasses.dataclass(frozen=True)
class VocabularyCounts:
    """What training found. ``unk_share`` is of running words, over the words that were counted."""

    size: int
    requested_size: int
    words: int
    distinct_words: int
    distinct_characters: int
    alphabet: int
    unk_share: float


def count_words(files: Sequence[Path], lowercase: bool) -> Counter[str]:
    """Count the words of ``files`` after BERT's cleaning and splitting; :func:`berth.text.counting.count_text` does more."""
    return count_text(files, "bert", lowercase).words


# ------------------------------------------------------------------------------------------------------ the alphabet


def ranked_characters(characters: Counter[str]) -> list[str]:
    """Most frequent first, ties by code point."""
    return sorted(characters, key=lambda character: (-characters[character], character))


def limit_characters(characters: Counter[str], limit: int, coverage: float = 1.0) -> list[str]:
    """The most frequent characters, at most ``limit``, as few as cover the share ``coverage`` of running characters; by code point."""
    needed = coverage * sum(characters.values())
    chosen: list[str] = []
    covered = 0
    for character in ranked_characters(characters)[:limit]:
        if chosen and covered >= needed:
            break
        chosen.append(character)
        covered += characters[character]
    return sorted(chosen)


def choose_alphabet(words: Counter[str], limit: int) -> tuple[list[str], int]:
    """The ``limit`` most frequent characters (ties by code point) sorted by code point, and how many there were."""
    characters = count_characters(words)
    return limit_characters(characters, limit), len(characters)


def alphabet_pieces(alphabet: Sequence[str]) -> list[str]:
    """Every character and, where it can stand inside a word, its ``##`` form, sorted."""
    normalizer, splitter = bert_normalizer(False), pre_tokenizers.BertPreTokenizer()

    @functools.cache
    def stands_alone(character: str) -> bool:
        return len(splitter.pre_tokenize_str(normalizer.normalize_str("a" + character))) > 1

    return list(alphabet) + [CONTINUATION + character for character in alphabet if not stands_alone(character)]


def special_pieces(unused: int) -> list[str]:
    """``[PAD]``, ``unused`` times ``[unusedN]`` (from 0), then the other special tokens: Google's order."""
    return [SPECIAL_TOKENS[0], *(f"[unused{number}]" for number in range(unused)), *SPECIAL_TOKENS[1:]]


def initial_pieces(counts: WordCounts, vocab_size: int, alphabet_limit: int, coverage: float, unused: int) -> tuple[list[str], list[str]]:
    """The alphabet, and the pieces that stand before the merged ones. Raises :class:`ConfigError` if ``vocab_size`` cannot hold them."""
    if vocab_size < 1 or alphabet_limit < 1:
        raise ConfigError(f"--vocab_size {vocab_size} and --limit_alphabet {alphabet_limit} must be at least 1")
    if not 0 < coverage <= 1:
        raise ConfigError(f"--character_coverage {coverage:g} must be above 0 and at most 1")
    if unused < 0:
        raise ConfigError(f"--unused {unused} must not be negative")
    alphabet = limit_characters(counts.characters, alphabet_limit, coverage)
    initial = [*special_pieces(unused), *alphabet_pieces(alphabet)]
    if len(initial) > vocab_size:
        raise ConfigError(
            f"--vocab_size {vocab_size} is too small: {len(SPECIAL_TOKENS) + unused} special tokens and {len(alphabet)} distinct "
            f"characters with their ## forms need {len(initial)}; raise it, or lower --limit_alphabet"
        )
    return alphabet, initial


# ----------------------------------------------------------------------------------------------------------- merges


def usable_words(words: Counter[str], alphabet: Iterable[str]) -> list[tuple[str, int]]:
    """Words of characters of the alphabet only, with their counts, sorted: what merges are learnt from."""
    characters = set(alphabet)
    return sorted((word, count) for word, count in words.items() if characters.issuperset(word))


def training_batches(words: Iterable[tuple[str, int]]) -> Iterator[str]:
    """Lines of words for the trainer: every word as often as it was counted, in the given order."""
    batch: list[str] = []
    for word, count in words:
        left = count
        while left:
            taken = min(left, _BATCH_WORDS - len(batch))
            batch += [word] * taken
            left -= taken
            if len(batch) == _BATCH_WORDS:
                yield " ".join(batch)
                batch = []
    if batch:
        yield " ".join(batch)


def scale_counts(words: list[tuple[str, int]], min_frequency: int, limit: int = FED_WORDS) -> tuple[list[tuple[str, int]], int, int]:
    """Counts and ``min_frequency`` divided by the smallest whole number that leaves at most about ``limit``; that number."""
    divisor = max(1, -(-sum(count for _, count in words) // limit))
    if divisor == 1:
        return words, min_frequency, 1
    scaled = [(word, rounded) for word, count in words if (rounded := (count + divisor // 2) // divisor)]
    return scaled, max(1, -(-min_frequency // divisor)), divisor


def learn_merges(words: list[tuple[str, int]], initial: Sequence[str], vocab_size: int, min_frequency: int) -> list[str]:
    """``initial`` and the pieces merged from it, in id order: at most ``vocab_size``. ``words`` as :func:`usable_words`."""
    if min_frequency < 1:
        raise ConfigError(f"--min_frequency {min_frequency} must be at least 1")
    fed, least, _ = scale_counts(words, min_frequency)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=least,
        special_tokens=[AddedToken(piece, normalized=False, special=True) for piece in initial],
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(training_batches(fed), trainer)
    ids = learner.get_vocab()
    pieces = sorted(ids, key=lambda piece: ids[piece])
    assert pieces[: len(initial)] == list(initial) and len(pieces) <= vocab_size, "the trainer changed the given alphabet"
    return pieces


def write_pieces(output: str | Path, pieces: Iterable[str]) -> Vocabulary:
    """Write a vocab.txt (atomically) and read it back with all checks."""
    with atomic_open(output) as handle:
        handle.writelines(piece + "\n" for piece in pieces)
    return Vocabulary.load(output)


def train_wordpiece(
    files: Sequence[str | Path],
    vocab_size: int,
    output: str | Path,
    lowercase: bool = True,
    min_frequency: int = MIN_FREQUENCY,
    alphabet_limit: int = ALPHABET_LIMIT,
) -> VocabularyCounts:
    """Learn a vocabulary of at most ``vocab_size`` pieces from ``files`` and write it to ``output`` (atomically).

    Args:
        files: UTF-8 text; sentences files and shards do.
        vocab_size: upper bound, special tokens included. A small corpus yields fewer.
        lowercase: lower-case and strip accents (uncased), or keep both (cased).
        min_frequency: a pair of pieces seen less often is not merged.
        alphabet_limit: at most so many distinct characters; the rarest become ``[UNK]``.

    Raises:
        ConfigError: a number is out of range, or ``vocab_size`` does not hold the specials and the alphabet.
        DataError: as :func:`count_text`.
    """
    counts = count_text([Path(file) for file in files], "bert", lowercase)
    alphabet, initial = initial_pieces(counts, vocab_size, alphabet_limit, 1.0, 0)
    vocabulary = write_pieces(output, learn_merges(usable_words(counts.words, alphabet), initial, vocab_size, min_frequency))
    report = evaluate_wordpiece(vocabulary, counts)
    return VocabularyCounts(
        size=vocabulary.size,
        requested_size=vocab_size,
        words=counts.running_words,
        distinct_words=len(counts.words),
        distinct_characters=len(counts.characters),
        alphabet=len(alphabet),
        unk_share=report.unk_word_share,
    )
