"""Punkt (Kiss and Strunk 2006): learning where sentences end from plain text, and splitting by what was learned.

In: paragraphs with single spaces between words. Out: :class:`PunktParameters` (training), start offsets of sentences
(:class:`PunktSplitter`). Both agree exactly with NLTK's ``PunktTrainer`` and ``PunktSentenceTokenizer`` (3.10; held together by
tests on real text and by hypothesis). NLTK is the reference and the source of published models, not the engine, because

* it decides by building token objects around every candidate: 6.7 MB/s, and 0.7 MB/s in training. Here only the word before
  a full stop is looked up; what a word means is worked out once a distinct word;
* its results change with its version (the quotes it knows changed in 3.10); ours must be the same bytes on every machine;
* ``import nltk`` takes longer than splitting ten megabytes.

Parameters are JSON, never pickle. Training is a pure function of the sample.

Where the algorithm is described: T. Kiss, J. Strunk, Unsupervised Multilingual Sentence Boundary Detection, Computational
Linguistics 32(4), 2006; section numbers below are of that paper.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from berth.errors import DataError

FORMAT, FORMAT_VERSION = "berth punkt", 1

# Flags of the orthographic context of a word type: where it was seen, and with which case of its first letter.
BEGIN_UPPER, MIDDLE_UPPER, UNKNOWN_UPPER, BEGIN_LOWER, MIDDLE_LOWER, UNKNOWN_LOWER = (1 << bit for bit in range(1, 7))
ANY_UPPER = BEGIN_UPPER | MIDDLE_UPPER | UNKNOWN_UPPER
ANY_LOWER = BEGIN_LOWER | MIDDLE_LOWER | UNKNOWN_LOWER

ABBREVIATION_SCORE, RARE_COUNT, COLLOCATION_SCORE, STARTER_SCORE = 0.3, 5, 7.88, 30  # thresholds of section 4 and 5

_QUOTES = "\u2018\u2019\u201c\u201d\u00ab\u00bb"
_ENDS_WORD = r"""[)";}\]*:@'({\[!?""" + _QUOTES + "]"  # cannot stand inside a word
_MULTI = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"  # dashes and ellipses are tokens of their own
_TOKEN = re.compile(
    rf"""{_MULTI}|(?![("`{{\[:;&\#*@)}}\]\-,])\S+?(?=\s|$|{_ENDS_WORD}|{_MULTI}|,(?:$|\s|{_ENDS_WORD}|{_MULTI}))|\S""",
)
_CANDIDATE = re.compile(rf"[.?!](?={_ENDS_WORD}|\s+\S)")
_CLOSING = re.compile(rf"""["')\]}}{_QUOTES}]+?(?:\s+|(?=--)|$)""")  # belongs to the sentence it closes
_ELLIPSIS = re.compile(r"\.\.+$")
_NUMBER = re.compile(r"^-?[.,]?\d[\d,.-]*\.?$")
_INITIAL = re.compile(r"[^\W\d]\.$")
_LETTERS = re.compile(r"[^\W\d]+$")
_HAS_LETTER = re.compile(r"[^\W\d]")
_INTERNAL, _NEVER_FIRST = ",:;", ";:,.!?"
_NUMBER_TYPE = "##number##"


@dataclasses.dataclass(frozen=True)
class PunktParameters:
    """What Punkt knows of a language.

    ``abbreviations``: lower-cased, without their full stop. ``collocations``: pairs of types that a full stop does not
    part. ``starters``: types that often begin sentences. ``contexts``: type -> flags of where and how it was seen.
    """

    abbreviations: frozenset[str] = frozenset()
    collocations: frozenset[tuple[str, str]] = frozenset()
    starters: frozenset[str] = frozenset()
    contexts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values in one order whatever the order of the sets."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "abbreviations": sorted(self.abbreviations),
            "collocations": sorted(list(pair) for pair in self.collocations),
            "starters": sorted(self.starters),
            "contexts": {word: self.contexts[word] for word in sorted(self.contexts) if self.contexts[word]},
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> PunktParameters:
        """Read what :meth:`to_json` made; :class:`DataError` that names ``where`` when it is something else."""
        if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("format_version") != FORMAT_VERSION:
            raise DataError(f"{where}: not a sentence model of berth (format {FORMAT!r}, version {FORMAT_VERSION})")
        try:
            return cls(
                frozenset(map(str, value["abbreviations"])),
                frozenset((str(first), str(second)) for first, second in value["collocations"]),
                frozenset(map(str, value["starters"])),
                {str(word): int(flags) for word, flags in value["contexts"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: a damaged sentence model ({type(error).__name__}: {error}); train it again") from error


class _Token(NamedTuple):
    """A token and all that follows from its characters and the abbreviations alone (sections 3 and 4.1)."""

    text: str
    type: str  # lower-cased; numbers are one type
    period: bool  # ends in a full stop
    breaks: bool  # first decision: a sentence ends here
    abbreviation: bool
    ellipsis: bool
    number: bool
    initial: bool
    case: int  # 1 upper, -1 lower, 0 neither

    @property
    def bare(self) -> str:
        """The type without a final full stop."""
        return self.type[:-1] if len(self.type) > 1 and self.type[-1] == "." else self.type

    @property
    def settled(self) -> str:
        """The type, without its full stop if that ends a sentence."""
        return self.bare if self.breaks else self.type


def _analyse(text: str, abbreviations: frozenset[str] | set[str]) -> _Token:
    lower = text.lower()
    kind = _NUMBER.sub(_NUMBER_TYPE, lower)
    breaks = abbreviation = ellipsis = False
    if text in (".", "?", "!"):
        breaks = True
    elif _ELLIPSIS.match(text):
        ellipsis = True
    elif text[-1] == "." and not text.endswith(".."):
        word = text[:-1].lower()
        abbreviation = word in abbreviations or word.rpartition("-")[2] in abbreviations
        breaks = not abbreviation
    first = text[0]
    case = -1 if first.islower() else int(first.isupper())
    return _Token(
        text, kind, text[-1] == ".", breaks, abbreviation, ellipsis,
        kind.startswith(_NUMBER_TYPE), _INITIAL.match(text) is not None, case,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ training


def _abbreviation_score(with_period: int, without: int, periods: int, total: int, word: str) -> float:
    """Section 4.1.1: Dunning's log likelihood that word and full stop belong together, scaled by length, dots and penalty."""
    share = periods / total
    count = with_period + without
    null = with_period * math.log(share + 1e-8) + without * math.log(1.0 - share + 1e-8)
    other = with_period * math.log(0.99) + (count - with_period) * math.log(1.0 - 0.99)
    dots = word.count(".") + 1
    letters = len(word) - dots + 1
    return -2.0 * (null - other) * math.exp(-letters) * dots * math.pow(letters, -without)


def _log_or_zero(*terms: tuple[int, float]) -> float:
    """Sum of ``count * log(share)``; 0 when a logarithm does not exist."""
    try:
        return sum(count * math.log(share) for count, share in terms)
    except ValueError:
        return 0.0


def _pair_score(first: int, second: int, both: int, total: int) -> float:
    """Dunning's log likelihood ratio of two types standing together (algorithms 6 and 7 of the paper)."""
    share, inside = second / total, both / first
    outside = (second - both) / (total - first) if total != first else 1.0
    rest = total - first - second + both
    null = _log_or_zero((both, share), (first - both, 1.0 - share)) + _log_or_zero((second - both, share), (rest, 1.0 - share))
    other = 0.0
    if first != both and 0 < inside < 1:
        other += both * math.log(inside) + (first - both) * math.log(1.0 - inside)
    if second != both and 0 < outside < 1:
        other += (second - both) * math.log(outside) + rest * math.log(1.0 - outside)
    return -2.0 * (null - other)


def _abbreviations(counts: Counter[str], periods: int, total: int) -> set[str]:
    found = set()
    for kind, count in counts.items():
        if kind[-1] == "." and kind != _NUMBER_TYPE and _HAS_LETTER.search(kind):
            word = kind[:-1]
            if _abbreviation_score(count, counts[word], periods, total, word) >= ABBREVIATION_SCORE:
                found.add(word)
    return found


_FLAGS = {  # (where, case) -> flag; where: 0 middle, 1 beginning, 2 unknown
    (0, 1): MIDDLE_UPPER, (1, 1): BEGIN_UPPER, (2, 1): UNKNOWN_UPPER,
    (0, -1): MIDDLE_LOWER, (1, -1): BEGIN_LOWER, (2, -1): UNKNOWN_LOWER,
}  # fmt: skip


def _contexts(paragraphs: list[list[str]], tokens: Mapping[str, _Token]) -> dict[str, int]:
    """Section 4.2 (orthographic heuristic): where every type was seen and with which case."""
    after = {}  # where the token behind this one stands
    for text, token in tokens.items():
        if token.breaks:
            after[text] = 2 if token.number or token.initial else 1
        else:
            after[text] = 2 if token.ellipsis or token.abbreviation else 0
    seen: set[tuple[int, str]] = set()
    where = 0
    for number, words in enumerate(paragraphs):
        if number and where != 2:
            where = 1
        if where == 0:  # the very first token of all
            where = 2
        seen.add((where, words[0]))
        follows = [after[word] for word in words]
        seen.update(zip(follows, words[1:]))  # noqa: B905 - the last one has nobody behind it here
        where = follows[-1]
    contexts: dict[str, int] = {}
    for place, text in seen:
        token = tokens[text]
        flag = _FLAGS.get((place, token.case))
        if flag:
            contexts[token.settled] = contexts.get(token.settled, 0) | flag
    return contexts


def _rare_abbreviation(token: _Token, behind: _Token, counts: Counter[str], found: set[str], contexts: Mapping[str, int]) -> bool:
    if token.abbreviation or not token.breaks:
        return False
    kind = token.settled
    if kind in found or counts[kind] + counts[kind[:-1]] >= RARE_COUNT:
        return False
    if behind.text[0] in _INTERNAL:
        return True
    flags = contexts.get(behind.settled, 0)
    return behind.case < 0 and bool(flags & BEGIN_UPPER) and not flags & MIDDLE_UPPER


def train(paragraphs: Iterable[str]) -> PunktParameters:
    """Learn from ``paragraphs`` (no line ends inside). Empty text gives empty parameters."""
    words = [found for found in (_TOKEN.findall(paragraph) for paragraph in paragraphs) if found]
    occurrences = Counter(itertools.chain.from_iterable(words))
    plain = {text: _analyse(text, frozenset()) for text in occurrences}
    counts: Counter[str] = Counter()
    for text, count in occurrences.items():
        counts[plain[text].type] += count
    total = sum(counts.values())
    if not total:
        return PunktParameters()
    periods = sum(count for text, count in occurrences.items() if plain[text].period)
    abbreviations = _abbreviations(counts, periods, total)
    tokens = {text: _analyse(text, abbreviations) if token.period else token for text, token in plain.items()}
    contexts = _contexts(words, tokens)
    breaks = sum(count for text, count in occurrences.items() if tokens[text].breaks)

    pairs: Counter[tuple[str, str]] = Counter()  # in the order of the text: rare abbreviations depend on it
    ends = {text for text, token in tokens.items() if token.period}
    if ends:
        previous = ""
        for text in itertools.chain.from_iterable(words):
            if previous in ends:
                pairs[previous, text] += 1
            previous = text
    starters_seen: Counter[str] = Counter()
    collocations_seen: Counter[tuple[str, str]] = Counter()
    for (first, second), count in pairs.items():
        token, behind = tokens[first], tokens[second]
        if _rare_abbreviation(token, behind, counts, abbreviations, contexts):
            abbreviations.add(token.bare)
        if not token.breaks:
            continue
        if not (token.number or token.initial):
            if _LETTERS.match(behind.text):
                starters_seen[behind.type] += count
        elif _HAS_LETTER.search(token.type) and _HAS_LETTER.search(behind.type):
            collocations_seen[token.bare, behind.settled] += count
    starters = set()
    for kind, count in starters_seen.items():
        everywhere = counts[kind] + counts[kind + "."]
        if everywhere >= count and _pair_score(breaks, everywhere, count, total) >= STARTER_SCORE and total / breaks > everywhere / count:
            starters.add(kind)
    collocations = set()
    for (one, other), count in collocations_seen.items():
        ones, others = counts[one] + counts[one + "."], counts[other] + counts[other + "."]
        if other in starters or ones < 2 or others < 2 or not 1 < count <= min(ones, others):
            continue
        if _pair_score(ones, others, count, total) >= COLLOCATION_SCORE and total / ones > others / count:
            collocations.add((one, other))
    return PunktParameters(frozenset(abbreviations), frozenset(collocations), frozenset(starters), contexts)


# ----------------------------------------------------------------------------------------------------------- splitting

_CACHED_WORDS = 1 << 17


class PunktSplitter:
    """Splits paragraphs by :class:`PunktParameters`. Not thread-safe (it remembers words)."""

    def __init__(self, parameters: PunktParameters) -> None:
        self.parameters = parameters
        self._first_of_pairs = {first for first, _ in parameters.collocations}
        self._words: dict[str, _Token | bool] = {}
        self._pairs: dict[tuple[str, str], bool] = {}
        self._tokens: dict[str, _Token] = {}

    def _token(self, text: str) -> _Token:
        token = self._tokens.get(text)
        if token is None:
            if len(self._tokens) > _CACHED_WORDS:
                self._tokens.clear()
            token = self._tokens[text] = _analyse(text, self.parameters.abbreviations)
        return token

    def _begins_sentence(self, token: _Token) -> bool | None:
        """Section 4.2: whether the case of ``token`` says that it begins a sentence; ``None``: it does not say."""
        if token.text in _NEVER_FIRST:
            return False
        flags = self.parameters.contexts.get(token.settled, 0)
        if token.case > 0 and flags & ANY_LOWER and not flags & MIDDLE_UPPER:
            return True
        if token.case < 0 and (flags & ANY_UPPER or not flags & BEGIN_LOWER):
            return False
        return None

    def _breaks(self, token: _Token, behind: _Token) -> bool:
        """Sections 4.2 to 4.4: whether a sentence ends between ``token`` and ``behind``."""
        if not token.period:
            return token.breaks
        parameters, breaks, kind, behind_type = self.parameters, token.breaks, token.bare, behind.settled
        if (kind, behind_type) in parameters.collocations:
            return False
        if (token.abbreviation or token.ellipsis) and not token.initial:
            if self._begins_sentence(behind):
                return True
            if behind.case > 0 and behind_type in parameters.starters:
                return True
        if token.initial or kind == _NUMBER_TYPE:
            begins = self._begins_sentence(behind)
            if begins is False:
                return False
            if begins is None and token.initial and behind.case > 0 and not parameters.contexts.get(behind_type, 0) & ANY_LOWER:
                return False
        return breaks

    def _any_break(self, tokens: list[_Token]) -> bool:
        return any(self._breaks(token, behind) for token, behind in itertools.pairwise(tokens))

    def _judge(self, word: str) -> _Token | bool:
        """What ``word`` (with its full stop) decides alone: True for a break whatever follows, else the token to look at."""
        tokens = [self._token(text) for text in _TOKEN.findall(word)]
        last = tokens[-1]
        certain = last.breaks and not last.initial and last.bare != _NUMBER_TYPE and last.bare not in self._first_of_pairs
        judged: _Token | bool = True if certain or self._any_break(tokens) else last
        if len(self._words) > _CACHED_WORDS:
            self._words.clear()
        self._words[word] = judged
        return judged

    def _ends_sentence(self, text: str, start: int, at: int) -> bool:
        """Whether the mark at ``at``, which ends the word that began at ``start``, ends a sentence."""
        if text[at] != ".":
            return True
        word = text[start : at + 1]
        judged = self._words.get(word)
        if judged is None:
            judged = self._judge(word)
        if isinstance(judged, bool):
            return judged
        if text[at + 1] == " ":
            end = text.find(" ", at + 2)
            behind = text[at + 2 : end if end >= 0 else len(text)]
        else:
            behind = text[at + 1]
        known = self._pairs.get((word, behind))
        if known is None:
            following = [self._token(token) for token in _TOKEN.findall(behind)]
            known = self._breaks(judged, following[0]) or self._any_break(following)
            if len(self._pairs) > _CACHED_WORDS:
                self._pairs.clear()
            self._pairs[word, behind] = known
        return known

    def _slices(self, text: str) -> Iterator[tuple[int, int]]:
        """Begin and end of sentences before closing quotes are put to the sentence they close."""
        begin = word = mark = 0
        pending = False
        for match in _CANDIDATE.finditer(text):
            at = match.start()
            space = text.rfind(" ", mark, at)
            start = space + 1 if space > mark else word
            if pending and mark <= start and self._ends_sentence(text, word, mark):
                yield begin, mark + 1
                begin = mark + 2 if text[mark + 1] == " " else mark + 1
            pending, word, mark = True, start, at
        if pending and self._ends_sentence(text, word, mark):
            yield begin, mark + 1
            begin = mark + 2 if text[mark + 1] == " " else mark + 1
        yield begin, len(text)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Begin and end of every sentence of ``text``, which has single spaces, and none at its ends."""
        found: list[tuple[int, int]] = []
        moved, previous = 0, None
        for begin, end in self._slices(text):
            if previous is not None:
                first, last = previous[0] + moved, previous[1]
                closing = _CLOSING.match(text, begin, end)
                if closing:
                    found.append((first, begin + len(closing.group().rstrip())))
                    moved = closing.end() - begin
                else:
                    moved = 0
                    if first < last:
                        found.append((first, last))
            previous = (begin, end)
        if previous is not None and previous[0] + moved < previous[1]:
            found.append((previous[0] + moved, previous[1]))
        return found

    def __call__(self, paragraph: str) -> list[str]:
        """The sentences of ``paragraph`` (single spaces, none at its ends), none empty; together they are the paragraph."""
        starts = [start for start, _ in self.spans(paragraph)]
        if len(starts) < 2:
            return [paragraph] if paragraph else []
        edges = [0, *starts[1:], len(paragraph)]
        return [piece for piece in (paragraph[begin:end].strip() for begin, end in itertools.pairwise(edges)) if piece]
