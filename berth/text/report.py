"""How well a vocabulary fits a text: exact figures over every word, printed and as JSON.

In: a vocabulary and counted words (those it was trained on, or those of an ``--evaluate`` file). Out: :class:`VocabularyReport`.

Every distinct word is tokenised once and weighs as often as it occurs, so the figures are those of the whole text, not of a sample.
A *word* is what BERT's splitting leaves (punctuation and CJK characters stand alone); for byte-level vocabularies a GPT-2 pre-token.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from berth.errors import DataError
from berth.text.counting import WordCounts, WordSplitter, count_characters, cut_spans, split_counts
from berth.text.lines import read_pieces
from berth.text.tokenizer import load_tokenizer
from berth.text.vocabulary import CONTINUATION, Vocabulary

_BATCH_WORDS = 20_000
_LONGEST = 10


@dataclasses.dataclass(frozen=True)
class VocabularyReport:
    """Figures of a vocabulary on a text.

    Sizes: ``size`` entries, ``special`` and ``unused`` of them never stand in text, ``alphabet`` are single characters (without ``##``),
    ``never_used`` ordinary pieces that the text did not need. Shares are of running words, tokens, or characters. ``fertility``: pieces
    per word ([UNK] counts as one); ``whole_word_share``: words that are one piece, not [UNK]; ``character_coverage``: share of
    ``characters``, all of the text (white space apart), that the vocabulary holds. Words that were too rare to be held while counting
    are in ``characters`` only.
    """

    size: int
    special: int
    unused: int
    alphabet: int
    never_used: int
    words: int
    characters: int
    tokens: int
    unk_words: int
    unk_word_share: float
    unk_token_share: float
    fertility: float
    characters_per_token: float
    whole_word_share: float
    character_coverage: float
    longest_pieces: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report for people."""
        ordinary = self.size - self.special - self.unused
        return [
            f"size               {self.size} ({self.special} special, {self.unused} [unused], {self.alphabet} single characters)",
            f"never used         {self.never_used} of {ordinary} pieces ({_percent(self.never_used / max(1, ordinary))})",
            f"unknown            {self.unk_words} of {self.words} words ({_percent(self.unk_word_share)}), "
            f"{_percent(self.unk_token_share)} of {self.tokens} tokens",
            f"fertility          {self.fertility:.4f} pieces per word, {self.characters_per_token:.3f} characters per piece",
            f"whole words        {_percent(self.whole_word_share)}",
            f"character coverage {_percent(self.character_coverage)} of {self.characters} characters",
            f"longest pieces     {' '.join(self.longest_pieces)}",
        ]


def _percent(share: float) -> str:
    return f"{100 * share:.4f} %"


class _Tally:
    """Adds up the tokens of counted words."""

    def __init__(self, tokenizer: Tokenizer, size: int, unk_id: int, holds: Callable[[str], bool]) -> None:
        self.tokenizer, self.unk_id, self.holds = tokenizer, unk_id, holds
        self.used = np.zeros(size, np.int64)
        self.words = self.unk_words = self.whole = self.letters = self.characters = self.covered = 0

    def add(self, words: Counter[str], characters: Counter[str], long_words: int) -> None:
        items = iter(words.items())
        while batch := list(itertools.islice(items, _BATCH_WORDS)):
            counts = [count for _, count in batch]
            encoded = self.tokenizer.encode_batch_fast([word for word, _ in batch], add_special_tokens=False)
            ids = [encoding.ids for encoding in encoded]
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
            flat = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(lengths.sum()))
            weights = np.array(counts, np.int64)
            np.add.at(self.used, flat, np.repeat(weights, lengths))
            unknown = np.zeros(len(ids), bool)
            unknown[np.repeat(np.arange(len(ids)), lengths)[flat == self.unk_id]] = True
            self.words += int(weights.sum())
            self.unk_words += int(weights[unknown].sum())
            self.whole += int(weights[(lengths == 1) & ~unknown].sum())
            self.letters += sum(len(word) * count for word, count in batch)
        if self.unk_id >= 0:  # a long word is one [UNK]; a byte-level vocabulary has none, and long words were not kept
            self.words += long_words
            self.unk_words += long_words
            self.used[self.unk_id] += long_words
        self.characters += sum(characters.values())
        self.covered += sum(count for character, count in characters.items() if self.holds(character))

    def report(self, pieces: Sequence[str], special: int, unused: int, aside: np.ndarray, prefix: str) -> VocabularyReport:
        tokens, words = int(self.used.sum()), max(1, self.words)
        unknown = int(self.used[self.unk_id]) if self.unk_id >= 0 else 0
        ordinary = [piece for piece, left_out in zip(pieces, aside, strict=True) if not left_out]
        longest = sorted(ordinary, key=lambda piece: (-len(piece.removeprefix(prefix)), piece))[:_LONGEST]
        return VocabularyReport(
            size=len(pieces),
            special=special,
            unused=unused,
            alphabet=sum(len(piece) == 1 for piece in ordinary),
            never_used=int(((self.used == 0) & ~aside).sum()),
            words=self.words,
            characters=self.characters,
            tokens=tokens,
            unk_words=self.unk_words,
            unk_word_share=self.unk_words / words,
            unk_token_share=unknown / max(1, tokens),
            fertility=tokens / words,
            characters_per_token=self.letters / max(1, tokens),
            whole_word_share=self.whole / words,
            character_coverage=self.covered / max(1, self.characters),
            longest_pieces=tuple(longest),
        )


def _bert_words(counts: WordCounts, lowercase: bool) -> Iterator[tuple[Counter[str], Counter[str], int]]:
    """Counts that were split at white space only -> words as BERT splits them."""
    words, long_words = split_counts(counts.words, WordSplitter("bert", lowercase))
    yield words, count_characters(words), long_words + counts.long_words


def file_words(file: Path, rule: str, lowercase: bool) -> Iterator[tuple[Counter[str], Counter[str], int]]:
    """Words, characters, number of long words of every 16 MiB of a file: exact figures of any text in flat memory."""
    splitter = WordSplitter(rule, lowercase)
    found = False
    for span in cut_spans([file]):
        raw: Counter[str] = Counter()
        for text in read_pieces(*span):
            raw.update(splitter.raw(text))
        words, long_words = split_counts(raw, splitter)
        found = found or bool(words) or long_words > 0
        yield words, count_characters(words), long_words
    if not found:
        raise DataError(f"--evaluate {file} holds no word; name a file with text")


def evaluate_wordpiece(vocabulary: Vocabulary, counts: WordCounts | None = None, *, rule: str = "bert", lowercase: bool = False,
                       file: Path | None = None) -> VocabularyReport:  # fmt: skip
    """The report of a WordPiece vocabulary on counted words (``rule`` says how they were split) or on ``file``.

    ``lowercase`` is needed for ``file`` only: counted words are normalised already. Raises what reading ``file`` raises.
    """
    tokenizer = load_tokenizer(vocabulary, lowercase=False, special_tokens=False)  # nothing more to lower-case
    ids = vocabulary.ids
    tally = _Tally(tokenizer, vocabulary.size, vocabulary.unk_id, lambda c: c in ids or CONTINUATION + c in ids)
    if file is not None:
        for part in file_words(file, "bert", lowercase):
            tally.add(*part)
    else:
        assert counts is not None
        parts = [(counts.words, counts.characters, counts.long_words)] if rule == "bert" else _bert_words(counts, lowercase)
        for part in parts:
            tally.add(*part)
    aside = vocabulary.is_special_or_unused
    unused = sum(piece.startswith("[unused") for piece, left_out in zip(vocabulary.pieces, aside, strict=True) if left_out)
    return tally.report(vocabulary.pieces, int(aside.sum()) - unused, unused, aside, CONTINUATION)


def evaluate_bytelevel(tokenizer: Tokenizer, special: Sequence[str], parts: Iterator[tuple[Counter[str], Counter[str], int]]
                       ) -> VocabularyReport:  # fmt: skip
    """The report of a byte-level tokenizer (one that takes byte-mapped words) on words as :func:`file_words` gives them."""
    ids = tokenizer.get_vocab()
    pieces = sorted(ids, key=lambda piece: ids[piece])
    tally = _Tally(tokenizer, len(pieces), -1, ids.__contains__)
    for part in parts:
        tally.add(*part)
    aside = np.array([piece in special for piece in pieces])
    return tally.report(pieces, len(special), 0, aside, "\u0120")
