"""The records file: NVIDIA's hdf5 schema, so files exchange in both directions, plus attributes that say what made it.

``L`` is the sequence length, ``P`` the most masked positions a row, ``N`` the rows. Padding is 0 everywhere; a position of 0
ends the masked positions (position 0 is always ``[CLS]``, which is never masked). Label 0: B follows A; 1: B is random.
See docs/data-format.md.
"""

from __future__ import annotations

import dataclasses

import numpy as np

FORMAT = "berth records"  # attribute "format"
FORMAT_VERSION = 2  # 2: rows in the order of a hash of their keys
ROWS_PER_CHUNK = 1024
SUFFIX = ".hdf5"

# name -> (type on disk, second dimension: "L", "P" or none)
DATASETS: dict[str, tuple[np.dtype, str]] = {
    "input_ids": (np.dtype("<i4"), "L"),
    "input_mask": (np.dtype("i1"), "L"),
    "segment_ids": (np.dtype("i1"), "L"),
    "masked_lm_positions": (np.dtype("<i4"), "P"),
    "masked_lm_ids": (np.dtype("<i4"), "P"),
    "next_sentence_labels": (np.dtype("i1"), ""),
}

# the layout "packed" stores no padding: all rows end to end, [T] tokens of N rows with M masked positions
# name -> (type on disk, items: "T", "M", "N" or "N + 1"); input_ids is uint16 for vocabularies up to 65,536 pieces, else int32
PACKED_DATASETS: dict[str, tuple[np.dtype, str]] = {
    "input_ids": (np.dtype("<u2"), "T"),
    "row_offsets": (np.dtype("<i8"), "N + 1"),
    "first_lengths": (np.dtype("<i4"), "N"),
    "masked_lm_positions": (np.dtype("<i4"), "M"),
    "masked_lm_ids": (np.dtype("<i4"), "M"),
    "masked_offsets": (np.dtype("<i8"), "N + 1"),
    "next_sentence_labels": (np.dtype("i1"), "N"),
}
ITEMS_PER_CHUNK = 1 << 16  # of the packed layout


@dataclasses.dataclass(frozen=True)
class RecordCounts:
    """What a records file holds (attributes ``count_<name>``).

    Attributes:
        instances: rows.
        documents, sentences: of the text, without those that have no token.
        tokens: word pieces of the text, before duplication.
        unknown_tokens: of these, ``[UNK]``.
        empty_sentences, empty_documents: left out because no token remained.
        used_tokens: positions that are not padding, over all rows.
        masked: masked positions over all rows.
        random_next: rows with label 1.
        forced_random: of these, rows whose document had no second sentence left to follow the first.
    """

    instances: int
    documents: int
    sentences: int
    tokens: int
    unknown_tokens: int
    empty_sentences: int
    empty_documents: int
    used_tokens: int
    masked: int
    random_next: int
    forced_random: int

    def __add__(self, other: RecordCounts) -> RecordCounts:
        return RecordCounts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def records_folder_name(
    lowercase: bool,
    max_seq_length: int,
    max_predictions_per_seq: int,
    masked_lm_prob: float,
    random_seed: int,
    dupe_factor: int,
) -> str:
    """The folder name the public scripts use for records with these options."""
    return (
        f"hdf5_lower_case_{int(lowercase)}_seq_len_{max_seq_length}_max_pred_{max_predictions_per_seq}"
        f"_masked_lm_prob_{masked_lm_prob}_random_seed_{random_seed}_dupe_factor_{dupe_factor}"
    )
