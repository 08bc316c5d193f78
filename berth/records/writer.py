"""Rows to an hdf5 file that is complete or absent, and always the same bytes for the same rows.

gzip level 1 with byte shuffle in chunks of 1024 rows: every HDF5 library reads it, it is smaller than gzip 4 without
shuffle, written almost twice as fast, and a reader fetches neighbouring rows in one piece. No time stamps, fixed library
version bounds, attributes in sorted order.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from berth.files import atomic_path
from berth.records.masking import Rows
from berth.records.schema import DATASETS, ROWS_PER_CHUNK

GZIP_LEVEL = 1
Attribute = str | int | float | bool


class RecordsWriter:
    """Appends blocks of rows to the datasets of an open file. Made by :func:`open_records`."""

    def __init__(self, file: h5py.File, disk: _DiskFile, rows: int, max_seq_length: int, max_predictions_per_seq: int) -> None:
        self.file, self.disk, self.rows, self.written = file, disk, rows, 0
        widths = {"L": (max_seq_length,), "P": (max_predictions_per_seq,), "": ()}
        for name, (dtype, width) in DATASETS.items():
            shape = (rows, *widths[width])
            file.create_dataset(
                name,
                shape=shape,
                dtype=dtype,
                chunks=(min(ROWS_PER_CHUNK, rows), *shape[1:]),
                compression="gzip",
                compression_opts=GZIP_LEVEL,
                shuffle=dtype.itemsize > 1,
                track_times=False,
            )

    def append(self, rows: Rows) -> None:
        """Write ``rows`` after those already written. Blocks of a multiple of 1024 rows are compressed once.

        Raises ``OSError`` when the disk is full.
        """
        stop = self.written + len(rows.next_sentence_labels)
        for name, (dtype, _) in DATASETS.items():
            self.file[name][self.written : stop] = np.asarray(getattr(rows, name), dtype)
        self.written = stop
        self.disk.check()

    def set_attributes(self, attributes: Mapping[str, Attribute]) -> None:
        for name in sorted(attributes):
            self.file.attrs[name] = attributes[name]


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


@contextlib.contextmanager
def open_records(path: Path, rows: int, max_seq_length: int, max_predictions_per_seq: int) -> Iterator[RecordsWriter]:
    """Open ``path`` for ``rows`` rows; it appears under its name when the block ends without error and all are written.

    Raises ``OSError`` when the disk is full or the folder not writable; ``path`` then holds what it held before.
    """
    with atomic_path(path) as temporary, contextlib.closing(_DiskFile(temporary, path)) as disk:
        with h5py.File(disk, "w", libver=("earliest", "v110"), track_order=False) as file:
            writer = RecordsWriter(file, disk, rows, max_seq_length, max_predictions_per_seq)
            yield writer
        disk.check()
        assert writer.written == rows, f"{writer.written} of {rows} rows were written"
