"""Masks drawn when rows are read: another mask in every epoch, and the same one whoever reads it.

In: rows as they come from a stream, with or without masks, and the numbers of these samples in the stream. Out: the rows with the original
ids restored and new masks drawn by the rules of :mod:`berth.records.masking` (80/10/10, never a special token, replacements from
ordinary pieces).

The draws are a hash of (seed, number of the sample), nothing is consumed in sequence. The number counts on through the epochs, so a
row is masked differently in every epoch, while a resumed run, another number of processes or another micro batch give the same masks.

Rejected: LDDL's Bernoulli draw for every token (a row can get no mask, and P has no bound), and a generator of torch (its state
depends on the process and on how far it got).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from berth.records import draws
from berth.records.masking import RowMaker
from berth.records.options import MAX_SEQ_LENGTH, RecordOptions
from berth.records.rows import Rows, flat_places, masked_places
from berth.text.vocabulary import Vocabulary

ROWS_AT_ONCE = 256  # arrays of 256 rows of 128 stay in the cache and under the size the C library asks the system for anew each time


@dataclasses.dataclass(frozen=True)
class Masking:
    """How masks are drawn: share of a row's positions, most positions a row, whole words or pieces."""

    masked_lm_prob: float
    max_predictions_per_seq: int
    whole_word_mask: bool = False


class DynamicMasker:
    """Draws masks for the rows of one stream; a :data:`berth.records.reader.Transform`.

    Args:
        vocabulary: of the records.
        masking: the rules.
        seed: names the draws.
    """

    def __init__(self, vocabulary: Vocabulary, masking: Masking, seed: int) -> None:
        self.vocabulary, self.masking = vocabulary, masking
        self.key = draws.shard_key(seed, "dynamic masking")
        # ids of real positions that are never masked; [UNK] is text
        self._fixed = np.zeros(1 << 16 if vocabulary.size <= 1 << 16 else vocabulary.size, bool)
        self._fixed[[vocabulary.pad_id, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id]] = True
        # one for rows of any width: how draws are compared must not depend on the widest row they are read with
        options = RecordOptions(
            max_seq_length=MAX_SEQ_LENGTH,
            max_predictions_per_seq=masking.max_predictions_per_seq,
            masked_lm_prob=masking.masked_lm_prob,
            whole_word_mask=masking.whole_word_mask,
        )
        self._maker = RowMaker(vocabulary, options)

    def __call__(self, rows: Rows, numbers: NDArray[np.int64]) -> Rows:
        """``rows`` (N of them, types int32) with the masks of samples ``numbers`` (int64 [N])."""
        ids = restored(rows)
        width = ids.shape[1]
        predictions = min(self.masking.max_predictions_per_seq, width)
        positions = np.zeros((len(ids), predictions), np.int32)
        labels = np.zeros((len(ids), predictions), np.int32)
        keys = draws.fold(self.key, numbers)
        for start in range(0, len(ids), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            candidate = (rows.input_mask[part] != 0) & ~self._fixed[ids[part]]
            found, original = self._maker.mask(ids[part], candidate, keys[part])
            positions[part], labels[part] = found[:, :predictions], original[:, :predictions]
        return dataclasses.replace(rows, input_ids=ids, masked_lm_positions=positions, masked_lm_ids=labels)


def restored(rows: Rows) -> NDArray[np.int32]:
    """The ids before masking, int32 [N, L], a copy."""
    ids = rows.input_ids.astype(np.int32)
    valid = masked_places(rows)
    ids.reshape(-1)[flat_places(rows, valid, ids.shape[1])] = rows.masked_lm_ids[valid]
    return ids
