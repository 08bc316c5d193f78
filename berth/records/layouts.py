"""The kinds of records files a training can read, each turned into :class:`Rows`.

* padded: NVIDIA's schema, one width; from berth, from the NVIDIA script (no attributes) or any other program, any integer type.
* binned: the same, one file for each range of lengths, as wide as its longest row (attributes ``bin_low``, ``bin_high``).
* packed: no padding stored, rows end to end (:data:`berth.records.schema.PACKED_DATASETS`).
* LDDL: Parquet with tokens as strings (:mod:`berth.records.lddl`).

:func:`inspect_hdf5` looks at shapes and attributes only; :func:`read_blocks` reads runs of rows. Blocks of a file begin where its chunks
begin, so that no chunk is inflated twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from berth.errors import DataError
from berth.files import sampled_digest
from berth.records.direct import FileReader, OutOfRangeError, TableCache
from berth.records.rows import FIELDS, MAX_NARROW, NO_LABEL, Rows
from berth.records.schema import PACKED_DATASETS

BLOCK_ROWS = 1024
PACKED_BLOCK_ROWS = 4096  # a chunk of the packed layout holds the numbers of 3,000 to 65,000 rows


@dataclasses.dataclass(frozen=True)
class RecordsFile:
    """One records file: where it is, how many rows, and what its attributes say of its vocabulary ('' and 0 if nothing).

    ``digest`` names its content: of the attributes that decide it (input, options, seed), or of size and samples for files without any.
    ``length`` and ``predictions`` are the widths of its rows; ``max_seq_length`` that of the whole data set; ``bin_high`` the upper length
    of its bin, 0 without bins. ``blocks``: rows of a block, or the first rows of blocks that differ. ``masked_lm_prob`` is ``None`` where
    the file does not say.
    """

    path: Path
    rows: int
    vocab_sha256: str = ""
    vocab_size: int = 0
    digest: str = ""
    lowercase: bool | None = None
    layout: str = "padded"
    length: int = 0
    predictions: int = 0
    max_seq_length: int = 0
    bin_high: int = 0
    objective: str = "mlm+nsp"
    masking: str = "static"
    masked_lm_prob: float | None = None
    blocks: int | tuple[int, ...] = BLOCK_ROWS

    @property
    def name(self) -> str:
        """What the fingerprint of a data set says of this file: name, rows, content, and blocks where they are not the usual ones."""
        usual = f"{self.path.name} {self.rows} {self.digest}"
        if self.blocks == BLOCK_ROWS:
            return usual
        blocks = f"{len(self.blocks)} blocks" if isinstance(self.blocks, tuple) else str(self.blocks)
        return f"{usual} {blocks}"

    def cut(self, block_rows: int | None = None) -> NDArray[np.int64]:
        """First row and rows of each block, int64 [blocks, 2]; ``block_rows`` replaces the file's own."""
        blocks = block_rows or self.blocks
        starts = np.array(blocks, np.int64) if isinstance(blocks, tuple) else np.arange(0, self.rows, blocks, dtype=np.int64)
        return np.stack([starts, np.diff(np.append(starts, self.rows))], axis=1)


def inspect_hdf5(path: Path) -> RecordsFile:
    """Shapes and attributes of an hdf5 records file.

    Raises :class:`DataError` for a file that is unreadable, truncated, or no records file.
    """
    try:
        with h5py.File(path, "r") as handle:
            attributes = {name: str(value) for name, value in handle.attrs.items() if not name.startswith("count_")}
            layout = attributes.get("layout", "padded")
            shape = _packed_shape(path, handle, attributes) if layout == "packed" else _padded_shape(path, handle)
            return _described(path, attributes, layout, *shape)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read as hdf5 ({error}); a truncated file must be made again with create_pretraining_data.py"
        ) from error


def _described(path: Path, attributes: dict[str, str], layout: str, rows: int, length: int, predictions: int, blocks: int) -> RecordsFile:
    known = {"layout": ("padded", "binned", "packed"), "objective": ("mlm+nsp", "mlm"), "masking": ("static", "none")}
    for name, values in known.items():
        if attributes.get(name, values[0]) not in values:
            raise DataError(
                f"{path}: attribute {name} is {attributes[name]!r}, known are {', '.join(values)}; the file is of a newer berth"
            )
    content = "\n".join(f"{name}={attributes[name]}" for name in sorted(attributes))
    if "input_sha256" not in attributes:  # of another program: its attributes, if any, do not name the content
        content += sampled_digest(path)
    lower = {"True": True, "1": True, "False": False, "0": False}.get(attributes.get("do_lower_case", ""))
    binned = layout == "binned"
    try:
        numbers = {
            "vocab_size": int(attributes.get("vocab_size", "0") or 0),
            "bin_high": int(attributes.get("bin_high", length)) if binned else 0,
            "max_seq_length": int(attributes.get("max_seq_length", length)) if binned else length,
        }
        prob = float(attributes["masked_lm_prob"]) if "masked_lm_prob" in attributes else None
    except ValueError as error:
        raise DataError(f"{path}: an attribute is not a number ({error}); make the file again with create_pretraining_data.py") from error
    return RecordsFile(
        path, rows, vocab_sha256=attributes.get("vocab_sha256", ""), digest=hashlib.sha256(content.encode()).hexdigest(), lowercase=lower,
        layout=layout, length=length, predictions=predictions, objective=attributes.get("objective", "mlm+nsp"),
        masking=attributes.get("masking", "static"), masked_lm_prob=prob, blocks=blocks, **numbers,
    )  # fmt: skip


def _padded_shape(path: Path, handle: h5py.File) -> tuple[int, int, int, int]:
    """Rows, length, predictions, rows of a block."""
    missing = [field for field in FIELDS if field not in handle]
    if missing:
        raise DataError(f"{path} lacks the data sets {', '.join(missing)}; it is not a BERT pretraining records file")
    for field in FIELDS:
        dimensions = 1 if field == "next_sentence_labels" else 2
        if handle[field].ndim != dimensions or handle[field].dtype.kind not in "iu":
            raise DataError(
                f"{path}: data set {field} has {handle[field].ndim} dimension(s) of type {handle[field].dtype}, expected {dimensions} of "
                "integers; it is not a BERT pretraining records file"
            )
    rows, length = handle["input_ids"].shape
    predictions = handle["masked_lm_positions"].shape[1]
    widths = {"input_mask": length, "segment_ids": length, "masked_lm_ids": predictions}
    for field in FIELDS:
        if handle[field].shape[0] != rows:
            raise DataError(f"{path}: data set {field} has {handle[field].shape[0]} rows, input_ids has {rows}")
        if field in widths and handle[field].shape[1] != widths[field]:
            raise DataError(f"{path}: data set {field} has {handle[field].shape[1]} columns, expected {widths[field]}")
    chunks = [handle[field].chunks[0] for field in FIELDS[:-1] if handle[field].chunks is not None]
    return rows, length, predictions, _block_rows(rows, max(chunks, default=BLOCK_ROWS))


def _block_rows(rows: int, chunk_rows: int) -> int:
    """Rows of a block: 1024, or the next multiple of the file's chunks where those do not divide it."""
    if rows <= BLOCK_ROWS or BLOCK_ROWS % chunk_rows == 0:
        return BLOCK_ROWS
    return -(-BLOCK_ROWS // chunk_rows) * chunk_rows


def _packed_shape(path: Path, handle: h5py.File, attributes: dict[str, str]) -> tuple[int, int, int, int]:
    missing = [
        name for name in (*PACKED_DATASETS, "max_seq_length", "max_predictions_per_seq") if name not in handle and name not in attributes
    ]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; it is not a packed records file")
    rows = handle["next_sentence_labels"].shape[0]
    for name, items in (("row_offsets", rows + 1), ("masked_offsets", rows + 1), ("first_lengths", rows)):
        if handle[name].shape != (items,):
            raise DataError(f"{path}: data set {name} has shape {handle[name].shape}, expected ({items},)")
    return rows, int(attributes["max_seq_length"]), int(attributes["max_predictions_per_seq"]), PACKED_BLOCK_ROWS


def read_blocks(
    file: RecordsFile, blocks: Sequence[tuple[int, int, int]], rows: Rows, vocab_size: int, tables: TableCache
) -> None:  # fmt: skip
    """Read runs of rows of one hdf5 file: for every (first row, rows, place), into ``rows`` from ``place`` on.

    ``rows`` has at least the file's widths; what is right of them stays. Raises :class:`DataError` for what cannot be a sample of a model
    with ``vocab_size`` entries, and for damage.
    """
    packed = file.layout == "packed"
    try:
        with FileReader(file.path, tuple(PACKED_DATASETS) if packed else FIELDS, tables) as reader:
            for start, count, place in sorted(blocks):
                into = rows.take(slice(place, place + count))
                try:
                    (_read_packed if packed else _read_padded)(file, reader, start, start + count, into)
                except OutOfRangeError:
                    raise _misfit(file, reader, start, start + count, packed) from None
                if file.objective == "mlm":
                    into.next_sentence_labels[:] = NO_LABEL
                _check(file, start, into, vocab_size)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read ({error}); make it again with create_pretraining_data.py") from error


def _read_padded(file: RecordsFile, reader: FileReader, start: int, stop: int, into: Rows) -> None:
    for field in FIELDS:
        target = getattr(into, field)
        width = 0 if target.ndim == 1 else file.predictions if field.startswith("masked") else file.length
        if target.ndim == 1 or target.shape[1] == width:
            reader.read(field, start, stop, target)
        else:
            target[:, :width] = reader.array(field, start, stop, target.dtype)


def _read_packed(file: RecordsFile, reader: FileReader, start: int, stop: int, into: Rows) -> None:
    kind = into.input_ids.dtype
    offsets = reader.array("row_offsets", start, stop + 1, np.int64)
    masked = reader.array("masked_offsets", start, stop + 1, np.int64)
    first = reader.array("first_lengths", start, stop, np.int32)
    reader.read("next_sentence_labels", start, stop, into.next_sentence_labels)
    lengths, counts = np.diff(offsets), np.diff(masked)
    for name, values, low, high in (
        ("row_offsets", lengths, 1, file.length),
        ("masked_offsets", counts, 0, file.predictions),
        ("first_lengths", first, 1, lengths),
    ):
        bad = (values < low) | (values > high)
        if bad.any():
            raise DataError(f"{file.path}, row {start + int(np.flatnonzero(bad)[0])}: {name} does not fit a row of {file.length} tokens")
    place = np.arange(into.input_ids.shape[1])
    real = place < lengths[:, None]
    for field in ("input_ids", "masked_lm_positions", "masked_lm_ids"):
        getattr(into, field).fill(0)  # the memory may be that of other rows
    into.input_ids[real] = reader.array("input_ids", int(offsets[0]), int(offsets[-1]), kind)
    into.input_mask[...] = real
    into.segment_ids[...] = real & (place >= first[:, None])
    chosen = np.arange(into.masked_lm_ids.shape[1]) < counts[:, None]
    for field in ("masked_lm_positions", "masked_lm_ids"):
        getattr(into, field)[chosen] = reader.array(field, int(masked[0]), int(masked[-1]), kind)


def _misfit(file: RecordsFile, reader: FileReader, start: int, stop: int, packed: bool) -> DataError:
    """What to say of values that do not fit the types kept in memory."""
    limits = {"input_ids": MAX_NARROW, "masked_lm_ids": MAX_NARROW, "masked_lm_positions": MAX_NARROW}
    for field in () if packed else FIELDS:
        values = reader.raw(field, start, stop)
        low, high = (0, limits[field]) if field in limits else (-128, 128)
        bad = ((values < low) | (values >= high)).reshape(len(values), -1)
        if bad.any():
            row = int(np.flatnonzero(bad.any(axis=1))[0])
            value = values.reshape(len(values), -1)[row][bad[row]][0]
            return DataError(f"{file.path}, row {start + row}: {field} holds {value}, which no {_MEANING[field]} of this model can be")
    return DataError(
        f"{file.path}, rows from {start}: an id or a position is out of range; make the file again with create_pretraining_data.py"
    )


_MEANING = {
    "input_ids": "id in the vocabulary",
    "masked_lm_ids": "id in the vocabulary",
    "masked_lm_positions": "position",
    "input_mask": "mask",
    "segment_ids": "segment",
    "next_sentence_labels": "label",
}


def _check(file: RecordsFile, start: int, rows: Rows, vocab_size: int) -> None:
    for field in ("input_ids", "masked_lm_ids"):
        values = getattr(rows, field)
        if values.size and not (values.max() < vocab_size and values.min() >= 0):
            wrong = (values < 0) | (values >= vocab_size)
            row = int(np.flatnonzero(wrong.any(axis=1))[0])
            raise DataError(
                f"{file.path}, row {start + row}: {field} holds id {values[row][wrong[row]][0]}, the model's vocabulary has {vocab_size} "
                "entries; the records were made with another vocabulary, use its bert_config.json or make the records again"
            )
    positions = rows.masked_lm_positions
    if positions.size and not (positions.max() < file.length and positions.min() >= 0):
        raise DataError(f"{file.path}, rows from {start}: a masked position lies outside 0..{file.length - 1}")
