"""The classic heuristics (TurkuNLP): which documents are running text of a language.

In: documents as lists of lines (one sentence each). Out: for every document the index of the first failing test, in the order
of :data:`TESTS`, or :data:`PASS`.

============  =======  ==============================================================================
test          default  a document is rejected when
============  =======  ==============================================================================
avg_len         4      it has fewer words per sentence
min_sents       3      it has fewer sentences
max_sents    1000      it has more sentences
min_toks       20      it has fewer tokens (white space parts them)
max_toks    10000      it has more tokens
no_word       0.2      a larger share of its sentences has no word
punct         0.075    a larger share of its characters is ASCII punctuation
upper         0.1      ... is upper case
digit         0.075    ... are digits
foreign       0.02     ... are letters that are not in the alphabet
min_words      30      it has fewer words
langdetect              the language detected is another one
============  =======  ==============================================================================

A word is what ``\\b[UPPER]?[lower]{2,}\\b`` finds, with the letters of the alphabet (one letter is enough in Korean): "Budapest"
and "az" are words, "EU", "x2" and "1990-es" are not. Characters are those of the sentences with the spaces between words.
Chinese, Japanese, Thai, Lao, Khmer and Burmese do not part words by spaces: there every letter is a word and a token.
The limits were made for European languages in Latin script; others want their own.

Counting is vectorised: a batch of documents is one array of code points, a table gives the class of each. The regular
expression itself, once a document, reaches a tenth of the speed (``tests`` hold the two together).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from berth.corpus.languages import LANGUAGES, SHORT_WORDS, UNDETECTED, WITHOUT_SPACES, letters_of
from berth.errors import ConfigError

TESTS = (
    "avg_len", "min_sents", "max_sents", "min_toks", "max_toks", "no_word", "punct", "upper", "digit", "foreign", "min_words",
    "langdetect",
)  # fmt: skip
PASS = len(TESTS)
DETECTORS = ("langdetect", "py3langid")

_LOWER, _UPPER_LETTER, _WORDCHAR, _SPACE, _PUNCT, _UPPER, _DIGIT, _FOREIGN = (1 << bit for bit in range(8))
_TABLE_SIZE = 0x32400  # no letter has a higher code point; what has one is class 0


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of the heuristics, named as the options; ratios are shares of one."""

    avg_len: float = 4
    min_sents: int = 3
    max_sents: int = 1000
    min_toks: int = 20
    max_toks: int = 10000
    no_word_ratio: float = 0.2
    punct_ratio: float = 0.075
    upper_ratio: float = 0.1
    digit_ratio: float = 0.075
    foreign_ratio: float = 0.02
    min_words: int = 30

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 0 or (name.endswith("_ratio") and value > 1):
                rule = "a share between 0 and 1" if name.endswith("_ratio") else "0 or more"
                raise ConfigError(f"--{name} {value} must be {rule}")
        if self.min_sents > self.max_sents or self.min_toks > self.max_toks:
            raise ConfigError("--min_sents must not be larger than --max_sents, nor --min_toks than --max_toks: no document could pass")


@functools.lru_cache(maxsize=2)
def _classes(alphabet: str) -> np.ndarray:
    """uint8 [_TABLE_SIZE]: the classes of every code point."""
    lower, upper = letters_of(alphabet)
    table = np.zeros(_TABLE_SIZE, np.uint8)
    for point in range(_TABLE_SIZE):
        if 0xD800 <= point <= 0xDFFF:
            continue
        char = chr(point)
        value = 0
        known = False
        if char in lower:
            value, known = _LOWER | _WORDCHAR, True
        if char in upper:
            value, known = value | _UPPER_LETTER | _WORDCHAR, True
        if char.isalnum() or char == "_":
            value |= _WORDCHAR
            if char.isalpha() and not known:
                value |= _FOREIGN
            if char.isupper():
                value |= _UPPER
            if char.isdigit():
                value |= _DIGIT
        elif char.isspace():
            value |= _SPACE
        elif char.isupper():  # circled letters and the like
            value |= _UPPER
        if char in string.punctuation:
            value |= _PUNCT
        table[point] = value
    return table


@dataclasses.dataclass(frozen=True)
class Counted:
    """int64 [documents] each: what the tests look at."""

    sentences: np.ndarray
    words: np.ndarray
    tokens: np.ndarray
    wordless: np.ndarray  # sentences without a word
    characters: np.ndarray
    punctuation: np.ndarray
    upper: np.ndarray
    digits: np.ndarray
    foreign: np.ndarray


_COLUMNS = tuple(field.name for field in dataclasses.fields(Counted))
_PIECE = 1 << 21  # characters counted together


def _pieces(lines: Sequence[str]) -> Iterator[list[str]]:
    """The lines of a long document in runs of at most about :data:`_PIECE` characters; a longer line alone."""
    run: list[str] = []
    size = 0
    for line in lines:
        if run and size + len(line) > _PIECE:
            yield run
            run, size = [], 0
        run.append(line)
        size += len(line)
    yield run


def _long_line(line: str, alphabet: str, language: str) -> np.ndarray:
    """The row of a line longer than :data:`_PIECE`, cut at spaces."""
    row = np.zeros(len(_COLUMNS), np.int64)
    begin = 0
    while begin < len(line):
        end = begin + _PIECE
        space = line.rfind(" ", begin + 1, end) if end < len(line) else -1
        end = space if space > 0 else end
        row += _count([[line[begin:end].strip(" ") or " "]], alphabet, language)[0]
        begin = end
    row[_COLUMNS.index("sentences")] = 1
    row[_COLUMNS.index("wordless")] = int(row[_COLUMNS.index("words")] == 0)
    row[_COLUMNS.index("characters")] = len(line)
    return row


def count(documents: Sequence[Sequence[str]], alphabet: str, language: str) -> Counted:
    """Count words, tokens and classes of characters of documents (at least one line each, no line empty)."""
    assert documents and all(documents)
    rows = np.zeros((len(documents), len(_COLUMNS)), np.int64)
    group: list[Sequence[str]] = []
    owners: list[int] = []
    size = 0

    def finish() -> None:
        if group:
            np.add.at(rows, owners, _count(group, alphabet, language))
        group.clear()
        owners.clear()

    for number, lines in enumerate(documents):
        for piece in _pieces(lines):
            length = sum(map(len, piece))
            if length > _PIECE and len(piece) == 1:
                rows[number] += _long_line(piece[0], alphabet, language)
                continue
            if size + length > _PIECE:
                finish()
                size = 0
            group.append(piece)
            owners.append(number)
            size += length
    finish()
    return Counted(*rows.T)


def _count(documents: Sequence[Sequence[str]], alphabet: str, language: str) -> np.ndarray:
    """int64 [documents, columns of :class:`Counted`], all counted as one array of code points."""
    sentences = np.array([len(lines) for lines in documents], np.int64)
    first_line = np.concatenate(([0], np.cumsum(sentences)))
    lengths = np.array([len(line) for lines in documents for line in lines], np.int64)
    line_begin = np.concatenate(([0], np.cumsum(lengths + 1)))[:-1]  # every line and the line end behind it
    text = "\n".join(line for lines in documents for line in lines) + "\n"
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    table = _classes(alphabet)
    classes = table[np.minimum(points, _TABLE_SIZE - 1)]
    begin = line_begin[first_line[:-1]]

    def total(mask: int) -> np.ndarray:
        return np.add.reduceat((classes & mask) != 0, begin, dtype=np.int64)

    def per_document(places: np.ndarray) -> np.ndarray:
        """How many of ``places`` (ascending) lie in each document."""
        return np.diff(np.searchsorted(places, np.append(begin, len(points))))

    word_places = _letters(classes) if language in WITHOUT_SPACES else _words(classes, 1 if language in SHORT_WORDS else 2)
    space = (classes & _SPACE) != 0
    starts = np.flatnonzero(~space & np.concatenate(([True], space[:-1])))
    tokens = per_document(starts)
    if language in WITHOUT_SPACES:  # tokens begin with a letter, or where white space says so
        tokens = per_document(np.union1d(starts, word_places))
    with_words = np.diff(np.searchsorted(word_places, np.append(line_begin, len(points)))) > 0
    wordless = np.add.reduceat((~with_words).astype(np.int64), first_line[:-1])
    columns = (
        sentences,
        per_document(word_places),
        tokens,
        wordless,
        np.add.reduceat(lengths, first_line[:-1]),
        total(_PUNCT),
        total(_UPPER),
        total(_DIGIT),
        total(_FOREIGN),
    )
    return np.stack(columns, axis=1)


def _letters(classes: np.ndarray) -> np.ndarray:
    return np.flatnonzero(classes & _LOWER)


def _words(classes: np.ndarray, shortest: int) -> np.ndarray:
    """Where the words begin: whole runs of word characters that are lower-case letters behind at most one upper-case one."""
    inside = (classes & _WORDCHAR) != 0
    edges = np.flatnonzero(np.diff(np.concatenate(([False], inside, [False])).astype(np.int8)))
    begins, ends = edges[::2], edges[1::2]
    if not len(begins):
        return begins
    lower = np.concatenate(([0], np.cumsum((classes & _LOWER) != 0, dtype=np.int64)))
    found = lower[ends] - lower[begins]
    first = classes[begins]
    capital = ((first & _UPPER_LETTER) != 0) & ((first & _LOWER) == 0)
    return begins[(found >= shortest) & (found == ends - begins - capital)]


def judge(counted: Counted, limits: Limits) -> np.ndarray:
    """uint8 [documents]: index in :data:`TESTS` of the first test that fails, or :data:`PASS` (language not looked at)."""
    characters = np.maximum(counted.characters, 1)
    failed = [
        counted.words < limits.avg_len * counted.sentences,
        counted.sentences < limits.min_sents,
        counted.sentences > limits.max_sents,
        counted.tokens < limits.min_toks,
        counted.tokens > limits.max_toks,
        counted.wordless > limits.no_word_ratio * counted.sentences,
        counted.punctuation > limits.punct_ratio * characters,
        counted.upper > limits.upper_ratio * characters,
        counted.digits > limits.digit_ratio * characters,
        counted.foreign > limits.foreign_ratio * characters,
        counted.words < limits.min_words,
    ]
    verdict = np.full(len(characters), PASS, np.uint8)
    for number in reversed(range(len(failed))):
        verdict[failed[number]] = number
    return verdict


# ------------------------------------------------------------------------------------------------------ language detection

_SAME = {"zh": ("zh-cn", "zh-tw", "zh"), "nb": ("no", "nb"), "nn": ("no", "nn"), "no": ("no", "nb", "nn")}


@functools.lru_cache(maxsize=2)
def _library(detector: str) -> Any:
    try:
        library = importlib.import_module(detector)
    except ImportError as error:
        raise ConfigError(
            f'--langdetect needs the library {detector} ({error}): pip install "berth[languages]", or go without by --langdetect none'
        ) from error
    if detector == "langdetect":
        library.DetectorFactory.seed = 0  # otherwise its answer changes from call to call
    return library


@functools.lru_cache(maxsize=2)
def detectable(detector: str) -> frozenset[str]:
    """Codes a detector can answer; :class:`ConfigError` when it is not installed."""
    library = _library(detector)
    if detector == "py3langid":
        return frozenset(str(label) for label, _ in library.rank("text"))
    library.detector_factory.init_factory()
    return frozenset(library.detector_factory._factory.langlist)


def detection_language(language: str, detector: str) -> tuple[str | None, str]:
    """What to ask the detector for: the language or None (with the reason) where detection makes no sense."""
    name = LANGUAGES[language].name
    if detector == "langdetect" and language in UNDETECTED:
        return None, f"langdetect is not used for {name}"
    if not {language, *_SAME.get(language, ())} & detectable(detector):
        return None, f"{detector} does not know {name}"
    return language, ""


def make_detector(detector: str, language: str) -> Callable[[Sequence[str]], bool]:
    """A function that says whether the lines of a document are in ``language`` (False when there is nothing to go by)."""
    accepted = frozenset({language, *_SAME.get(language, ())})
    library = _library(detector)
    if detector == "py3langid":
        return lambda lines: str(library.classify("\n".join(lines))[0]) in accepted
    failure = library.LangDetectException

    def detect(lines: Sequence[str]) -> bool:
        try:
            return library.detect("\n".join(lines)) in accepted
        except failure:
            return False

    return detect
