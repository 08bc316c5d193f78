"""Arrays that grow on disk instead of in memory: unnamed temporary files, read back through a memory map.

Tokens and instances of a shard are many times larger than what is worked on at a time. They are written to files that have
no name (so nothing stays behind however the process ends) in the folder of the output, whose file system must have room for
the output anyway, and mapped read-only. Pages the map has touched count as memory of the process: :meth:`Mapped.release` gives
them back; the page cache still holds them, so touching them again costs no read.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

RESIDENT_BYTES = 16 << 20  # a mapped file up to this size is left alone


class Mapped:
    """A finished array: ``array`` is read-only; ``release`` drops what is resident of a large one."""

    def __init__(self, array: NDArray, source: mmap.mmap | None = None) -> None:
        self.array = array
        self._source = source if source is not None and array.nbytes > RESIDENT_BYTES else None
        if self._source is not None and hasattr(mmap, "MADV_RANDOM"):
            # without this every touched page maps 15 neighbours, and a random walk makes the whole file resident
            self._source.madvise(mmap.MADV_RANDOM)

    def release(self) -> None:
        """Give the touched pages back to the system; values stay as they are."""
        if self._source is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._source.madvise(mmap.MADV_DONTNEED)


class Spool:
    """An array of one type that is appended to, then mapped; its unnamed file lies beside ``output``, which names errors."""

    def __init__(self, output: Path, dtype: np.dtype | type) -> None:
        self.dtype = np.dtype(dtype)
        self.items = 0
        self.output = output
        output.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=output.parent, prefix=".berth-spool-", buffering=0)  # noqa: SIM115

    def append(self, values: NDArray) -> None:
        """Write ``values`` behind what is there. Raises ``OSError`` (disk full) with ``output`` as its file name."""
        data = np.ascontiguousarray(values, self.dtype).data.cast("B")
        done = 0
        try:
            while done < len(data):
                done += self._file.write(data[done:])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.output)) from None
        self.items += len(values)

    def finish(self) -> Mapped:
        """Map what was written. The file goes when the array does."""
        if not self.items:
            self._file.close()
            return Mapped(np.zeros(0, self.dtype))
        source = mmap.mmap(self._file.fileno(), self.items * self.dtype.itemsize, prot=mmap.PROT_READ)
        self._file.close()
        return Mapped(np.frombuffer(source, self.dtype), source)
