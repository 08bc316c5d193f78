"""Check a records file completely: what every reader relies on. Used by tests and by whoever receives a file.

Also accepts files of the public scripts (other integer types, no attributes).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from berth.errors import DataError
from berth.records.schema import DATASETS, ROWS_PER_CHUNK
from berth.text.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class RecordsSummary:
    """What :func:`validate_records` saw: shape and tallies."""

    rows: int
    max_seq_length: int
    max_predictions_per_seq: int
    used_tokens: int
    masked: int
    random_next: int


def validate_records(path: str | Path, vocabulary: Vocabulary | None = None, strict: bool = True) -> RecordsSummary:
    """Read ``path`` block by block and check every row.

    Args:
        path: an hdf5 records file.
        vocabulary: when given, ids are checked against it: range, ``[CLS]``/``[SEP]`` in place, no special token masked.
        strict: types, compression and chunks must be exactly those berth writes; False allows any integer type.

    Raises:
        DataError: naming the file, the dataset and the first wrong row.
    """
    file_path = Path(path)
    try:
        file = h5py.File(file_path, "r")
    except OSError as error:
        raise DataError(f"{file_path}: not a readable hdf5 file: {error}") from error
    with file:
        rows, length, most = _check_layout(file, file_path, strict)
        size = vocabulary.size if vocabulary else int(file.attrs.get("vocab_size", np.iinfo(np.int32).max))
        used = masked = random_next = 0
        for start in range(0, rows, ROWS_PER_CHUNK):
            block = {name: file[name][start : start + ROWS_PER_CHUNK].astype(np.int64) for name in DATASETS}
            for problem, bad in _row_problems(block, size, vocabulary):
                if bad.any():
                    raise DataError(f"{file_path}: row {start + int(np.flatnonzero(bad)[0])}: {problem}")
            used += int(block["input_mask"].sum())
            masked += int(np.count_nonzero(block["masked_lm_positions"]))
            random_next += int(block["next_sentence_labels"].sum())
    return RecordsSummary(rows, length, most, used, masked, random_next)


def _check_layout(file: h5py.File, path: Path, strict: bool) -> tuple[int, int, int]:
    """Names, types and shapes; returns N, L, P."""
    missing = sorted(set(DATASETS) - set(file))
    if missing:
        raise DataError(f"{path}: dataset(s) {', '.join(missing)} are missing")
    if file["input_ids"].ndim != 2 or file["masked_lm_positions"].ndim != 2:
        raise DataError(f"{path}: input_ids and masked_lm_positions must have two dimensions")
    rows, length = file["input_ids"].shape
    most = file["masked_lm_positions"].shape[1]
    widths = {"L": (length,), "P": (most,), "": ()}
    for name, (dtype, width) in DATASETS.items():
        dataset = file[name]
        if dataset.shape != (rows, *widths[width]):
            raise DataError(f"{path}: {name} has shape {dataset.shape}, expected {(rows, *widths[width])}")
        if dataset.dtype.kind not in "iu" or (strict and dataset.dtype != dtype):
            raise DataError(f"{path}: {name} has type {dataset.dtype}, expected {dtype}")
        if strict and (dataset.compression != "gzip" or dataset.chunks[1:] != dataset.shape[1:]):
            raise DataError(f"{path}: {name} is not compressed by gzip in chunks of whole rows")
    if not rows:
        raise DataError(f"{path}: holds no row")
    return rows, length, most


def _row_problems(
    block: dict[str, NDArray[np.int64]], vocab_size: int, vocabulary: Vocabulary | None
) -> list[tuple[str, NDArray[np.bool_]]]:
    """Rule and bool [rows] for every rule: True where the row breaks it."""
    ids, mask, segments = block["input_ids"], block["input_mask"], block["segment_ids"]
    positions, labels = block["masked_lm_positions"], block["masked_lm_ids"]
    length = ids.shape[1]
    place = np.arange(length)
    used = mask.sum(axis=1)
    real = place < used[:, None]
    chosen = positions > 0
    count = chosen.sum(axis=1)
    seen = np.where((positions >= 0) & (positions < length), positions, 0)
    problems = [
        ("input_mask is not ones followed by zeros", (mask != real).any(axis=1)),
        ("fewer than 5 real tokens", used < 5),
        (f"an input id is not in 0..{vocab_size - 1}", ((ids < 0) | (ids >= vocab_size)).any(axis=1)),
        ("padding of input_ids is not 0", (ids * ~real).any(axis=1)),
        ("segment_ids is not zeros, ones, then zeros as padding", _bad_segments(segments, real)),
        ("a masked position is out of range", ((positions < 0) | (positions >= length)).any(axis=1)),
        ("masked positions are not followed by zeros only", (chosen != (np.arange(chosen.shape[1]) < count[:, None])).any(1)),
        ("masked positions are not ascending", ((np.diff(positions, axis=1) <= 0) & chosen[:, 1:]).any(axis=1)),
        ("a masked position is padding", (chosen & (positions >= used[:, None] - 1)).any(axis=1)),
        (f"a masked id is not in 0..{vocab_size - 1}", ((labels < 0) | (labels >= vocab_size)).any(axis=1)),
        ("padding of masked_lm_ids is not 0", (labels * ~chosen).any(axis=1)),
        ("next_sentence_labels is not 0 or 1", ~np.isin(block["next_sentence_labels"], (0, 1))),
    ]
    if vocabulary is not None:
        a_sep = np.maximum(used - segments.sum(axis=1) - 1, 0)
        rows = np.arange(len(ids))
        special = (seen == a_sep[:, None]) & chosen
        problems += [
            ("position 0 is not [CLS]", ids[:, 0] != vocabulary.cls_id),
            ("segment A does not end with [SEP]", ids[rows, a_sep] != vocabulary.sep_id),
            ("segment B does not end with [SEP]", ids[rows, np.maximum(used - 1, 0)] != vocabulary.sep_id),
            ("a [SEP] is masked", special.any(axis=1)),
            ("a masked id is a special token", (_structural(vocabulary, labels) & chosen).any(axis=1)),
        ]
    return problems


def _structural(vocabulary: Vocabulary, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where ``ids`` are [PAD], [CLS], [SEP] or [MASK], which text never holds ([UNK] may be masked)."""
    return np.isin(ids, (vocabulary.pad_id, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id))


def _bad_segments(segments: NDArray[np.int64], real: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows whose segments are not 0 for A, 1 for B (both present), 0 for padding."""
    rises = (np.diff(segments, axis=1) > 0).sum(axis=1)
    last = real.sum(axis=1) - 1
    rows = np.arange(len(segments))
    outside = ((segments != 0) & (segments != 1)).any(axis=1) | (segments * ~real).any(axis=1)
    falls_inside = ((np.diff(segments, axis=1) < 0) & real[:, 1:]).any(axis=1)
    return outside | falls_inside | (rises != 1) | (segments[:, 0] != 0) | (segments[rows, last] != 1)
