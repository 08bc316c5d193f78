"""Train a WordPiece vocabulary, the same bytes every time.

In: UTF-8 text files. Out: the pieces of a vocab.txt in the order ``[PAD] [UNK] [CLS] [SEP] [MASK]``, the alphabet by code
point (each character, then its ``##`` form), then merged pieces, most useful first.

The merges are learnt by the Rust BPE trainer of ``tokenizers`` (what its WordPiece trainer runs). Left alone it numbers
the ``##`` characters in hash-map order, different in every process, and ties between equally frequent pairs are broken by
these numbers: three runs gave three vocabularies. Here the whole alphabet is given to it beforehand in sorted order, as
initial tokens, so every number is fixed before the first word is counted. Characters outside the alphabet and the words
that hold them take no part. Rejected: a trainer in Python (deterministic, but minutes where this takes seconds).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from berth.errors import ConfigError, DataError
from berth.files import atomic_open
from berth.text.lines import read_blocks
from berth.text.tokenizer import MAX_WORD_CHARACTERS, bert_normalizer, drop_controls, load_tokenizer
from berth.text.vocabulary import CONTINUATION, SPECIAL_TOKENS, Vocabulary

ALPHABET_LIMIT = 1000
MIN_FREQUENCY = 2
UNK_SAMPLE_WORDS = 100_000
_BATCH_WORDS = 10_000


@dataclasses.dataclass(frozen=True)
class VocabularyCounts:
    """What :func:`train_wordpiece` found. ``unk_share`` is of running words, over the most frequent distinct words."""

    size: int
    requested_size: int
    words: int
    distinct_words: int
    distinct_characters: int
    alphabet: int
    unk_share: float


def count_words(files: Sequence[Path], lowercase: bool) -> Counter[str]:
    """Count the words of ``files`` after BERT's cleaning and splitting (punctuation and CJK characters stand alone).

    Raises :class:`DataError` for a missing file, invalid UTF-8, or files without any word.
    """
    raw: Counter[str] = Counter()
    for file in files:
        for block in read_blocks(file):
            raw.update(drop_controls(block).split())
    normalizer, splitter = bert_normalizer(lowercase), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for word, count in raw.items():
        for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(word)):
            words[piece] += count
    if not words:
        raise DataError(f"{', '.join(str(file) for file in files)}: no word to learn a vocabulary from")
    return words


def choose_alphabet(words: Counter[str], limit: int) -> tuple[list[str], int]:
    """The ``limit`` most frequent characters (ties by code point) sorted by code point, and how many there were."""
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    ranked = sorted(characters, key=lambda character: (-characters[character], character))
    return sorted(ranked[:limit]), len(characters)


def alphabet_pieces(alphabet: Sequence[str]) -> list[str]:
    """Every character and, where it can stand inside a word, its ``##`` form, sorted."""
    normalizer, splitter = bert_normalizer(False), pre_tokenizers.BertPreTokenizer()

    @functools.cache
    def stands_alone(character: str) -> bool:
        return len(splitter.pre_tokenize_str(normalizer.normalize_str("a" + character))) > 1

    return list(alphabet) + [CONTINUATION + character for character in alphabet if not stands_alone(character)]


def _training_batches(words: Counter[str], alphabet: set[str]) -> Iterator[str]:
    """Lines of words for the trainer: every word as often as it was counted, in sorted order."""
    batch: list[str] = []
    for word in sorted(words):
        if len(word) > MAX_WORD_CHARACTERS or not alphabet.issuperset(word):
            continue
        left = words[word]
        while left:
            taken = min(left, _BATCH_WORDS - len(batch))
            batch += [word] * taken
            left -= taken
            if len(batch) == _BATCH_WORDS:
                yield " ".join(batch)
                batch = []
    if batch:
        yield " ".join(batch)


def _learn_merges(words: Counter[str], alphabet: set[str], initial: list[str], vocab_size: int, min_frequency: int) -> list[str]:
    """``initial`` and the pieces merged from it, in id order: at most ``vocab_size``."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(piece, normalized=False, special=True) for piece in initial],
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator(_training_batches(words, alphabet), trainer)
    ids = learner.get_vocab()
    pieces = sorted(ids, key=lambda piece: ids[piece])
    assert pieces[: len(initial)] == initial and len(pieces) <= vocab_size, "the trainer changed the given alphabet"
    return pieces


def _unk_share(vocabulary: Vocabulary, words: Counter[str]) -> float:
    """Share of running words that become ``[UNK]``, over the most frequent distinct words."""
    sample = sorted(words, key=lambda word: (-words[word], word))[:UNK_SAMPLE_WORDS]
    # The words are normalised already: nothing more to lower-case.
    tokenizer = load_tokenizer(vocabulary, lowercase=False, special_tokens=False)
    encoded = tokenizer.encode_batch_fast(sample, add_special_tokens=False)
    unknown = sum(words[word] for word, found in zip(sample, encoded, strict=True) if vocabulary.unk_id in found.ids)
    return unknown / sum(words[word] for word in sample)


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
        DataError: as :func:`count_words`.
    """
    if vocab_size < 1 or min_frequency < 1 or alphabet_limit < 1:
        raise ConfigError(
            f"--vocab_size {vocab_size}, --min_frequency {min_frequency} and --limit_alphabet {alphabet_limit} must be at least 1"
        )
    words = count_words([Path(file) for file in files], lowercase)
    alphabet, distinct = choose_alphabet(words, alphabet_limit)
    initial = [*SPECIAL_TOKENS, *alphabet_pieces(alphabet)]
    if len(initial) > vocab_size:
        raise ConfigError(
            f"--vocab_size {vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens and {len(alphabet)} distinct "
            f"characters with their ## forms need {len(initial)}; raise it, or lower --limit_alphabet"
        )
    pieces = _learn_merges(words, set(alphabet), initial, vocab_size, min_frequency)
    with atomic_open(output) as handle:
        handle.writelines(piece + "\n" for piece in pieces)
    vocabulary = Vocabulary.load(output)
    return VocabularyCounts(
        size=vocabulary.size,
        requested_size=vocab_size,
        words=sum(words.values()),
        distinct_words=len(words),
        distinct_characters=distinct,
        alphabet=len(alphabet),
        unk_share=_unk_share(vocabulary, words),
    )
