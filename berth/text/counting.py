"""Count the words of text of any size: flat memory, several processes, the same result whoever counts.

In: UTF-8 text files. Out: :class:`WordCounts`, the distinct words with how often each occurs, ready for a trainer.

The files are cut every 16 MiB (:func:`cut_spans`, by their bytes alone), every piece is counted by itself and the counts are put
together in order. When more than ``max_words`` distinct words are held, the rarest are dropped until three quarters remain, so
memory does not grow with the text; this, too, depends on the text only. What was dropped is counted. Words of more than 100
characters are [UNK] in BERT, take no part and are counted apart.

A *rule* says what a word is: ``bert`` (BERT's cleaning and splitting: punctuation and CJK characters stand alone), ``whitespace``
(cleaned, but only split at white space), ``bytes`` (GPT-2's pre-tokens, their bytes written as GPT-2's 256 characters, a space
before the word included as "Ġ").

``sample_bytes`` reads only a part of the text: stretches of up to 256 KiB whose numbers have the smallest hashes of (seed, number).
Counting a sample of a terabyte therefore takes no longer than its own size (``data/vocab.py`` still hashes all of it for the
manifest). Rejected: reservoir sampling of lines (reads everything), counting
sketches (a trainer needs the words themselves).
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import pre_tokenizers

from berth.errors import ConfigError, DataError
from berth.text.lines import read_pieces
from berth.text.tokenizer import MAX_WORD_CHARACTERS, bert_normalizer, drop_controls
from berth.workers import map_processes

RULES = ("bert", "whitespace", "bytes")
MAX_WORDS = 500_000
PART_BYTES = 16 << 20  # part of the result's identity once words are dropped
_SAMPLE_BYTES = 256 << 10
_EDGE_BYTES = 64 << 10
_ASCII_PIECES = re.compile("[0-9A-Za-z]+|[^0-9A-Za-z]")
# GPT-2's treatment of white space: one space belongs to the word after it, the rest of a run is a word of its own.
_BYTE_CHUNKS = re.compile(r" ?\S+|[^\S\n]+(?!\S)|[^\S\n]+")


class Span(NamedTuple):
    """The bytes ``start`` to ``stop`` of one file; both lie between words."""

    file: Path
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class WordCounts:
    """Distinct words with their numbers of occurrences, and what was left out.

    ``characters`` counts running characters of all words but the long ones, the dropped ones included. Running words of the text
    = ``sum(words.values()) + dropped_words + long_words``.
    """

    words: Counter[str]
    characters: Counter[str]
    long_words: int
    dropped_words: int
    bytes_read: int

    @property
    def running_words(self) -> int:
        """All words of the text, dropped and long ones included."""
        return sum(self.words.values()) + self.dropped_words + self.long_words


# --------------------------------------------------------------------------------------------------------- words


class WordSplitter:
    """Raw words to the words of a rule. ``lowercase`` also strips accents, as in BERT; ``bytes`` never changes the text."""

    def __init__(self, rule: str, lowercase: bool) -> None:
        assert rule in RULES, rule
        self.rule, self.lowercase = rule, lowercase
        self._normalizer = bert_normalizer(lowercase)
        self._bert = pre_tokenizers.BertPreTokenizer()
        self._bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def raw(self, text: str) -> list[str]:
        """What is counted first: pieces of ``text`` that can be split further one by one."""
        return _BYTE_CHUNKS.findall(text) if self.rule == "bytes" else drop_controls(text).split()

    def words(self, raw: str) -> list[str]:
        """The words of one raw piece. The common cases take a short way that gives the same."""
        if self.rule == "bytes":
            body = raw[1:] if raw[0] == " " else raw
            if body.isascii() and body.isalpha():
                return ["\u0120" + body if body is not raw else body]
            return [piece for piece, _ in self._bytes.pre_tokenize_str(raw)]
        if raw.isascii() and raw.isprintable():
            text = raw.lower() if self.lowercase else raw
            return [text] if self.rule == "whitespace" or text.isalnum() else _ASCII_PIECES.findall(text)
        text = self._normalizer.normalize_str(raw)
        return text.split() if self.rule == "whitespace" else [piece for piece, _ in self._bert.pre_tokenize_str(text)]


def split_counts(counts: Mapping[str, int], splitter: WordSplitter) -> tuple[Counter[str], int]:
    """Counts of raw pieces -> counts of words of at most 100 characters, and how many longer ones there were."""
    words: Counter[str] = Counter()
    long_words = 0
    for raw, count in counts.items():
        for word in splitter.words(raw):
            if len(word) > MAX_WORD_CHARACTERS:
                long_words += count
            else:
                words[word] += count
    return words, long_words


def count_characters(words: Mapping[str, int]) -> Counter[str]:
    """Running characters of counted words."""
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    return characters


# --------------------------------------------------------------------------------------------------------- spans


def _edge(file: Path, at: int, size: int) -> int:
    """The first offset from ``at`` on where a line begins, else (within 64 KiB) a word, else a character."""
    if at <= 0 or at >= size:
        return max(0, min(at, size))
    with open(file, "rb") as handle:
        handle.seek(at - 1)
        window = handle.read(_EDGE_BYTES)
    for end in (b"\n", b" "):
        found = window.find(end)
        if found >= 0:
            return at + found
    return at + next((n for n, byte in enumerate(window[1:]) if byte & 0xC0 != 0x80), 0)


def _existing_size(file: Path) -> int:
    if not file.is_file():
        raise DataError(f"{file}: no such text file")
    return file.stat().st_size


def cut_spans(files: Sequence[Path], part_bytes: int = PART_BYTES) -> Iterator[Span]:
    """Every byte of ``files`` in order, in spans of about ``part_bytes`` that end at line ends (in a long line: between words)."""
    for file in files:
        size = _existing_size(file)
        edge = 0
        for wanted in itertools.count(part_bytes, part_bytes):
            start, edge = edge, max(edge, _edge(file, wanted, size))
            if start < edge:
                yield Span(file, start, edge)
            if wanted >= size:
                break


def sample_spans(files: Sequence[Path], sample_bytes: int, seed: int) -> Iterator[Span]:
    """About ``sample_bytes`` of ``files``, spread over them evenly by chance (of ``seed``), in the order of the files."""
    sizes = [_existing_size(file) for file in files]
    if sample_bytes >= sum(sizes):
        yield from cut_spans(files)
        return
    unit = min(_SAMPLE_BYTES, max(4096, sample_bytes // 64))
    units = [-(-size // unit) for size in sizes]

    def rank(number: int) -> bytes:
        return hashlib.blake2b(f"{seed} {number}".encode(), digest_size=16).digest()

    chosen = sorted(heapq.nsmallest(max(1, round(sample_bytes / unit)), range(sum(units)), key=rank))
    firsts = list(itertools.accumulate(units, initial=0))
    file = 0
    for number in chosen:
        while number >= firsts[file + 1]:
            file += 1
        at = (number - firsts[file]) * unit
        start, stop = (_edge(files[file], offset, sizes[file]) for offset in (at, min(at + unit, sizes[file])))
        if start < stop:
            yield Span(files[file], start, stop)


def _grouped(spans: Iterator[Span]) -> Iterator[tuple[int, tuple[Span, ...]]]:
    """Numbered groups of spans of 16 MiB together, so that thousands of small files make few tasks."""
    group: list[Span] = []
    number = filled = 0
    for span in spans:
        size = span.stop - span.start
        if group and filled + size > PART_BYTES + _EDGE_BYTES:
            yield number, tuple(group)
            group, filled, number = [], 0, number + 1
        group.append(span)
        filled += size
    if group:
        yield number, tuple(group)


# ------------------------------------------------------------------------------------------------------ counting


@dataclasses.dataclass(frozen=True)
class _SpanCounter:
    """Counts one group of spans; runs in the worker processes."""

    rule: str
    lowercase: bool

    def __call__(self, task: tuple[int, tuple[Span, ...]]) -> tuple[int, WordCounts]:
        number, spans = task
        splitter = WordSplitter(self.rule, self.lowercase)
        raw: Counter[str] = Counter()
        for span in spans:
            for text in read_pieces(span.file, span.start, span.stop):
                raw.update(splitter.raw(text))
        words, long_words = split_counts(raw, splitter)
        read = sum(span.stop - span.start for span in spans)
        return number, WordCounts(words, count_characters(words), long_words, 0, read)


def _in_order(results: Iterator[tuple[int, WordCounts]]) -> Iterator[WordCounts]:
    early: dict[int, WordCounts] = {}
    for wanted in itertools.count():
        while wanted not in early:
            try:
                number, counts = next(results)
            except StopIteration:
                assert not early, "a part is missing"
                return
            early[number] = counts
        yield early.pop(wanted)


def prune(words: Counter[str], keep: int) -> tuple[Counter[str], int]:
    """The most frequent words, whole frequencies at a time, at most ``keep`` (but never less than the highest frequency); the
    number of occurrences dropped."""
    frequencies = Counter(words.values())
    kept, lowest = 0, 0
    for frequency in sorted(frequencies, reverse=True):
        if kept and kept + frequencies[frequency] > keep:
            break
        kept, lowest = kept + frequencies[frequency], frequency
    left: Counter[str] = Counter()
    dropped = 0
    for word, count in words.items():
        if count >= lowest:
            left[word] = count
        else:
            dropped += count
    return left, dropped


def count_text(
    files: Sequence[Path],
    rule: str,
    lowercase: bool,
    *,
    max_words: int = MAX_WORDS,
    sample_bytes: int = 0,
    seed: int = 0,
    processes: int = 1,
) -> WordCounts:
    """Count the words of ``files``.

    Args:
        files: UTF-8 text of any size.
        rule: what a word is, one of :data:`RULES`.
        lowercase: lower-case and strip accents.
        max_words: distinct words held; more, and the rarest are dropped (and counted).
        sample_bytes: read about so many bytes only, chosen by ``seed``; 0 = everything.
        processes: how many count at the same time; does not change the result.

    Raises:
        ConfigError: a number is out of range.
        DataError: a missing file, bytes that are not UTF-8, or no word at all.
    """
    if max_words < 1000 or sample_bytes < 0:
        raise ConfigError(f"--max_words {max_words} must be at least 1000 and --sample_bytes {sample_bytes} not negative (0: everything)")
    spans = sample_spans(files, sample_bytes, seed) if sample_bytes else cut_spans(files)
    words, characters = Counter[str](), Counter[str]()
    long_words = dropped = read = 0
    for part in _in_order(map_processes(_SpanCounter(rule, lowercase), _grouped(spans), processes)):
        words.update(part.words)
        characters.update(part.characters)
        long_words, read = long_words + part.long_words, read + part.bytes_read
        if len(words) > max_words:
            words, lost = prune(words, max_words * 3 // 4)
            dropped += lost
    if not words:
        named = ", ".join(str(file) for file in files[:3]) + (", ..." if len(files) > 3 else "")
        raise DataError(f"{named}: no word to learn a vocabulary from")
    return WordCounts(words, characters, long_words, dropped, read)
