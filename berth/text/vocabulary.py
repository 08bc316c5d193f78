"""vocab.txt: one piece a line, its id is the line number counted from 0.

In: a WordPiece vocabulary file (Google's, or one made by :mod:`berth.text.training`). Out: :class:`Vocabulary`, checked
on loading, since a wrong vocabulary shows itself only after days of training: duplicate pieces shift no id but hide one,
a missing ``[MASK]`` or a ``[PAD]`` that is not 0 breaks the record format (0 pads).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from berth.errors import DataError
from berth.text.lines import invalid_utf8

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION = "##"
_UNUSED = re.compile(r"\[unused\d+\]")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The pieces of a vocabulary in id order, and the SHA-256 of the file they came from."""

    pieces: tuple[str, ...]
    sha256: str

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read and check a vocab.txt.

        Raises :class:`DataError` for a missing file, bytes that are not UTF-8, an empty line or a duplicate piece (line
        numbers count from 1), a missing special token (all of them named) and a ``[PAD]`` that is not the first line.
        """
        file = Path(path)
        try:
            data = file.read_bytes()
        except (FileNotFoundError, IsADirectoryError) as error:
            raise DataError(f"{file}: no such vocabulary file; train one with data/vocab.py") from error
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise invalid_utf8(file, error.start, data[error.start]) from None
        lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
        if lines[-1] == "":
            lines.pop()
        _check(file, lines)
        return cls(tuple(lines), hashlib.sha256(data).hexdigest())

    @property
    def size(self) -> int:
        """Number of pieces, specials included."""
        return len(self.pieces)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Piece to id."""
        return {piece: number for number, piece in enumerate(self.pieces)}

    @property
    def pad_id(self) -> int:
        return self.ids["[PAD]"]

    @property
    def unk_id(self) -> int:
        return self.ids["[UNK]"]

    @property
    def cls_id(self) -> int:
        return self.ids["[CLS]"]

    @property
    def sep_id(self) -> int:
        return self.ids["[SEP]"]

    @property
    def mask_id(self) -> int:
        return self.ids["[MASK]"]

    @functools.cached_property
    def is_special_or_unused(self) -> NDArray[np.bool_]:
        """bool [size]: the five specials and ``[unusedN]``, which never stand in text."""
        return np.array([piece in SPECIAL_TOKENS or bool(_UNUSED.fullmatch(piece)) for piece in self.pieces])

    @functools.cached_property
    def is_continuation(self) -> NDArray[np.bool_]:
        """bool [size]: ``##`` pieces, which continue the word before them (a bare ``##`` is an ordinary piece)."""
        return np.array([piece.startswith(CONTINUATION) and piece != CONTINUATION for piece in self.pieces])


def _check(file: Path, lines: list[str]) -> None:
    seen: dict[str, int] = {}
    for number, piece in enumerate(lines, 1):
        if not piece:
            raise DataError(f"{file}: line {number} is empty; every line of a vocabulary is one piece")
        if piece in seen:
            raise DataError(f"{file}: piece {piece!r} stands on line {seen[piece]} and again on line {number}")
        seen[piece] = number
    missing = [token for token in SPECIAL_TOKENS if token not in seen]
    if missing:
        raise DataError(
            f"{file}: the special token(s) {', '.join(missing)} are missing; a BERT vocabulary needs "
            f"{', '.join(SPECIAL_TOKENS)} (with [PAD] on line 1)"
        )
    if seen["[PAD]"] != 1:
        raise DataError(f"{file}: [PAD] stands on line {seen['[PAD]']} but must be line 1: records are padded with id 0")
    if all(token in SPECIAL_TOKENS or _UNUSED.fullmatch(token) for token in lines):
        raise DataError(f"{file}: only special and unused tokens, no ordinary piece")
