"""Rows to an hdf5 file that is complete or absent, and always the same bytes for the same rows.

gzip level 1 with byte shuffle in chunks of 1024 rows: every HDF5 library reads it, it is smaller than gzip 4 without
shuffle, written almost twice as fast, and a reader fetches neighbouring rows in one piece. No time stamps, fixed library
version bounds, attributes in sorted order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np

from berth.files import atomic_path
from berth.records.masking import Rows
from berth.records.schema import DATASETS, ROWS_PER_CHUNK

GZIP_LEVEL = 1
Attribute = str | int | float | bool


class RecordsWriter:
    """Appends blocks of rows to the datasets of an open file. Made by :func:`open_records`."""

    def __init__(self, file: h5py.File, rows: int, max_seq_length: int, max_predictions_per_seq: int) -> None:
        self.file, self.rows, self.written = file, rows, 0
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
        """Write ``rows`` after those already written. Blocks of a multiple of 1024 rows are compressed once."""
        stop = self.written + len(rows.next_sentence_labels)
        for name, (dtype, _) in DATASETS.items():
            self.file[name][self.written : stop] = np.asarray(getattr(rows, name), dtype)
        self.written = stop

    def set_attributes(self, attributes: Mapping[str, Attribute]) -> None:
        for name in sorted(attributes):
            self.file.attrs[name] = attributes[name]


class _OpenFile:
    """An h5py file that is closed on leaving; a failure to close does not hide the error that came first."""

    def __init__(self, path: Path) -> None:
        self.file = h5py.File(path, "w", libver=("earliest", "v110"), track_order=False)

    def __enter__(self) -> h5py.File:
        return self.file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.file.close()
        else:
            with contextlib.suppress(Exception):
                self.file.close()


@contextlib.contextmanager
def open_records(
    path: Path, rows: int, max_seq_length: int, max_predictions_per_seq: int
) -> Iterator[RecordsWriter]:
    """Open ``path`` for ``rows`` rows; it appears under its name when the block ends without error and all are written.

    Raises ``OSError`` when the disk is full or the folder not writable; ``path`` then holds what it held before.
    """
    with atomic_path(path) as temporary:
        with _OpenFile(temporary) as file:
            writer = RecordsWriter(file, rows, max_seq_length, max_predictions_per_seq)
            yield writer
            assert writer.written == rows, f"{writer.written} of {rows} rows were written"
