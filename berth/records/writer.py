"""Rows to hdf5 files that are complete or absent, and always the same bytes for the same rows.

gzip with byte shuffle in chunks of 1024 rows: every HDF5 library reads it, and a reader fetches neighbouring rows in one piece.
The chunks are compressed here and handed to HDF5 ready-made: after the shuffle there are long runs and little else to find, so
deflate is told to look for runs only (``Z_RLE``), which takes half the time of HDF5's own gzip level 1 and makes smaller files
(27.0 instead of 29.0 MB for 122,000 rows of 128; the public scripts' gzip 4 without shuffle makes 34). No time stamps, fixed
library version bounds, attributes in sorted order.

Rejected: ISA-L (``isal``), another three times faster. Its levels 1 and 2 do not repeat: the same 58 bytes became other deflate streams
in 5 of 270 processes.

Layouts: ``padded``, one file; ``binned``, one file for each range of lengths, its rows as wide as the range's upper end;
``packed``, one file without padding (:data:`berth.records.schema.PACKED_DATASETS`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from berth.files import atomic_path
from berth.records.rows import Rows
from berth.records.schema import DATASETS, ITEMS_PER_CHUNK, PACKED_DATASETS, ROWS_PER_CHUNK

GZIP_LEVEL = 1
Attribute = str | int | float | bool


class _DiskFile(io.RawIOBase):
    """What HDF5 writes through: a plain file that remembers the first failure instead of passing it on.

    The HDF5 library does not survive a failing write: it prints pages of tracebacks while it closes and can crash the
    process at exit (seen with 2.0 and a full disk). So a failed write is kept in ``error`` and HDF5 is told that all is
    well; whoever uses the file looks at ``error`` and throws the file away.
    """

    def __init__(self, path: Path, name: Path) -> None:
        """Open ``path``; failures speak of ``name``, the file it will become."""
        self.raw = open(path, "w+b", buffering=0)  # noqa: SIM115 - closed by close()
        self.name = str(name)
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while self.error is None and done < len(view):
                done += self.raw.write(view[done:])
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            if self.error is None:
                self.raw.truncate(size)
        except OSError as error:
            self.error = error
        return self.raw.tell() if size is None else size

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = self.raw.readinto(view) or 0
        if self.error is not None:  # never written: anything of the right length will do
            view[done:] = bytes(len(view) - done)
            done = len(view)
        return done

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.raw.seek(offset, whence)

    def tell(self) -> int:
        return self.raw.tell()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.raw.close()
        super().close()

    def check(self) -> None:
        """Raise the failure that was kept, if any, with the name of the file."""
        if self.error is not None:
            raise OSError(self.error.errno, self.error.strerror, self.name)


class _Column:
    """One dataset that grows: rows are gathered to whole chunks, shuffled, compressed and written directly."""

    def __init__(self, file: h5py.File, name: str, dtype: np.dtype, items: int | None, width: tuple[int, ...], chunk: int) -> None:
        """``items`` None: not known beforehand; the dataset then grows with every chunk."""
        self.dtype, self.width = dtype, width
        self.chunk = chunk if items is None else min(chunk, items)
        self.dataset = file.create_dataset(
            name,
            shape=(items or 0, *width),
            maxshape=(items, *width),
            dtype=dtype,
            chunks=(self.chunk, *width),
            compression="gzip",
            compression_opts=GZIP_LEVEL,
            shuffle=dtype.itemsize > 1,
            track_times=False,
        )
        self.grows = items is None
        self.written = 0
        self._waiting: NDArray = np.zeros((0, *width), dtype)

    def append(self, values: NDArray) -> None:
        values = values.astype(self.dtype, copy=False)
        if len(self._waiting):
            values = np.concatenate([self._waiting, values])
        whole = len(values) - len(values) % self.chunk
        for start in range(0, whole, self.chunk):
            self._write(values[start : start + self.chunk])
        self._waiting = values[whole:]

    def finish(self) -> None:
        """Write what is left; the rest of the last chunk is 0."""
        if len(self._waiting):
            self._write(self._waiting)

    def _write(self, values: NDArray) -> None:
        if self.grows:
            self.dataset.resize(self.written + len(values), axis=0)
        if len(values) < self.chunk:
            padded = np.zeros((self.chunk, *self.width), self.dtype)
            padded[: len(values)] = values
        else:
            padded = np.ascontiguousarray(values)
        size = self.dtype.itemsize
        planes = np.ascontiguousarray(padded.view(np.uint8).reshape(-1, size).T)  # the shuffle filter: first bytes, second bytes, ...
        self.dataset.id.write_direct_chunk((self.written, *(0 for _ in self.width)), _deflate(planes))
        self.written += len(values)


@functools.cache
def _deflated_zeros(count: int) -> bytes:
    """The last blocks of a raw deflate stream: ``count`` zeros."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
    return compressor.compress(bytes(count)) + compressor.flush()


def _deflate(planes: NDArray[np.uint8]) -> bytes:
    """A zlib stream (RFC 1950) of ``planes`` (uint8 [bytes of an item, items]) that uses runs only.

    The upper bytes of small numbers are planes of zeros at the end; what they become is known beforehand.
    """
    kept = len(planes)
    while kept > 1 and not planes[kept - 1].any():
        kept -= 1
    head, zeros = planes[:kept].data.cast("B"), (len(planes) - kept) * planes.shape[1]
    compressor = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_RLE)
    body = compressor.compress(head)
    body += compressor.flush(zlib.Z_SYNC_FLUSH) + _deflated_zeros(zeros) if zeros else compressor.flush()
    low, high = (adler := zlib.adler32(head)) & 0xFFFF, adler >> 16
    high = (high + zeros * low) % 65521  # Adler-32 of the zeros behind: the first sum stays, the second adds it for each
    return b"\x78\x01" + body + (high << 16 | low).to_bytes(4, "big")


@dataclasses.dataclass
class Tally:
    """What one file holds so far; the names are those of :class:`berth.records.schema.RecordCounts`."""

    instances: int = 0
    used_tokens: int = 0
    masked: int = 0
    random_next: int = 0
    forced_random: int = 0

    def add(self, rows: Rows, forced: NDArray[np.bool_]) -> None:
        self.instances += len(forced)
        self.used_tokens += int(rows.input_mask.sum(dtype=np.int64))
        self.masked += int(np.count_nonzero(rows.masked_lm_positions))
        self.random_next += int(np.count_nonzero(rows.next_sentence_labels))
        self.forced_random += int(np.count_nonzero(forced))


class _PaddedFile:
    """Rows of one width in NVIDIA's schema."""

    def __init__(self, file: h5py.File, rows: int, width: int, predictions: int) -> None:
        widths = {"L": (width,), "P": (predictions,), "": ()}
        self.columns = {
            name: _Column(file, name, dtype, rows, widths[second], ROWS_PER_CHUNK) for name, (dtype, second) in DATASETS.items()
        }

    def append(self, rows: Rows) -> None:
        for name, column in self.columns.items():
            column.append(getattr(rows, name))


class _PackedFile:
    """Rows without padding."""

    def __init__(self, file: h5py.File, wide: bool) -> None:
        types = {name: dtype for name, (dtype, _) in PACKED_DATASETS.items()}
        if wide:
            types["input_ids"] = np.dtype("<i4")
        self.columns = {name: _Column(file, name, dtype, None, (), ITEMS_PER_CHUNK) for name, dtype in types.items()}
        self.tokens = self.masked = 0
        for name in ("row_offsets", "masked_offsets"):
            self.columns[name].append(np.zeros(1, np.int64))

    def append(self, rows: Rows) -> None:
        real, chosen = rows.input_mask.view(bool), rows.masked_lm_positions > 0
        row_ends = np.cumsum(real.sum(axis=1, dtype=np.int64)) + self.tokens
        masked_ends = np.cumsum(chosen.sum(axis=1, dtype=np.int64)) + self.masked
        self.tokens, self.masked = int(row_ends[-1]), int(masked_ends[-1])
        values = {
            "input_ids": rows.input_ids[real],
            "row_offsets": row_ends,
            "first_lengths": (real & (rows.segment_ids == 0)).sum(axis=1),
            "masked_lm_positions": rows.masked_lm_positions[chosen],
            "masked_lm_ids": rows.masked_lm_ids[chosen],
            "masked_offsets": masked_ends,
            "next_sentence_labels": rows.next_sentence_labels,
        }
        for name, column in self.columns.items():
            column.append(values[name])


@dataclasses.dataclass(frozen=True)
class FilePlan:
    """One file to write: its rows, and how long they are (above ``low``, up to ``high``)."""

    path: Path
    rows: int
    low: int
    high: int


class RecordsWriter:
    """Writes blocks of rows to the files of one shard. Made by :func:`open_records`."""

    def __init__(self, plans: Sequence[FilePlan], files: Sequence[h5py.File], disks: Sequence[_DiskFile], layout: str, predictions: int,
                 wide: bool) -> None:  # fmt: skip
        self.plans, self.files, self.disks = plans, files, disks
        self.tallies = [Tally() for _ in plans]
        self.targets: list[_PaddedFile | _PackedFile] = [
            _PackedFile(file, wide) if layout == "packed" else _PaddedFile(file, plan.rows, plan.high, predictions)
            for file, plan in zip(files, plans, strict=True)
        ]

    def append(self, rows: Rows, forced: NDArray[np.bool_]) -> None:
        """Write ``rows`` after those already written; ``forced`` bool [rows] is only counted.

        Raises ``OSError`` when the disk is full.
        """
        lengths = rows.input_mask.sum(axis=1, dtype=np.int64)
        for plan, target, tally in zip(self.plans, self.targets, self.tallies, strict=True):
            if len(self.plans) == 1:
                part, part_forced = rows, forced
            else:
                chosen = (lengths > plan.low) & (lengths <= plan.high)
                if not chosen.any():
                    continue
                part, part_forced = _narrow(rows, chosen, plan.high), forced[chosen]
            target.append(part)
            tally.add(part, part_forced)
        for disk in self.disks:
            disk.check()

    def finish(self, number: int, attributes: Mapping[str, Attribute]) -> None:
        """Write what waits and the attributes of file ``number``."""
        for column in self.targets[number].columns.values():
            column.finish()
        for name in sorted(attributes):
            self.files[number].attrs[name] = attributes[name]


def _narrow(rows: Rows, chosen: NDArray[np.bool_], width: int) -> Rows:
    return Rows(
        *(
            getattr(rows, field.name)[chosen][:, :width]
            if field.name in ("input_ids", "input_mask", "segment_ids")
            else getattr(rows, field.name)[chosen]
            for field in dataclasses.fields(Rows)
        )
    )


@contextlib.contextmanager
def open_records(plans: Sequence[FilePlan], layout: str, max_predictions_per_seq: int, vocab_size: int) -> Iterator[RecordsWriter]:
    """Open the files of one shard; they appear under their names when the block ends without error and all rows are written.

    Raises ``OSError`` when the disk is full or the folder not writable; the files then hold what they held before.
    """
    with contextlib.ExitStack() as renames:
        temporaries = [renames.enter_context(atomic_path(plan.path)) for plan in plans]
        with contextlib.ExitStack() as opened:
            disks = [
                opened.enter_context(contextlib.closing(_DiskFile(temporary, plan.path)))
                for temporary, plan in zip(temporaries, plans, strict=True)
            ]
            with contextlib.ExitStack() as handles:
                files = [handles.enter_context(h5py.File(disk, "w", libver=("earliest", "v110"), track_order=False)) for disk in disks]
                writer = RecordsWriter(plans, files, disks, layout, max_predictions_per_seq, vocab_size > 1 << 16)
                yield writer
            for disk in disks:
                disk.check()
        done = [tally.instances for tally in writer.tallies]
        assert done == [plan.rows for plan in plans], f"{done} rows were written instead of {plans}"
