"""Cleaning text without losing letters: composition, characters that nobody can see, an optional character set.

In and out: a line of text. What happens, in this order:

1. Control, format, private-use and unassigned characters and U+FFFD are removed (soft hyphens, byte order marks, zero-width
   spaces, what is left of a broken conversion). Kept: the joiners U+200C and U+200D where the script writes with them.
   (BERT's tokenizer drops them later: the words of a Persian vocabulary have none.)
2. Unicode NFC: "a" + combining acute becomes "á", so that one word is one spelling.
3. Every white space becomes one space; none stays at the ends of a line.
4. With a character set (``latin2``): what it cannot encode is removed, the letters of the language never: a set that
   lacks one of them is refused. This replaces the classic round trip through Latin-1, which turned "árvíztűrő" into "árvíztr".

Which characters are unassigned depends on Python's Unicode version; it is part of the stage's options.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import unicodedata
from collections.abc import Iterable

from berth.corpus.documents import single_spaces
from berth.corpus.languages import LANGUAGES, letters_of
from berth.errors import ConfigError

_REMOVED = frozenset({"Cc", "Cf", "Co", "Cn", "Cs"})
_JOINERS = frozenset("\u200c\u200d")
_NO_JOINERS = frozenset({"zh", "ja", "ko"})  # scripts that never write with them; elsewhere they are kept in other scripts' words
_ZERO_WIDTH_SPACE = "\u200b"
_SPACE_IS_ZERO_WIDTH = frozenset({"km", "lo", "my", "th"})  # there it parts words
_HIGHEST = 0x40000  # above: variation selectors and private use only


def character_class(characters: Iterable[int], negated: bool = False) -> str:
    """A regular expression for one of ``characters`` (code points), as ranges."""
    ranges: list[list[int]] = []
    for point in sorted(characters):
        if ranges and point == ranges[-1][1] + 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    inside = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
    return f"[{'^' if negated else ''}{inside}]"


@functools.lru_cache(maxsize=4)
def _invisible(keep_joiners: bool) -> re.Pattern[str]:
    """Runs of characters that cleaning removes; white space is not among them."""
    removed = [
        point
        for point in range(_HIGHEST)
        if (unicodedata.category(char := chr(point)) in _REMOVED and not char.isspace() and not (keep_joiners and char in _JOINERS))
    ]
    tags = [point for point in range(_HIGHEST, sys.maxunicode + 1) if not 0xE0100 <= point <= 0xE01EF]
    return re.compile(character_class([*removed, 0xFFFD, *tags]) + "+")


@functools.lru_cache(maxsize=8)
def encodable(charset: str) -> frozenset[str]:
    """The characters a codec of Python can encode; :class:`ConfigError` when there is no such codec of text."""
    found = set()
    try:
        for point in range(_HIGHEST):
            if 0xD800 <= point <= 0xDFFF:
                continue
            try:
                chr(point).encode(charset)
            except UnicodeEncodeError:
                continue
            found.add(chr(point))
    except (LookupError, UnicodeError, ValueError) as error:
        raise ConfigError(
            f"--charset {charset}: Python has no text encoding of this name ({error}); for example latin2, cp1250, koi8_r"
        ) from None
    return frozenset(found)


def _encodes(charset: str, text: str) -> bool:
    try:
        text.encode(charset)
    except UnicodeEncodeError:
        return False
    return True


def check_charset(charset: str, language: str, word_chars: str = "") -> None:
    """Raise :class:`ConfigError` when ``charset`` lacks letters of the language, which cleaning would then destroy."""
    alphabet = word_chars or LANGUAGES[language].alphabet
    if not alphabet:
        raise ConfigError(f"--charset {charset} needs --language or --word_chars, so that no letter of the language is removed")
    lower, upper = letters_of(alphabet)
    missing = sorted(letter for letter in lower | upper if letter not in encodable(charset) and letter not in "ẞİ" and letter.isalpha())
    if missing:
        others = [
            name for name in ("latin1", "latin2", "latin9", "cp1250", "cp1252", "cp1251", "cp1257", "cp1254", "cp1253") if name != charset
        ]
        better = [name for name in others if _encodes(name, "".join(missing))]
        raise ConfigError(
            f"--charset {charset} has no {' '.join(missing[:12])}{' ...' if len(missing) > 12 else ''}, letters of "
            f"{LANGUAGES[language].name if not word_chars else '--word_chars'}: they would be deleted; "
            + (f"take {better[0]}, or " if better else "")
            + "leave the option out"
        )


@dataclasses.dataclass(frozen=True)
class Cleaner:
    """Cleans lines for a language; ``charset`` is a checked codec name or None."""

    language: str
    charset: str | None = None

    def __call__(self, line: str) -> tuple[str, int]:
        """The clean line and how many characters were removed (white space and composition not counted)."""
        removed = 0
        if _ZERO_WIDTH_SPACE in line and self.language in _SPACE_IS_ZERO_WIDTH:
            line = line.replace(_ZERO_WIDTH_SPACE, " ")
        if not line.isprintable():  # control, format, private-use and unassigned characters are not, nor are odd spaces
            before = len(line)
            line = _invisible(self.language not in _NO_JOINERS).sub("", line)
            removed += before - len(line)
        if "\ufffd" in line:
            removed += line.count("\ufffd")
            line = line.replace("\ufffd", "")
        if not line.isascii():  # now that nothing stands between a letter and its accent
            line = unicodedata.normalize("NFC", line)
        if self.charset is not None and not (line.isascii() and self.charset_has_ascii):
            before = len(line)
            line = _outside(self.charset).sub("", line)
            removed += before - len(line)
        return single_spaces(line), removed

    @functools.cached_property
    def charset_has_ascii(self) -> bool:
        return self.charset is None or all(chr(point) in encodable(self.charset) for point in range(0x20, 0x7F))


@functools.lru_cache(maxsize=4)
def _outside(charset: str) -> re.Pattern[str]:
    """Runs of characters a set does not have; white space always stays (it becomes a space)."""
    inside = {ord(char) for char in encodable(charset)} | {point for point in range(_HIGHEST) if chr(point).isspace()}
    return re.compile(character_class(inside, negated=True) + "+")
