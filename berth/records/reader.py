"""Records files -> samples by number: one endless shuffled stream that does not depend on who reads it.

Sample ``k`` of the stream is sample ``k mod N`` of epoch ``k // N``, where an epoch is a permutation of all ``N`` rows made from
(seed, epoch) alone. World size, worker count and accumulation decide only *which* numbers a process asks for, so a run can
stop at any number and go on there, on other hardware.

A full random permutation would read gzip chunks one row at a time (about 400 rows/s). Instead the files are cut into blocks
of neighbouring rows (1024, or whole chunks of files of other programs), the blocks of all files are shuffled, and consecutive
blocks form windows of about ``window_rows`` rows inside which the rows are shuffled. Records files are shuffled when they are
made, so neighbours in a block are unrelated. A window is read once, block by block, into memory.

Length-binned records have one more rule: every group of ``group`` consecutive samples (the global batch) comes from one bin. Each bin
is a sequence shuffled as above; which bin comes next is shuffled; what is left of the bins when they are cut into groups forms mixed groups
at the ends of the epoch. The order is then a function of (seed, epoch, ``group``).
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from berth.errors import ConfigError, DataError
from berth.records.direct import TableCache
from berth.records.layouts import BLOCK_ROWS, RecordsFile, inspect_hdf5, read_blocks
from berth.records.lddl import LddlReader, inspect_parquet, is_parquet
from berth.records.rows import FIELDS, NO_LABEL, Rows, narrow_type
from berth.text.vocabulary import Vocabulary

__all__ = [
    "BLOCK_ROWS", "FIELDS", "NO_LABEL", "WINDOW_ROWS", "RecordsFile", "RecordsIndex", "Rows", "SampleStream", "find_files", "kind_of",
    "open_index",
]  # fmt: skip

WINDOW_ROWS = 1 << 16
SUFFIXES = (".hdf5", ".h5")

# rows and the numbers of these samples -> what is trained on (berth.records.dynamic)
Transform = Callable[[Rows, NDArray[np.int64]], Rows]


@dataclasses.dataclass(frozen=True)
class RecordsIndex:
    """The files of one data folder in name order, all of one kind. ``fingerprint`` names the data set for checkpoints.

    ``vocabulary`` is what reading strings (LDDL) needs, ``None`` otherwise.
    """

    files: tuple[RecordsFile, ...]
    seq_length: int
    max_predictions: int
    vocabulary: Vocabulary | None = None

    @property
    def rows(self) -> int:
        """Rows of all files together: the length of an epoch."""
        return sum(file.rows for file in self.files)

    @property
    def lowercase(self) -> bool | None:
        """Whether the text was lower-cased, ``None`` where the files do not say or disagree."""
        said = {file.lowercase for file in self.files}
        return said.pop() if len(said) == 1 else None

    @property
    def objective(self) -> str:
        """``mlm`` when the rows are no sentence pairs, else ``mlm+nsp``."""
        return self.files[0].objective

    @property
    def masked(self) -> bool:
        """Whether the files hold masks."""
        return self.files[0].masking == "static"

    @property
    def masked_lm_prob(self) -> float | None:
        """The share of masked positions the files say they were (or are to be) made with, ``None`` if they do not."""
        said = {file.masked_lm_prob for file in self.files}
        return said.pop() if len(said) == 1 else None

    @property
    def binned(self) -> bool:
        """Whether the files are bins of different lengths."""
        return len({file.bin_high for file in self.files}) > 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files' names, row counts and content digests: equal when the stream hands out the same samples."""
        text = "\n".join(file.name for file in self.files)
        return hashlib.sha256(f"{self.seq_length} {self.max_predictions}\n{text}".encode()).hexdigest()


def kind_of(path: Path) -> str | None:
    """What a records file is for by its name: "training" or "test" in ``<prefix>_<kind>_<i>``, or as a whole word elsewhere; else ``None``.

    Raises :class:`DataError` when the name has both words and not that form.
    """
    stem = re.sub(r"_bin_\d+$", "", path.stem)
    ending = re.search(r"(?:^|_)(training|test)_\d+$", stem)
    if ending:
        return ending.group(1)
    found = {"training", "test"} & set(re.split(r"[^a-z]+", stem.lower()))
    if len(found) > 1:
        raise DataError(f"{path} may be training or held-out data; name it <prefix>_training_<i>.hdf5 or <prefix>_test_<i>.hdf5")
    return next(iter(found), None)


def find_files(folder: str | os.PathLike[str], kind: str) -> list[Path]:
    """Records files of a folder, sorted by name: those that are for ``kind`` ("training" or "test") by their name, or, when none is,
    those whose name says neither. A single file stands for itself. LDDL's Parquet files are taken where there is no hdf5.

    Raises :class:`DataError` when there is none.
    """
    root = Path(folder)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"data folder {folder} does not exist; give the folder that create_pretraining_data.py wrote")
    visible = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    every = [path for path in visible if path.suffix in SUFFIXES]
    parquet = [path for path in visible if is_parquet(path)]
    if every and parquet:
        raise DataError(f"data folder {folder} holds hdf5 and Parquet files ({every[0].name}, {parquet[0].name}); keep one kind")
    every = every or parquet
    kinds = {path: kind_of(path) for path in every}
    chosen = [path for path in every if kinds[path] == kind] or [path for path in every if kinds[path] is None]
    if not chosen:
        what = f"{len(every)} records files, none of them for {kind}" if every else "no .hdf5 file"
        raise DataError(f"data folder {folder} holds {what}; make records with create_pretraining_data.py")
    return chosen


def open_index(
    folder: str | os.PathLike[str],
    kind: str,
    seq_length: int | None = None,
    wanted_by: str = "--max_seq_length",
    *,
    vocabulary: Vocabulary | None = None,
) -> RecordsIndex:
    """Look into every file of a folder (shapes and attributes only) and check that they belong together.

    Args:
        folder: with records, or one file.
        kind: "training" or "test".
        seq_length: what the records must have, if given; LDDL's Parquet does not say what it was made for, so there it is a bound.
        wanted_by: where ``seq_length`` comes from, for messages.
        vocabulary: needed for Parquet.

    Raises :class:`DataError` naming the file for: an unreadable or truncated file, a missing data set, lengths that differ
    between files or from ``seq_length``, a folder without a single row. :class:`ConfigError` for Parquet without ``vocabulary``.
    """
    paths = find_files(folder, kind)
    if is_parquet(paths[0]):
        if vocabulary is None:
            raise ConfigError(
                f"the Parquet files in {folder} hold tokens, not ids; give --vocab_file with the vocabulary they were made with"
            )
        files = inspect_parquet(paths, seq_length)
        index = RecordsIndex(files, files[0].max_seq_length, max(file.predictions for file in files), vocabulary)
    else:
        files = tuple(inspect_hdf5(path) for path in paths)
        for file in files:
            _check_shape(file, files[0], seq_length, wanted_by)
        index = RecordsIndex(files, files[0].max_seq_length, files[0].predictions, vocabulary)
    if index.rows == 0:
        raise DataError(f"the {len(files)} records files in {folder} hold no instance at all; was the text empty?")
    return index


def _check_shape(file: RecordsFile, first: RecordsFile, seq_length: int | None, wanted_by: str) -> None:
    length = file.max_seq_length
    if seq_length is not None and length != seq_length:
        raise DataError(
            f"{file.path} holds sequences of {length} tokens but {wanted_by} is {seq_length}; give records of length {seq_length}, or "
            f"change {wanted_by} to {length}"
        )
    if (length, file.predictions) != (first.max_seq_length, first.predictions):
        raise DataError(
            f"{file.path} has sequence length {length} and {file.predictions} predictions, {first.path} has {first.max_seq_length} and "
            f"{first.predictions}; records of one folder must have one shape"
        )
    for name in ("layout", "objective", "masking"):
        if getattr(file, name) != getattr(first, name):
            raise DataError(
                f"{file.path} has {name} {getattr(file, name)}, {first.path} has {getattr(first, name)}; records of one folder must have one {name}"
            )


class _Lane:
    """The shuffled sequence over the blocks of some files: position ``p`` of epoch ``e`` is one of their rows.

    ``key`` names its draws: the order of the blocks comes from ``(seed, epoch, *order_key)``, the order inside window ``w`` from
    ``(seed, epoch, *window_key, w)``.
    """

    def __init__(
        self, stream: SampleStream, numbers: Sequence[int], order_key: tuple[int, ...], window_key: tuple[int, ...], window_rows: int,
        block_rows: int | None,
    ) -> None:  # fmt: skip
        self.stream, self.order_key, self.window_key, self.window_rows = stream, order_key, window_key, window_rows
        files = stream.index.files
        # file, first row and rows of every block
        self._blocks = np.concatenate([np.insert(files[number].cut(block_rows), 0, number, axis=1) for number in numbers])
        self.rows = int(self._blocks[:, 2].sum())
        self.length = max(files[number].length for number in numbers)
        self.predictions = max(files[number].predictions for number in numbers)
        self._epoch = -1
        self._windows: list[NDArray[np.int64]] = []
        self._starts: list[int] = []
        self._cached: dict[tuple[int, int], tuple[Rows, NDArray[np.int64]]] = {}
        # memory of windows that are done with: fresh memory costs as much to be given by the system as a window costs to fill
        self._spare: Rows | None = None
        widths = {(files[number].length, files[number].predictions, files[number].layout) for number in numbers}
        self._reuses = len(widths) == 1 and next(iter(widths))[2] != "parquet"  # which is decoded into new memory
        # a data set that fits one window is read once and kept, whatever the number of epochs
        self._resident: Rows | None = None

    def take(self, epoch: int, position: int, count: int) -> Iterator[Rows]:
        """Rows ``position .. position + count - 1`` of ``epoch``, in pieces."""
        self._plan(epoch)
        while count > 0:
            window = bisect.bisect_right(self._starts, position) - 1
            offset = position - self._starts[window]
            rows, layout = self._window(epoch, window)
            part = rows.take(layout[offset : offset + count])
            yield part
            position, count = position + len(part), count - len(part)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.stream.seed, *key))))

    def _plan(self, epoch: int) -> None:
        """Lay out the windows of one epoch: the shuffled blocks, cut after every ``window_rows`` rows."""
        if epoch == self._epoch:
            return
        shuffled = self.stream.shuffle
        order = self._generator(epoch, *self.order_key).permutation(len(self._blocks)) if shuffled else np.arange(len(self._blocks))
        blocks = self._blocks[order]
        cuts = np.flatnonzero(np.diff(_offsets(blocks) // self.window_rows)) + 1
        self._windows = np.split(blocks, cuts)
        sizes = [int(window[:, 2].sum()) for window in self._windows]
        self._starts = [int(start) for start in np.cumsum([0, *sizes[:-1]])]
        self._epoch = epoch

    def _window(self, epoch: int, number: int) -> tuple[Rows, NDArray[np.int64]]:
        key = (epoch, number)
        if key not in self._cached:
            # only the window in use and its predecessor (a step may straddle two) stay in memory
            while len(self._cached) > 1:
                rows, _ = self._cached.pop(next(iter(self._cached)))
                if self._reuses and rows is not self._resident:
                    self._spare = rows
            self._cached[key] = self._load(epoch, number)
        return self._cached[key]

    def _load(self, epoch: int, number: int) -> tuple[Rows, NDArray[np.int64]]:
        """The rows of a window as they are read, and the order they are handed out in."""
        blocks = self._windows[number]
        if len(self._windows) == 1:
            if self._resident is None:
                self._resident = self._read(self._blocks)
            rows = self._resident
            starts = {(int(f), int(s)): int(at) for (f, s, _), at in zip(self._blocks, _offsets(self._blocks), strict=True)}
            layout = np.concatenate([np.arange(starts[int(f), int(s)], starts[int(f), int(s)] + n) for f, s, n in blocks])
        else:
            rows = self._read(blocks)
            layout = np.arange(len(rows))
        if self.stream.shuffle:
            layout = layout[self._generator(epoch, *self.window_key, number).permutation(len(layout))]
        return rows, layout

    def _read(self, blocks: NDArray[np.int64]) -> Rows:
        """Read blocks into memory in the given order, each file opened once."""
        stream = self.stream
        rows = self._room(int(blocks[:, 2].sum()))
        offsets = _offsets(blocks)
        for number in np.unique(blocks[:, 0]):
            file = stream.index.files[number]
            own = [(int(blocks[at, 1]), int(blocks[at, 2]), int(offsets[at])) for at in np.flatnonzero(blocks[:, 0] == number)]
            if file.layout == "parquet":
                assert stream.lddl is not None
                rows = stream.lddl.read_blocks(file, own, rows)
            else:
                read_blocks(file, own, rows, stream.vocab_size, stream.tables)
        return rows

    def _room(self, count: int) -> Rows:
        """Memory for ``count`` rows: that of a former window where it is large enough."""
        spare, self._spare = self._spare, None
        # rows are slices of the memory they were read into
        memory = None if spare is None else Rows(*(getattr(spare, field).base for field in FIELDS))
        if memory is None or len(memory) < count:
            spacious = max(count, min(self.rows, self.window_rows + int(self._blocks[:, 2].max()))) if self._reuses else count
            memory = Rows.zeros(spacious, self.length, self.predictions, narrow_type(self.stream.vocab_size))
        return memory.take(slice(0, count))


def _offsets(blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.cumsum(blocks[:, 2]) - blocks[:, 2]


@dataclasses.dataclass(frozen=True)
class _Course:
    """One epoch of binned records: run ``i`` starts at sample ``starts[i]`` and takes rows of ``lanes[i]`` from ``positions[i]`` on."""

    starts: NDArray[np.int64]
    lanes: NDArray[np.int64]
    positions: NDArray[np.int64]


class SampleStream:
    """The endless shuffled stream of one data set; see the module docstring for its order.

    Args:
        index: the files.
        seed: names the shuffling.
        vocab_size: rows with an id outside ``[0, vocab_size)`` raise :class:`DataError` when their block is read.
        shuffle: ``False`` gives file order in every epoch (evaluation).
        block_rows, window_rows: see the module docstring; part of the order, hence constants of a run. ``block_rows`` None: as the files say.
        group: samples that belong together (the global batch); of use for length-binned records only.
        transform: applied to what is read, with the numbers of the samples (dynamic masking).
    """

    def __init__(
        self,
        index: RecordsIndex,
        seed: int,
        vocab_size: int,
        *,
        shuffle: bool = True,
        block_rows: int | None = None,
        window_rows: int = WINDOW_ROWS,
        group: int | None = None,
        transform: Transform | None = None,
    ) -> None:
        self.index, self.seed, self.vocab_size, self.shuffle = index, seed, vocab_size, shuffle
        self.transform = transform
        self.tables = TableCache()
        self.lddl = LddlReader(index.vocabulary) if index.vocabulary is not None else None
        numbers = range(len(index.files))
        self.group = group if shuffle and index.binned else None
        if self.group is None:
            self._lanes = [_Lane(self, numbers, (0,), (1,), window_rows, block_rows)]
        else:
            bins = sorted({file.bin_high for file in index.files if file.rows})
            share = max(BLOCK_ROWS, window_rows // len(bins))  # all bins together hold about one window
            self._lanes = [
                _Lane(self, [n for n in numbers if index.files[n].bin_high == high], (2, at), (3, at), share, block_rows)
                for at, high in enumerate(bins)
            ]
        self._epoch = -1
        self._course: _Course | None = None

    def rows(self, first: int, count: int) -> Rows:
        """Samples ``first .. first + count - 1`` of the stream, in stream order; may cross windows and epochs."""
        parts: list[Rows] = []
        at, left = first, count
        while left > 0:
            epoch, position = divmod(at, self.index.rows)
            taken = min(left, self.index.rows - position)
            parts += self._lanes[0].take(epoch, position, taken) if self.group is None else self._take_binned(epoch, position, taken)
            at, left = at + taken, left - taken
        rows = Rows.concatenate(parts).widened()
        if self.group is None:
            rows = rows.fitted(self.index.seq_length, rows.masked_lm_ids.shape[1])
        return rows if self.transform is None else self.transform(rows, np.arange(first, first + count))

    def _take_binned(self, epoch: int, position: int, count: int) -> Iterator[Rows]:
        assert self.group is not None
        if epoch != self._epoch or self._course is None:
            self._course, self._epoch = self._plan_bins(epoch, self.group), epoch
        course = self._course
        run = int(np.searchsorted(course.starts, position, side="right")) - 1
        while count > 0:
            end = int(course.starts[run + 1]) if run + 1 < len(course.starts) else self.index.rows
            skipped, taken = position - int(course.starts[run]), min(count, end - position)
            yield from self._lanes[course.lanes[run]].take(epoch, int(course.positions[run]) + skipped, taken)
            position, count, run = position + taken, count - taken, run + 1

    def _plan_bins(self, epoch: int, group: int) -> _Course:
        """Which bin every run of samples comes from: single rows up to the first group's edge, whole groups, single rows to the end.

        Groups lie at multiples of ``group`` in the endless stream, so an epoch in general begins inside one, which the epoch before has begun.
        """
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, epoch, 4))))
        sizes = np.array([lane.rows for lane in self._lanes], np.int64)
        groups = sizes // group
        head = min(-epoch * self.index.rows % group, self.index.rows)
        left = sizes - groups * group
        while left.sum() < head:  # the largest bin gives a group to begin with
            largest = int(np.argmax(groups))
            groups[largest], left[largest] = groups[largest] - 1, left[largest] + group
        numbers = np.arange(len(sizes))
        singles = generator.permutation(np.repeat(numbers, left))
        whole = generator.permutation(np.repeat(numbers, groups))
        # single rows bin by bin: most groups of them are of one bin, too
        lanes = np.concatenate([np.sort(singles[:head]), whole, np.sort(singles[head:])])
        lengths = np.concatenate([np.ones(head, np.int64), np.full(len(whole), group, np.int64), np.ones(len(singles) - head, np.int64)])
        positions = np.zeros(len(lanes), np.int64)
        for lane in numbers:
            own = np.flatnonzero(lanes == lane)
            positions[own] = np.cumsum(lengths[own]) - lengths[own]
        # neighbouring runs of one bin are one run
        starts = np.cumsum(lengths) - lengths
        keep = np.ones(len(lanes), bool)
        keep[1:] = lanes[1:] != lanes[:-1]
        return _Course(starts[keep], lanes[keep], positions[keep])
