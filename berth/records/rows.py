"""Samples in memory: six arrays, one row a sample, as in the records files.

The types in memory are the narrowest that hold the values (ids and positions are uint16 for vocabularies up to 65,536 pieces), because a
reader keeps tens of thousands of rows and copying them is most of its work. :meth:`Rows.widened` gives the types of the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FIELDS = (
    "input_ids",
    "input_mask",
    "segment_ids",
    "masked_lm_positions",
    "masked_lm_ids",
    "next_sentence_labels",
)
WIDE_FIELDS = ("input_ids", "masked_lm_positions", "masked_lm_ids")
MAX_NARROW = 1 << 16  # ids below it are kept as uint16
NO_LABEL = -100  # next_sentence_labels of rows that are no sentence pairs; losses leave it out


@dataclasses.dataclass(frozen=True)
class Rows:
    """Samples: ids and positions ``[N, L]`` / ``[N, P]`` (any integer type, int32 from a stream), int8 masks, segments and labels."""

    input_ids: NDArray
    input_mask: NDArray
    segment_ids: NDArray
    masked_lm_positions: NDArray
    masked_lm_ids: NDArray
    next_sentence_labels: NDArray

    def __len__(self) -> int:
        return len(self.next_sentence_labels)

    @staticmethod
    def zeros(rows: int, length: int, predictions: int, wide: np.dtype | type = np.int32) -> Rows:
        """``rows`` rows of padding; ``wide`` is the type of ids and positions."""
        return Rows(
            np.zeros((rows, length), wide),
            np.zeros((rows, length), np.int8),
            np.zeros((rows, length), np.int8),
            np.zeros((rows, predictions), wide),
            np.zeros((rows, predictions), wide),
            np.zeros(rows, np.int8),
        )

    def take(self, selection: NDArray | slice) -> Rows:
        """The rows of ``selection`` (places or a slice, not a mask), in its order."""
        if isinstance(selection, slice):
            return Rows(*(getattr(self, field)[selection] for field in FIELDS))
        # mode "clip" skips the bounds check of every place and lets numpy copy row by row: 3 times faster
        return Rows(*(getattr(self, field).take(selection, axis=0, mode="clip") for field in FIELDS))

    def widened(self) -> Rows:
        """The same rows with the types of the files: int32 ids and positions."""
        return Rows(*(getattr(self, f).astype(np.int32, copy=False) if f in WIDE_FIELDS else getattr(self, f) for f in FIELDS))

    def lengths(self) -> NDArray[np.int64]:
        """Real tokens of each row, int64 [N]."""
        narrow = self.input_mask.shape[1] < 1 << 15  # half the time of int32
        return self.input_mask.sum(axis=1, dtype=np.int16 if narrow else np.int32).astype(np.int64)

    def fitted(self, length: int, predictions: int) -> Rows:
        """The same rows, padded on the right to ``length`` tokens and ``predictions`` positions."""
        if (self.input_ids.shape[1], self.masked_lm_ids.shape[1]) == (length, predictions):
            return self
        return Rows(
            _pad(self.input_ids, length),
            _pad(self.input_mask, length),
            _pad(self.segment_ids, length),
            _pad(self.masked_lm_positions, predictions),
            _pad(self.masked_lm_ids, predictions),
            self.next_sentence_labels,
        )

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """Join parts end to end; narrower ones are padded to the widest."""
        if len(parts) == 1:
            return parts[0]
        length = max(part.input_ids.shape[1] for part in parts)
        predictions = max(part.masked_lm_ids.shape[1] for part in parts)
        fitted = [part.fitted(length, predictions) for part in parts]
        return Rows(*(np.concatenate([getattr(part, field) for part in fitted]) for field in FIELDS))


def narrow_type(vocab_size: int) -> np.dtype:
    """The type ids and positions are kept in."""
    return np.dtype(np.uint16 if vocab_size <= MAX_NARROW else np.int32)


def masked_places(rows: Rows) -> NDArray[np.bool_]:
    """bool [N, P]: which entries of ``masked_lm_positions`` count: those before the first 0 (position 0 is always ``[CLS]``)."""
    valid = rows.masked_lm_positions != 0
    if (valid[:, 1:] > valid[:, :-1]).any():
        valid = np.logical_and.accumulate(valid, axis=1)
    return valid


def flat_places(rows: Rows, valid: NDArray[np.bool_], width: int) -> NDArray[np.int64]:
    """int64 [M]: places of the masked positions ``valid`` in an array [N, width] laid flat, row by row."""
    offsets = np.arange(0, len(rows) * width, width, dtype=np.int64)[:, None]
    return (rows.masked_lm_positions + offsets)[valid]


def _pad(values: NDArray, width: int) -> NDArray:
    if values.shape[1] == width:
        return values
    padded = np.zeros((len(values), width), values.dtype)
    padded[:, : values.shape[1]] = values
    return padded
