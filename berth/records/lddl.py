"""LDDL's Parquet files as records: pairs of sentences as strings of word pieces.

In: files ``*.parquet`` (or ``*.parquet_<bin>`` for length bins) with the columns ``A`` and ``B`` (pieces separated by one space, without
``[CLS]`` and ``[SEP]``), ``is_random_next`` (bool, the next-sentence label), ``num_tokens`` (uint16, with the three special tokens), and,
when masks were drawn beforehand, ``masked_lm_positions`` (the bytes ``numpy.save`` writes for a uint16 array, positions in
``[CLS] A [SEP] B [SEP]``) and ``masked_lm_labels`` (the pieces that stood there, separated by one space). Out: :class:`Rows`.

A block of the stream is one row group, because Parquet is decoded by row group. Pieces become ids by one hash look-up over all tokens of a
row group; LDDL's own loader splits and looks up every sample in Python, in every epoch. Needs pyarrow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from berth.errors import ConfigError, DataError
from berth.files import sampled_digest
from berth.records.rows import FIELDS, Rows, narrow_type
from berth.text.vocabulary import Vocabulary

COLUMNS = ("A", "B", "is_random_next", "num_tokens")
MASK_COLUMNS = ("masked_lm_positions", "masked_lm_labels")
MASKED_LM_PROB = 0.15  # LDDL's default
SPECIAL = 3  # [CLS], [SEP], [SEP]
SHORTEST = 5
ROWS_AT_ONCE = 8192  # decoded together: enough to pay for building the look-up of the vocabulary, few enough to stay in the cache
_SUFFIX = re.compile(r"\.parquet(?:_(\d+))?$")
_NPY_MAGIC = b"\x93NUMPY"


def is_parquet(path: Path) -> bool:
    """Whether a name ends as LDDL's files do."""
    return bool(_SUFFIX.search(path.name))


def _pyarrow() -> tuple[Any, Any, Any]:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError('--input_dir holds Parquet files, which need pyarrow: pip install "berth[parquet]"') from error
    return pyarrow, pyarrow.compute, pyarrow.parquet


def inspect_parquet(paths: Sequence[Path], seq_length: int | None) -> tuple[Any, ...]:
    """Rows, row groups and lengths of LDDL's files as :class:`berth.records.layouts.RecordsFile`.

    Args:
        paths: all files of a data set.
        seq_length: the most tokens a row may have; the longest row decides if ``None``.

    Raises :class:`DataError` for an unreadable file, missing columns, masks in some files only, or rows longer than ``seq_length``.
    """
    from berth.records.layouts import RecordsFile

    seen = [_inspect(path) for path in paths]
    masked = {found.masked for found in seen}
    if len(masked) > 1:
        with_masks, without = (next(found.path for found in seen if found.masked is kind) for kind in (True, False))
        raise DataError(f"{with_masks} holds masks, {without} does not; Parquet files of one folder must be made in one way")
    longest = max(SHORTEST, max(found.longest for found in seen))
    for found in seen:
        if seq_length is not None and found.longest > seq_length:
            raise DataError(f"{found.path} holds a row of {found.longest} tokens but --max_seq_length is {seq_length}; pass {longest}")
    bins = {found.bin for found in seen}
    widths = {number: max(SHORTEST, *(found.longest for found in seen if found.bin == number)) for number in bins}
    return tuple(
        RecordsFile(
            found.path, found.rows, digest=found.digest, layout="parquet", length=widths[found.bin],
            predictions=max(1, round(widths[found.bin] * MASKED_LM_PROB)), max_seq_length=seq_length or longest,
            bin_high=0 if found.bin is None else widths[found.bin], masking="static" if found.masked else "none", blocks=found.groups,
        )
        for found in seen
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Found:
    path: Path
    rows: int
    groups: tuple[int, ...]
    longest: int
    masked: bool
    bin: int | None
    digest: str


def _inspect(path: Path) -> _Found:
    pa, compute, parquet = _pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            missing = [name for name in COLUMNS if name not in names]
            if missing:
                raise DataError(f"{path} lacks the columns {', '.join(missing)}; it is no file of LDDL's preprocess_bert_pretrain")
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
            longest = compute.max(file.read(columns=["num_tokens"], use_threads=False)["num_tokens"]).as_py() or 0
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error})") from error
    # row groups without rows are possible and no blocks
    starts = np.cumsum([0, *sizes])
    groups = tuple(int(start) for start, size in zip(starts, sizes, strict=False) if size)
    ending = _SUFFIX.search(path.name)
    number = int(ending.group(1)) if ending and ending.group(1) else None
    digest = hashlib.sha256(f"{sampled_digest(path)} {sorted(names)}".encode()).hexdigest()
    return _Found(path, int(starts[-1]), groups, int(longest), names >= set(MASK_COLUMNS), number, digest)


class LddlReader:
    """Turns row groups into rows with the ids of one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._pieces: Any = None

    def read_blocks(self, file: Any, blocks: Sequence[tuple[int, int, int]], rows: Rows) -> Rows:
        """Read row groups, given as (first row, rows, place), into ``rows`` from ``place`` on; returns ``rows``, wider if masks need it.

        Raises :class:`DataError` naming file and row for a piece that is not in the vocabulary, an empty segment, a row that is too long,
        or masks that do not fit their row.
        """
        pa, _, parquet = _pyarrow()
        try:
            with parquet.ParquetFile(file.path) as opened:
                starts = np.cumsum([0, *(opened.metadata.row_group(n).num_rows for n in range(opened.metadata.num_row_groups))])
                for start, count, place in blocks:
                    # the last row group that begins at this row is the one that has rows
                    group = int(np.searchsorted(starts, start, side="right")) - 1
                    columns = [*COLUMNS[:3], *(MASK_COLUMNS if file.masking == "static" else ())]
                    table = opened.read_row_group(group, columns=columns, use_threads=False).combine_chunks()
                    if len(table) != count:
                        raise DataError(f"{file.path} was changed while it is read; start again with the new records")
                    for first in range(0, count, ROWS_AT_ONCE):
                        part = self._decode(file, start + first, table.slice(first, ROWS_AT_ONCE))
                        predictions = max(part.masked_lm_ids.shape[1], rows.masked_lm_ids.shape[1])
                        rows = rows.fitted(rows.input_ids.shape[1], predictions)
                        part = part.fitted(rows.input_ids.shape[1], predictions)
                        for name in FIELDS:
                            getattr(rows, name)[place + first : place + first + len(part)] = getattr(part, name)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file.path} cannot be read as Parquet ({error})") from error
        return rows

    def _decode(self, file: Any, start: int, table: Any) -> Rows:
        ids, (a_lengths, b_lengths) = self._ids(file, start, table, ("A", "B"))
        lengths = a_lengths + b_lengths + SPECIAL
        if lengths.max() > file.length:
            row = int(np.argmax(lengths))
            raise DataError(f"{file.path}, row {start + row}: {lengths[row]} tokens, more than its num_tokens can be ({file.length})")
        rows = Rows.zeros(len(lengths), file.length, 1, narrow_type(self.vocabulary.size))
        place, every = np.arange(file.length, dtype=np.int16), np.arange(len(lengths))
        first_b, end = (a_lengths + 2).astype(np.int16)[:, None], lengths.astype(np.int16)[:, None]
        real = place < end
        rows.input_ids[real & (place > 0) & (place != first_b - 1) & (place != end - 1)] = ids
        rows.input_ids[:, 0] = self.vocabulary.cls_id
        rows.input_ids[every, a_lengths + 1] = self.vocabulary.sep_id
        rows.input_ids[every, lengths - 1] = self.vocabulary.sep_id
        rows.input_mask[...] = real
        rows.segment_ids[...] = real & (place >= first_b)
        labels = table["is_random_next"]
        if labels.null_count:
            row = int(np.flatnonzero(labels.is_null().to_numpy())[0])
            raise DataError(f"{file.path}, row {start + row}: is_random_next is missing")
        rows.next_sentence_labels[...] = labels.to_numpy()
        if file.masking == "static":
            positions, labels = self._masks(file, start, table, lengths)
            rows = dataclasses.replace(rows, masked_lm_positions=positions, masked_lm_ids=labels)
        return rows

    def _ids(self, file: Any, start: int, table: Any, names: Sequence[str]) -> tuple[NDArray[np.int32], list[NDArray[np.int64]]]:
        """Ids of all pieces of some columns end to end, row by row, and pieces of each row in each column.

        The columns are joined with a space after every piece, so that the pieces are an Arrow array over the same bytes: only the
        offsets are made, which is 3 times faster than splitting.
        """
        pa, compute, _ = _pyarrow()
        if self._pieces is None:
            self._pieces = pa.array([piece + " " for piece in self.vocabulary.pieces], pa.string())
        columns = [_whole(pa, table[name]).cast(pa.string()) for name in names]
        joined = compute.binary_join_element_wise(*columns, "", " ")
        if joined.null_count:
            row = int(np.flatnonzero(joined.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(f"{file.path}, row {start + row}: a value of {', '.join(names)} is missing")
        _, offsets, data = joined.buffers()
        starts = np.frombuffer(offsets, np.int32)[joined.offset : joined.offset + len(joined) + 1].astype(np.int64)
        ends = np.flatnonzero(np.frombuffer(data, np.uint8)[starts[0] : starts[-1]] == ord(" ")) + (starts[0] + 1)
        pieces = pa.StringArray.from_buffers(len(ends), pa.py_buffer(np.insert(ends, 0, starts[0]).astype(np.int32)), data)
        found = compute.index_in(pieces, value_set=self._pieces)
        # a column of a row ends one byte, the space, after its own bytes; as many pieces end up to there
        sizes = np.stack([compute.binary_length(column).to_numpy().astype(np.int64) + 1 for column in columns], axis=1)
        before = np.searchsorted(ends, np.insert((starts[:-1, None] + np.cumsum(sizes, axis=1)).ravel(), 0, starts[0]), side="right")
        counts = np.diff(before).reshape(sizes.shape)
        if found.null_count:
            bad = int(np.flatnonzero(found.is_null().to_numpy(zero_copy_only=False))[0])
            row, column = divmod(int(np.searchsorted(before[1:], bad, side="right")), len(names))
            raise DataError(
                f"{file.path}, row {start + row}: column {names[column]} holds {pieces[bad].as_py()[:-1]!r}, which is not in the vocabulary; "
                "give the --vocab_file the file was made with"
            )
        return found.to_numpy(), list(counts.T)

    def _masks(self, file: Any, start: int, table: Any, lengths: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
        labels, (counts,) = self._ids(file, start, table, ("masked_lm_labels",))
        blobs = table["masked_lm_positions"].to_pylist()
        arrays = [_saved_array(file.path, start + row, blob) for row, blob in enumerate(blobs)]
        for row, (array, count) in enumerate(zip(arrays, counts, strict=True)):
            ascending = len(array) == count and array[0] > 0 and (np.diff(array.astype(np.int64)) > 0).all()
            if not (ascending and array[-1] < lengths[row] - 1):
                raise DataError(
                    f"{file.path}, row {start + row}: masked_lm_positions is not {count} ascending positions inside a row of {lengths[row]}"
                )
        chosen = np.arange(int(counts.max())) < counts[:, None]
        positions, ids = np.zeros(chosen.shape, np.int32), np.zeros(chosen.shape, np.int32)
        positions[chosen], ids[chosen] = np.concatenate(arrays), labels
        return positions, ids


def _whole(pa: Any, column: Any) -> Any:
    """A column as one array."""
    return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column


def _saved_array(path: Path, row: int, blob: bytes) -> NDArray[np.uint16]:
    """What ``numpy.save`` wrote, without ``numpy.load`` (which is slow for small arrays and can unpickle)."""
    start = 10 + int.from_bytes(blob[8:10], "little")
    if blob[:6] != _NPY_MAGIC or blob[6] != 1 or b"'<u2'" not in blob[10:start] or (len(blob) - start) % 2:
        raise DataError(f"{path}, row {row}: masked_lm_positions is no saved uint16 array")
    return np.frombuffer(blob, "<u2", offset=start)
