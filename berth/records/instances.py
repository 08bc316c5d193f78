"""Instances of a shard on disk, read back in the order of their rows.

The order is a hash of each instance's key, so the rows of a file are shuffled. It is an external sort: every block that
arrives is sorted and written as one run; a bucket is the same narrow range of the hash in every run, small enough to be
sorted in memory. Nothing depends on the sizes of blocks and buckets.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from berth.records.pairs import Instances
from berth.records.spool import Mapped, Spool

BUCKET_ROWS = 1 << 15
_CELL_BITS = 12  # the finest bucket is 1 / 4096 of the hash's range

_STORED = np.dtype(
    [
        ("a_starts", "<i8"), ("a_lengths", "<u2"), ("b_starts", "<i8"), ("b_lengths", "<u2"),
        ("labels", "i1"), ("forced", "?"), ("keys", "<u8"),
    ]
)  # fmt: skip


class InstanceSpool:
    """Takes blocks of instances; :meth:`finish` gives them back sorted. ``lengths`` counts the rows of every length."""

    def __init__(self, output: Path, max_seq_length: int) -> None:
        self.spool = Spool(output, _STORED)
        self.lengths: NDArray[np.int64] = np.zeros(max_seq_length + 1, np.int64)
        self.starts: list[int] = []
        self.runs: list[NDArray[np.uint32]] = []  # of each run, where its cells begin, relative to its start

    def append(self, block: Instances) -> None:
        """Write a block as a sorted run. Raises ``OSError`` on a full disk."""
        order = block.order
        sorting = np.argsort(order, kind="stable")
        run: NDArray = np.empty(len(block), _STORED)
        for field in dataclasses.fields(Instances):
            run[field.name] = getattr(block, field.name)[sorting]
        cells = np.bincount((order >> np.uint64(64 - _CELL_BITS)).astype(np.int64), minlength=1 << _CELL_BITS)
        self.starts.append(self.spool.items)
        self.runs.append(np.concatenate([[0], np.cumsum(cells)]).astype(np.uint32))
        self.spool.append(run)
        self.lengths += np.bincount(block.lengths, minlength=len(self.lengths))

    def finish(self) -> StoredInstances:
        return StoredInstances(self.spool.finish(), self.starts, self.runs, self.lengths)


class StoredInstances:
    """All instances of a shard; ``lengths`` is int64 [L + 1], the number of rows of every length."""

    def __init__(self, mapped: Mapped, starts: list[int], runs: list[NDArray[np.uint32]], lengths: NDArray[np.int64]) -> None:
        self.mapped, self.starts, self.runs, self.lengths = mapped, starts, runs, lengths

    def __len__(self) -> int:
        return len(self.mapped.array)

    def _edges(self) -> list[int]:
        """Cells at which buckets begin: a bucket ends when it has :data:`BUCKET_ROWS` rows."""
        before = np.zeros((1 << _CELL_BITS) + 1, np.int64)
        for run in self.runs:
            before += run
        edges = [0]
        for cell in range(1, len(before)):
            if before[cell] - before[edges[-1]] >= BUCKET_ROWS or cell == len(before) - 1:
                edges.append(cell)
        return edges

    def buckets(self) -> Iterator[Instances]:
        """The instances in the order of their rows, about :data:`BUCKET_ROWS` at a time."""
        for first, last in itertools.pairwise(self._edges()):
            spans = [(start + int(run[first]), start + int(run[last])) for start, run in zip(self.starts, self.runs, strict=True)]
            rows = np.concatenate([self.mapped.array[start:stop] for start, stop in spans])
            self.mapped.release()
            found = Instances(*(np.ascontiguousarray(rows[field.name]) for field in dataclasses.fields(Instances)))
            yield found.take(np.argsort(found.order, kind="stable"))
