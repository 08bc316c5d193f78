"""hdf5 records -> samples by number: one endless shuffled stream that does not depend on who reads it.

Sample ``k`` of the stream is sample ``k mod N`` of epoch ``k // N``, where an epoch is a permutation of all ``N`` rows made from
(seed, epoch) alone. World size, worker count and accumulation decide only *which* numbers a process asks for, so a run can
stop at any number and go on there, on other hardware.

A full random permutation would read gzip chunks one row at a time (about 400 rows/s). Instead the files are cut into blocks
of ``block_rows`` neighbouring rows, the blocks of all files are shuffled, and consecutive blocks form windows of about
``window_rows`` rows inside which the rows are shuffled. Records files are shuffled when they are made, so neighbours in a
block are unrelated. A window is read once, block by block, into memory.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import os
import re
from pathlib import Path

import h5py
import numpy as np

from berth.errors import DataError

BLOCK_ROWS = 1024
WINDOW_ROWS = 1 << 16

FIELDS = (
    "input_ids",
    "input_mask",
    "segment_ids",
    "masked_lm_positions",
    "masked_lm_ids",
    "next_sentence_labels",
)
SUFFIXES = (".hdf5", ".h5")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Samples as in the file: int32 ``[N, L]`` / ``[N, P]`` ids and positions, int8 masks, segments and labels."""

    input_ids: np.ndarray
    input_mask: np.ndarray
    segment_ids: np.ndarray
    masked_lm_positions: np.ndarray
    masked_lm_ids: np.ndarray
    next_sentence_labels: np.ndarray

    def __len__(self) -> int:
        return len(self.next_sentence_labels)

    def take(self, selection: np.ndarray | slice) -> Rows:
        """The rows of ``selection``, in its order."""
        return Rows(*(getattr(self, field)[selection] for field in FIELDS))

    @staticmethod
    def concatenate(parts: list[Rows]) -> Rows:
        """Join parts end to end."""
        if len(parts) == 1:
            return parts[0]
        return Rows(*(np.concatenate([getattr(part, field) for part in parts]) for field in FIELDS))


@dataclasses.dataclass(frozen=True)
class RecordsFile:
    """One hdf5 file: where it is, how many rows, and what its attributes say of its vocabulary ('' and 0 if nothing).

    ``digest`` names its content: of the attributes that decide it (input, options, seed), or of the size for files without any.
    """

    path: Path
    rows: int
    vocab_sha256: str = ""
    vocab_size: int = 0
    digest: str = ""
    lowercase: bool | None = None


@dataclasses.dataclass(frozen=True)
class RecordsIndex:
    """The files of one data folder in name order, all of one shape. ``fingerprint`` names the data set for checkpoints."""

    files: tuple[RecordsFile, ...]
    seq_length: int
    max_predictions: int

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
    def fingerprint(self) -> str:
        """SHA-256 of the files' names, row counts and content digests: equal when the stream hands out the same samples."""
        text = "\n".join(f"{file.path.name} {file.rows} {file.digest}" for file in self.files)
        return hashlib.sha256(f"{self.seq_length} {self.max_predictions}\n{text}".encode()).hexdigest()


def kind_of(path: Path) -> str | None:
    """What a records file is for by its name: "training" or "test" in ``<prefix>_<kind>_<i>``, or as a whole word elsewhere; else ``None``.

    Raises :class:`DataError` when the name has both words and not that form.
    """
    ending = re.search(r"(?:^|_)(training|test)_\d+$", path.stem)
    if ending:
        return ending.group(1)
    found = {"training", "test"} & set(re.split(r"[^a-z]+", path.stem.lower()))
    if len(found) > 1:
        raise DataError(f"{path} may be training or held-out data; name it <prefix>_training_<i>.hdf5 or <prefix>_test_<i>.hdf5")
    return next(iter(found), None)


def find_files(folder: str | os.PathLike[str], kind: str) -> list[Path]:
    """Records files of a folder, sorted by name: those that are for ``kind`` ("training" or "test") by their name, or, when none is,
    those whose name says neither. A single file stands for itself.

    Raises :class:`DataError` when there is none.
    """
    root = Path(folder)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"data folder {folder} does not exist; give the folder that create_pretraining_data.py wrote")
    every = sorted(path for path in root.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))
    kinds = {path: kind_of(path) for path in every}
    chosen = [path for path in every if kinds[path] == kind] or [path for path in every if kinds[path] is None]
    if not chosen:
        what = f"{len(every)} hdf5 files, none of them for {kind}" if every else "no .hdf5 file"
        raise DataError(f"data folder {folder} holds {what}; make records with create_pretraining_data.py")
    return chosen


def open_index(
    folder: str | os.PathLike[str], kind: str, seq_length: int | None = None, wanted_by: str = "--max_seq_length"
) -> RecordsIndex:
    """Look into every file of a folder (shapes and attributes only) and check that they belong together.

    Raises :class:`DataError` naming the file for: an unreadable or truncated file, a missing data set, lengths that differ
    between files or from ``seq_length``, a folder without a single row.
    """
    files: list[RecordsFile] = []
    shape: tuple[int, int] | None = None
    for path in find_files(folder, kind):
        file, length, predictions = _inspect(path)
        if seq_length is not None and length != seq_length:
            raise DataError(
                f"{path} holds sequences of {length} tokens but {wanted_by} is {seq_length}; give records of length {seq_length}, or "
                f"change {wanted_by} to {length}"
            )
        if shape is None:
            shape = (length, predictions)
        elif shape != (length, predictions):
            raise DataError(
                f"{path} has sequence length {length} and {predictions} predictions, {files[0].path} has {shape[0]} and {shape[1]}; "
                "records of one folder must have one shape"
            )
        files.append(file)
    assert shape is not None
    index = RecordsIndex(tuple(files), *shape)
    if index.rows == 0:
        raise DataError(f"the {len(files)} records files in {folder} hold no instance at all; was the text empty?")
    return index


def _inspect(path: Path) -> tuple[RecordsFile, int, int]:
    try:
        with h5py.File(path, "r") as handle:
            missing = [field for field in FIELDS if field not in handle]
            if missing:
                raise DataError(f"{path} lacks the data sets {', '.join(missing)}; it is not a BERT pretraining records file")
            rows, length = handle["input_ids"].shape
            predictions = handle["masked_lm_positions"].shape[1]
            short = [field for field in FIELDS if handle[field].shape[0] != rows]
            if short:
                raise DataError(f"{path}: data set {short[0]} has {handle[short[0]].shape[0]} rows, input_ids has {rows}")
            attributes = {name: str(value) for name, value in handle.attrs.items() if not name.startswith("count_")}
            vocab_size = int(attributes.get("vocab_size", "0") or 0)
            content = "\n".join(f"{name}={attributes[name]}" for name in sorted(attributes)) or str(path.stat().st_size)
            lower = {"True": True, "1": True, "False": False, "0": False}.get(attributes.get("do_lower_case", ""))
            digest = hashlib.sha256(content.encode()).hexdigest()
            return RecordsFile(path, rows, attributes.get("vocab_sha256", ""), vocab_size, digest, lower), length, predictions
    except OSError as error:
        raise DataError(
            f"{path} cannot be read as hdf5 ({error}); a truncated file must be made again with create_pretraining_data.py"
        ) from error


class SampleStream:
    """The endless shuffled stream of one data set; see the module docstring for its order.

    Args:
        index: the files.
        seed: names the shuffling.
        vocab_size: rows with an id outside ``[0, vocab_size)`` raise :class:`DataError` when their block is read.
        shuffle: ``False`` gives file order in every epoch (evaluation).
        block_rows, window_rows: see the module docstring; part of the order, hence constants of a run.
    """

    def __init__(
        self,
        index: RecordsIndex,
        seed: int,
        vocab_size: int,
        *,
        shuffle: bool = True,
        block_rows: int = BLOCK_ROWS,
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        self.index, self.seed, self.vocab_size, self.shuffle = index, seed, vocab_size, shuffle
        self.window_rows = window_rows
        self._blocks = np.array(
            [
                (number, start, min(block_rows, file.rows - start))
                for number, file in enumerate(index.files)
                for start in range(0, file.rows, block_rows)
            ],
            dtype=np.int64,
        ).reshape(-1, 3)
        self._epoch = -1
        self._windows: list[np.ndarray] = []
        self._starts: list[int] = []
        self._cached: dict[tuple[int, int], Rows] = {}
        # a data set that fits one window is read once and kept, whatever the number of epochs
        self._resident: Rows | None = None

    def rows(self, first: int, count: int) -> Rows:
        """Samples ``first .. first + count - 1`` of the stream, in stream order; may cross windows and epochs."""
        parts: list[Rows] = []
        while count > 0:
            epoch, position = divmod(first, self.index.rows)
            self._plan(epoch)
            window = bisect.bisect_right(self._starts, position) - 1
            offset = position - self._starts[window]
            data = self._window(epoch, window)
            part = data.take(slice(offset, min(offset + count, len(data))))
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return Rows.concatenate(parts)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, *key))))

    def _plan(self, epoch: int) -> None:
        """Lay out the windows of one epoch: the shuffled blocks, cut after every ``window_rows`` rows."""
        if epoch == self._epoch:
            return
        order = self._generator(epoch, 0).permutation(len(self._blocks)) if self.shuffle else np.arange(len(self._blocks))
        blocks = self._blocks[order]
        before = np.cumsum(blocks[:, 2]) - blocks[:, 2]
        cuts = np.flatnonzero(np.diff(before // self.window_rows)) + 1
        self._windows = np.split(blocks, cuts)
        sizes = [int(window[:, 2].sum()) for window in self._windows]
        self._starts = [int(start) for start in np.cumsum([0, *sizes[:-1]])]
        self._epoch = epoch

    def _window(self, epoch: int, number: int) -> Rows:
        key = (epoch, number)
        if key not in self._cached:
            # only the window in use and its predecessor (a step may straddle two) stay in memory
            self._cached = dict(list(self._cached.items())[-1:])
            self._cached[key] = self._load(epoch, number)
        return self._cached[key]

    def _load(self, epoch: int, number: int) -> Rows:
        blocks = self._windows[number]
        if len(self._windows) == 1:
            if self._resident is None:
                self._resident = self._read(self._blocks)
            rows = self._resident
            starts = {(int(f), int(s)): int(at) for (f, s, _), at in zip(self._blocks, self._block_offsets(self._blocks), strict=True)}
            layout = np.concatenate([np.arange(starts[int(f), int(s)], starts[int(f), int(s)] + n) for f, s, n in blocks])
        else:
            rows = self._read(blocks)
            layout = np.arange(len(rows))
        if self.shuffle:
            layout = layout[self._generator(epoch, 1, number).permutation(len(layout))]
        return rows.take(layout)

    @staticmethod
    def _block_offsets(blocks: np.ndarray) -> np.ndarray:
        return np.cumsum(blocks[:, 2]) - blocks[:, 2]

    def _read(self, blocks: np.ndarray) -> Rows:
        """Read blocks into memory in the given order, each file opened once."""
        total, length, predictions = int(blocks[:, 2].sum()), self.index.seq_length, self.index.max_predictions
        rows = Rows(
            np.empty((total, length), np.int32),
            np.empty((total, length), np.int8),
            np.empty((total, length), np.int8),
            np.empty((total, predictions), np.int32),
            np.empty((total, predictions), np.int32),
            np.empty(total, np.int8),
        )
        offsets = self._block_offsets(blocks)
        for number in np.unique(blocks[:, 0]):
            path = self.index.files[number].path
            try:
                with h5py.File(path, "r") as handle:
                    for at in np.flatnonzero(blocks[:, 0] == number):
                        _, start, count = (int(value) for value in blocks[at])
                        into = slice(int(offsets[at]), int(offsets[at]) + count)
                        for field in FIELDS:
                            getattr(rows, field)[into] = handle[field][start : start + count]
                        self._check(path, start, rows.take(into))
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error}); make it again with create_pretraining_data.py") from error
        return rows

    def _check(self, path: Path, start: int, rows: Rows) -> None:
        for field in ("input_ids", "masked_lm_ids"):
            values = getattr(rows, field)
            if values.size and not (values.min() >= 0 and values.max() < self.vocab_size):
                row = int(np.flatnonzero((values < 0).any(1) | (values >= self.vocab_size).any(1))[0])
                bad = values[row][(values[row] < 0) | (values[row] >= self.vocab_size)][0]
                raise DataError(
                    f"{path}, row {start + row}: {field} holds id {bad}, the model's vocabulary has {self.vocab_size} entries; the "
                    "records were made with another vocabulary, use its bert_config.json or make the records again"
                )
        positions = rows.masked_lm_positions
        if positions.size and not (positions.min() >= 0 and positions.max() < self.index.seq_length):
            raise DataError(f"{path}, rows from {start}: a masked position lies outside 0..{self.index.seq_length - 1}")
