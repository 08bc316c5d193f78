"""Check a records file completely: what every reader relies on. Used by :mod:`berth.records.verify`, by tests, by whoever receives a file.

In: one hdf5 file of any layout (:mod:`berth.records.schema`), also of the public scripts (other integer types, no attributes). Out:
:class:`RecordsScan`: tallies and every :class:`Problem`, or (:func:`validate_records`) an error at the first.

The file is read through h5py alone, not through berth's own fast reader, so that an error of one is not hidden by the other. It
streams in blocks of rows with the types on disk; packed rows are padded block by block and go through the same rules. A rule first
asks whether any value of the block breaks it, and only then in which row.

What only a statistic can tell (80/10/10, next-sentence labels) is held against five standard deviations: a sound file fails once
in two million. Where nothing says which ids are ``[CLS]``, ``[SEP]`` and ``[MASK]`` (no vocabulary), they are inferred from the first rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from berth.errors import DataError
from berth.records import draws
from berth.records.options import MAX_SEQ_LENGTH
from berth.records.schema import DATASETS, FORMAT, PACKED_DATASETS, RecordCounts
from berth.text.vocabulary import Vocabulary

BLOCK_TOKENS = 1 << 18  # positions checked at a time
CHUNK_CACHE_BYTES = 64 << 20  # files of other writers have chunks that are narrower than a row
SIGMAS = 5.0
MOST_HASHES = 1 << 18  # of a file; beyond it, a sample of the rows
_UNKNOWN = -1


@dataclasses.dataclass(frozen=True)
class Problem:
    """A rule that is broken: in ``row`` (counted from 0), or by the file as a whole."""

    rule: str
    row: int | None = None

    def __str__(self) -> str:
        return self.rule if self.row is None else f"row {self.row}: {self.rule}"


@dataclasses.dataclass(frozen=True)
class RecordsSummary:
    """Shape and tallies of a records file.

    ``seen_*``: what stands at the masked positions (``[MASK]``, the word itself, another word). ``expected_random``: how many rows are
    expected to have label 1, None where the file does not say how many had no choice.
    """

    rows: int
    max_seq_length: int
    max_predictions_per_seq: int
    used_tokens: int
    masked: int
    random_next: int
    seen_mask: int = 0
    seen_kept: int = 0
    seen_random: int = 0
    layout: str = "padded"
    objective: str = "mlm+nsp"
    masking: str = "static"
    expected_random: float | None = None


@dataclasses.dataclass
class RecordsScan:
    """All that was found in one file.

    ``problems`` holds the first ones, ``wrong`` counts all (every row and rule). ``hashes`` are of unmasked rows (sorted uint64), those below
    ``2**64 >> hash_shift`` only, so that their number stays bounded.
    """

    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    summary: RecordsSummary | None = None
    problems: list[Problem] = dataclasses.field(default_factory=list)
    wrong: int = 0
    hashes: draws.Keys = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))
    hash_shift: int = 0


def validate_records(path: str | Path, vocabulary: Vocabulary | None = None, strict: bool = True) -> RecordsSummary:
    """Check every row of ``path``.

    Args:
        path: an hdf5 records file.
        vocabulary: when given, ids are checked against it: range, ``[CLS]``/``[SEP]`` in place, no special token masked.
        strict: types, compression and chunks must be exactly those berth writes; False allows any integer type.

    Raises:
        DataError: naming the file, the dataset and the first wrong row.
    """
    scan = scan_records(path, vocabulary, strict, max_problems=1)
    if scan.problems:
        raise DataError(f"{path}: {scan.problems[0]}")
    assert scan.summary is not None
    return scan.summary


def scan_records(
    path: str | Path, vocabulary: Vocabulary | None = None, strict: bool | None = None, max_problems: int = 20, hashes: bool = False
) -> RecordsScan:
    """Read ``path`` to its end whatever is wrong in it; the arguments as :func:`validate_records`.

    ``strict`` None: for files that berth wrote. ``hashes``: also hash the rows. Raises nothing for a damaged file: that is a problem found.
    """
    scan = RecordsScan()
    try:
        with h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES) as file:
            scan.attributes = {name: _plain(value) for name, value in file.attrs.items()}
            try:
                _Scanner(file, scan, vocabulary, strict, max_problems, hashes).run()
            except _Stop as stop:
                scan.problems, scan.wrong = [Problem(str(stop)), *scan.problems], scan.wrong + 1
    except (
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # h5py raises all of them for damaged metadata
        scan.problems.append(Problem(f"not a readable hdf5 file, truncated or damaged: {error}; make it again"))
        scan.wrong += 1
    return scan


class _Stop(Exception):
    """The rows cannot be read at all."""


@dataclasses.dataclass
class _Block:
    """Some rows: ``lengths`` of their real positions and ``seconds``, the tokens of segment B with its ``[SEP]``, as read from the file."""

    ids: NDArray
    mask: NDArray | None
    segments: NDArray | None
    positions: NDArray
    labels: NDArray
    next_labels: NDArray
    lengths: NDArray[np.int64]
    seconds: NDArray[np.int64]


class _Scanner:
    """One pass through one open file."""

    def __init__(
        self, file: h5py.File, scan: RecordsScan, vocabulary: Vocabulary | None, strict: bool | None, max_problems: int, hashes: bool
    ) -> None:
        self.file, self.scan, self.vocabulary, self.max_problems, self.want_hashes = file, scan, vocabulary, max_problems, hashes
        attributes = scan.attributes
        self.own = attributes.get("format") == FORMAT
        self.strict = self.own if strict is None else strict
        self.layout = str(attributes.get("layout", "padded"))
        self.objective = str(attributes.get("objective", "mlm+nsp"))
        self.masking = str(attributes.get("masking", "static"))
        size = vocabulary.size if vocabulary else attributes.get("vocab_size", np.iinfo(np.int32).max)
        self.vocab_size = int(size) if isinstance(size, (int, float)) else np.iinfo(np.int32).max
        self.cls_id, self.sep_id, self.mask_id = _UNKNOWN, _UNKNOWN, _UNKNOWN
        if vocabulary:
            self.cls_id, self.sep_id, self.mask_id = vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id
        self.rows = self.length = self.most = 0
        self.used = self.masked = self.random = 0
        self.expected_random: float | None = None
        self.seen = np.zeros(3, np.int64)
        self.weights = np.zeros(0, np.uint64)
        self.hashes: list[draws.Keys] = []

    # --------------------------------------------------------------------------------------------------- problems

    def problem(self, rule: str, row: int | None = None) -> None:
        self.scan.wrong += 1
        if len(self.scan.problems) < self.max_problems:
            self.scan.problems.append(Problem(rule, row))

    def number(self, name: str) -> int:
        """A number among the attributes; without it the file cannot be followed."""
        value = self.scan.attributes.get(name)
        if not isinstance(value, int):
            raise _Stop(f"attribute {name} is {'missing' if value is None else repr(value)}; a number is needed")
        return value

    def rule(self, text: str, wrong: NDArray[np.bool_], start: int) -> None:
        """``wrong`` bool [rows] or [rows, anything], of the rows from ``start`` on."""
        if not wrong.any():
            return
        rows = np.flatnonzero(wrong if wrong.ndim == 1 else wrong.any(axis=1))
        room = self.max_problems - len(self.scan.problems)
        self.scan.problems += [Problem(text, start + int(row)) for row in rows[: max(0, room)]]
        self.scan.wrong += len(rows)

    # ------------------------------------------------------------------------------------------------------- run

    def run(self) -> None:
        known = {"layout": ("padded", "binned", "packed"), "objective": ("mlm+nsp", "mlm"), "masking": ("static", "none")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise _Stop(f"attribute {name} is {getattr(self, name)!r}, known are {', '.join(values)}")
        self._check_vocabulary()
        blocks = self._packed_blocks() if self.layout == "packed" else self._padded_blocks()
        start = 0
        for block in blocks:
            self._check(block, start)
            start += len(block.ids)
        self._check_bins()
        self._check_statistics()
        self._check_counts()
        self.scan.summary = RecordsSummary(
            self.rows, self.length, self.most, self.used, self.masked, self.random, int(self.seen[0]), int(self.seen[1]), int(self.seen[2]),
            layout=self.layout, objective=self.objective, masking=self.masking, expected_random=self.expected_random,
        )  # fmt: skip
        if self.hashes:
            self._keep_hashes()

    def _check_vocabulary(self) -> None:
        if self.vocabulary is None:
            return
        for name, value in (("vocab_sha256", self.vocabulary.sha256), ("vocab_size", self.vocabulary.size)):
            if name in self.scan.attributes and self.scan.attributes[name] != value:
                self.problem(f"attribute {name} is {self.scan.attributes[name]}, the vocabulary's is {value}: made with another vocabulary")

    # --------------------------------------------------------------------------------------------------- reading

    def _shape(self, expected: Mapping[str, tuple[np.dtype, str]], wide: str | None = None) -> None:
        """Names and types of the datasets. ``wide``: the one that may be int32 instead."""
        missing = sorted(set(expected) - set(self.file))
        if missing:
            raise _Stop(f"dataset(s) {', '.join(missing)} are missing")
        for name, (dtype, _) in expected.items():
            dataset = self.file[name]
            if not isinstance(dataset, h5py.Dataset):
                raise _Stop(f"{name} is not a dataset")
            allowed = (dtype, np.dtype("<i4")) if name == wide else (dtype,)
            if dataset.dtype.kind not in "iu" or (self.strict and dataset.dtype not in allowed):
                raise _Stop(f"{name} has type {dataset.dtype}, expected {' or '.join(map(str, allowed))}")
            if self.strict and (dataset.compression != "gzip" or dataset.chunks[1:] != dataset.shape[1:]):
                raise _Stop(f"{name} is not compressed by gzip in chunks of whole rows")

    def _padded_blocks(self) -> Iterator[_Block]:
        """Blocks of a file in NVIDIA's schema."""
        self._shape(DATASETS)
        if self.file["input_ids"].ndim != 2 or self.file["masked_lm_positions"].ndim != 2:
            raise _Stop("input_ids and masked_lm_positions must have two dimensions")
        self.rows, self.length = self.file["input_ids"].shape
        self.most = self.file["masked_lm_positions"].shape[1]
        widths = {"L": (self.length,), "P": (self.most,), "": ()}
        for name, (_, width) in DATASETS.items():
            if self.file[name].shape != (self.rows, *widths[width]):
                raise _Stop(f"{name} has shape {self.file[name].shape}, expected {(self.rows, *widths[width])}")
        if not self.rows:
            raise _Stop("holds no row")
        chunks = self.file["input_ids"].chunks
        unit = min(chunks[0], 1 << 14) if chunks else 1
        step = max(1, BLOCK_TOKENS // self.length // unit) * unit
        for start in range(0, self.rows, step):
            part = {name: self.file[name][start : start + step] for name in DATASETS}
            yield _Block(
                part["input_ids"], part["input_mask"], part["segment_ids"], part["masked_lm_positions"], part["masked_lm_ids"],
                part["next_sentence_labels"], _sums(part["input_mask"]), _sums(part["segment_ids"]),
            )  # fmt: skip

    def _packed_blocks(self) -> Iterator[_Block]:
        """Blocks of a packed file as padded rows. Offsets that cannot be followed end the scan."""
        self._shape(PACKED_DATASETS, wide="input_ids")
        sizes = {name: self.file[name].shape for name in PACKED_DATASETS}
        if any(len(shape) != 1 for shape in sizes.values()):
            raise _Stop("the datasets of the packed layout must have one dimension")
        self.rows = len(self.file["next_sentence_labels"])
        if not self.rows:
            raise _Stop("holds no row")
        counts = {"T": len(self.file["input_ids"]), "M": len(self.file["masked_lm_ids"]), "N": self.rows, "N + 1": self.rows + 1}
        for name, (_, items) in PACKED_DATASETS.items():
            if sizes[name] != (counts[items],):
                raise _Stop(f"{name} has {sizes[name][0]} items, expected {counts[items]}")
        self.length, self.most = self.number("max_seq_length"), self.number("max_predictions_per_seq")
        if not (5 <= self.length <= MAX_SEQ_LENGTH and 1 <= self.most <= self.length):
            raise _Stop(f"max_seq_length {self.length} or max_predictions_per_seq {self.most} is out of range")
        step = max(1, BLOCK_TOKENS // self.length)
        ends = {
            "row_offsets": (counts["T"], self.length, "max_seq_length"),
            "masked_offsets": (counts["M"], self.most, "max_predictions_per_seq"),
        }
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            edges = {}
            for name, (total, most, limit) in ends.items():
                found = self.file[name][start : stop + 1].astype(np.int64)
                if (start == 0 and found[0] != 0) or (stop == self.rows and found[-1] != total):
                    raise _Stop(f"{name} does not go from 0 to {total}")
                sizes_here = np.diff(found)
                wrong = (sizes_here < 0) | (sizes_here > most)
                if wrong.any():
                    raise _Stop(f"row {start + int(np.flatnonzero(wrong)[0])}: {name} does not rise by 0 to {limit} ({most})")
                edges[name] = found
            yield self._padded(start, stop, edges["row_offsets"], edges["masked_offsets"])

    def _padded(self, start: int, stop: int, tokens: NDArray[np.int64], masks: NDArray[np.int64]) -> _Block:
        lengths, firsts = np.diff(tokens), self.file["first_lengths"][start:stop].astype(np.int64)
        self.rule("first_lengths is not 0 to the length of the row", (firsts < 0) | (firsts > lengths), start)
        ids = _spread(self.file["input_ids"][tokens[0] : tokens[-1]], lengths, self.length)
        positions, labels = (
            _spread(self.file[name][masks[0] : masks[-1]], np.diff(masks), self.most) for name in ("masked_lm_positions", "masked_lm_ids")
        )
        next_labels = self.file["next_sentence_labels"][start:stop]
        return _Block(ids, None, None, positions, labels, next_labels, lengths, np.clip(lengths - firsts, 0, lengths))

    # ----------------------------------------------------------------------------------------------------- rules

    def _check(self, block: _Block, start: int) -> None:
        """Every rule for one block of rows, and the tallies."""
        ids, lengths, seconds = block.ids, block.lengths, block.seconds
        length = ids.shape[1]
        place = np.arange(length, dtype=np.int16 if length < 1 << 15 else np.int32)
        lengths = np.clip(lengths, 0, length)
        seconds = np.clip(seconds, 0, lengths)
        edge = lengths.astype(place.dtype)[:, None]
        real = place < edge
        pairs = self.objective == "mlm+nsp"
        least = 5 if pairs else 3
        if block.mask is not None:
            self.rule("input_mask is not ones followed by zeros", block.mask != real, start)
        self.rule(f"fewer than {least} real tokens", lengths < least, start)
        if self.layout == "binned" and "bin_low" in self.scan.attributes:
            low = self.number("bin_low")
            self.rule(f"the row is not longer than {low} tokens, as this bin's are", lengths <= low, start)
        self._in_range("an input id", ids, start)
        self.rule("padding of input_ids is not 0", (ids != 0) & ~real, start)
        if block.segments is not None:
            in_b = real & (place >= (lengths - seconds).astype(place.dtype)[:, None])
            self.rule("segment_ids is not zeros, ones, then zeros as padding", block.segments != in_b, start)
        if pairs:
            self.rule(
                "a segment is empty: [CLS] A [SEP] B [SEP] have at least one token each", (seconds < 2) | (lengths - seconds < 3), start
            )
        else:
            self.rule("objective mlm, but a row has a second segment", seconds > 0, start)
        self.rule("next_sentence_labels is not 0 or 1", (block.next_labels != 0) & (block.next_labels != 1), start)
        if not pairs:
            self.rule("objective mlm, but next_sentence_labels is not 0", block.next_labels != 0, start)
        self._check_masks(block, lengths, seconds, start)
        self.used += int(lengths.sum())
        self.random += int(np.count_nonzero(block.next_labels))

    def _in_range(self, what: str, ids: NDArray, start: int) -> None:
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            self.rule(f"{what} is not in 0..{self.vocab_size - 1}", (ids < 0) | (ids >= self.vocab_size), start)

    def _check_masks(self, block: _Block, lengths: NDArray[np.int64], seconds: NDArray[np.int64], start: int) -> None:
        ids, labels = block.ids, block.labels
        positions = block.positions.astype(np.int64)
        rows, length = np.arange(len(ids)), ids.shape[1]
        chosen = positions > 0
        count = chosen.sum(axis=1)
        self.rule("a masked position is out of range", (positions < 0) | (positions >= length), start)
        self.rule("masked positions are not followed by zeros only", chosen != (np.arange(chosen.shape[1]) < count[:, None]), start)
        self.rule("masked positions are not ascending", (np.diff(positions, axis=1) <= 0) & chosen[:, 1:], start)
        last = np.maximum(lengths - 1, 0)
        a_end = np.maximum(lengths - seconds - 1, 0)
        self.rule("a masked position is padding or the last [SEP]", chosen & (positions >= last[:, None]), start)
        self._in_range("a masked id", labels, start)
        self.rule("padding of masked_lm_ids is not 0", (labels != 0) & ~chosen, start)
        if self.objective == "mlm+nsp":
            self.rule("a [SEP] is masked", chosen & (positions == a_end[:, None]), start)
        if self.masking == "none":
            self.rule("masking none, but a position is masked", chosen, start)
        within = chosen & (positions < length)
        at = np.where(within, positions, 0)
        seen = ids[rows[:, None], at]
        self._infer(ids, last, seen, labels, within)
        self.rule("position 0 is not [CLS]", ids[:, 0] != self.cls_id, start)
        self.rule("the last token is not [SEP]", ids[rows, last] != self.sep_id, start)
        if self.objective == "mlm+nsp":
            self.rule("segment A does not end with [SEP]", ids[rows, a_end] != self.sep_id, start)
        specials = {self.cls_id, self.sep_id, self.mask_id, 0} - {_UNKNOWN}
        special = np.zeros(labels.shape, bool)
        for token in specials:
            special |= labels == token
        self.rule("a masked id is a special token", special & within, start)
        is_mask, kept = within & (seen == self.mask_id), within & (seen == labels)
        counts = (np.count_nonzero(is_mask), np.count_nonzero(kept & ~is_mask), np.count_nonzero(within & ~is_mask & ~kept))
        self.seen += np.array(counts, np.int64)
        self.masked += int(np.count_nonzero(chosen))
        if self.mask_id != _UNKNOWN and np.count_nonzero(ids == self.mask_id) != counts[0]:
            elsewhere = np.count_nonzero(ids == self.mask_id, axis=1) != np.count_nonzero(is_mask, axis=1)
            self.rule("[MASK] stands at a position that is not masked", elsewhere, start)
        self._check_mask_counts(count, lengths, start)
        whole_words = bool(self.scan.attributes.get("whole_word_mask", False)) and self.vocabulary is not None
        if not whole_words and not self.want_hashes:
            return
        original = ids.copy()
        row, column = np.nonzero(within)
        original[row, at[row, column]] = labels[row, column]
        if whole_words:
            self._check_words(original, row, at[row, column], lengths, a_end, start)
        if self.want_hashes:
            self._hash(original)

    def _infer(self, ids: NDArray, last: NDArray[np.int64], seen: NDArray, labels: NDArray, within: NDArray[np.bool_]) -> None:
        """Without a vocabulary: the special ids are those of the first rows."""
        if self.cls_id == _UNKNOWN:
            self.cls_id, self.sep_id = int(ids[0, 0]), int(ids[0, last[0]])
        if self.mask_id == _UNKNOWN:
            changed = seen[within & (seen != labels)]
            changed = changed[(changed >= 0) & (changed < self.vocab_size)]
            if changed.size:
                values, counts = np.unique(changed, return_counts=True)
                if counts.max() * 2 > changed.size:
                    self.mask_id = int(values[counts.argmax()])

    def _check_mask_counts(self, count: NDArray[np.int64], lengths: NDArray[np.int64], start: int) -> None:
        """How many positions berth and the NVIDIA script mask in a row of a given length."""
        prob = self.scan.attributes.get("masked_lm_prob")
        if not self.own or self.masking == "none" or not isinstance(prob, float) or not 0 < prob < 1:
            return
        special = 3 if self.objective == "mlm+nsp" else 2
        wanted = np.minimum(np.clip(np.rint(lengths * prob).astype(np.int64), 1, self.most), np.maximum(lengths - special, 0))
        if self.scan.attributes.get("whole_word_mask") or self.objective == "mlm":  # a row of running text may hold more [SEP]
            self.rule(f"more positions are masked than --masked_lm_prob {prob} allows", count > wanted, start)
        else:
            self.rule(f"not as many positions are masked as --masked_lm_prob {prob} says", count != wanted, start)

    def _check_words(
        self, original: NDArray, row: NDArray[np.int64], at: NDArray[np.int64], lengths: NDArray[np.int64], a_end: NDArray[np.int64],
        start: int,
    ) -> None:  # fmt: skip
        """Whole-word masking: of a word either all pieces are masked or none."""
        assert self.vocabulary is not None
        masked = np.zeros(original.shape, bool)
        masked[row, at] = True
        continues = self.vocabulary.is_continuation[np.clip(original, 0, self.vocab_size - 1)]
        place = np.arange(original.shape[1])
        special = (place == 0) | (place == a_end[:, None]) | (place >= lengths[:, None] - 1)
        joined = continues[:, 1:] & ~special[:, 1:] & ~special[:, :-1]
        self.rule("a word is masked in part, not as a whole", joined & (masked[:, 1:] != masked[:, :-1]), start)

    # ---------------------------------------------------------------------------------------------------- hashes

    def _hash(self, original: NDArray) -> None:
        """A 64-bit hash of every row without its masks and padding (multilinear, Carter and Wegman; the padding adds 0)."""
        if not self.weights.size:
            self.weights = draws.fold(np.array([0x5EED], np.uint64), np.arange(max(original.shape[1], self.length))) | np.uint64(1)
        hashes = draws.mix(original.astype(np.uint64) @ self.weights[: original.shape[1]])
        self.hashes.append(hashes[hashes <= np.uint64(0xFFFFFFFFFFFFFFFF >> self.scan.hash_shift)])
        if sum(map(len, self.hashes)) > 2 * MOST_HASHES:
            self._keep_hashes()

    def _keep_hashes(self) -> None:
        merged = np.unique(np.concatenate(self.hashes))
        self.scan.hashes, self.scan.hash_shift = thin(merged, self.scan.hash_shift, MOST_HASHES)
        self.hashes = [self.scan.hashes]

    # ------------------------------------------------------------------------------------------- of the whole file

    def _check_bins(self) -> None:
        """A bin holds rows of its lengths only, and is as wide as its longest."""
        if self.layout != "binned":
            return
        low, high, longest = (self.number(name) for name in ("bin_low", "bin_high", "max_seq_length"))
        if not low < high == self.length <= longest:
            self.problem(f"rows of {self.length} positions in a bin of {low + 1} to {high} of at most {longest}")

    def _check_statistics(self) -> None:
        """80/10/10 and the labels, within :data:`SIGMAS`."""
        if self.masked and self.mask_id != _UNKNOWN:
            # a random word may be the word itself, in the public scripts also a special one
            chance = 0.1 / max(1, min(self.vocab_size, self._ordinary()))
            for name, share, low, high in (
                ("are [MASK]", 0.8, 0.0, chance),
                ("were kept", 0.1, 0.0, chance),
                ("became another word", 0.1, 2 * chance, 0.0),
            ):
                number = int(self.seen[("are [MASK]", "were kept", "became another word").index(name)])
                found, sigma = number / self.masked, math.sqrt(share * (1 - share) / self.masked)
                if not share - low - SIGMAS * sigma <= found <= share + high + SIGMAS * sigma:
                    self.problem(
                        f"{100 * found:.2f} % of the {self.masked} masked positions {name}; expected {100 * share:.0f} %, within "
                        f"{100 * SIGMAS * sigma:.2f}"
                    )
        elif self.masked > 100:
            self.problem("no id stands at most of the masked positions: nothing was replaced by [MASK]")
        if self.objective == "mlm+nsp":
            self._check_balance()

    def _ordinary(self) -> int:
        return int(np.count_nonzero(~self.vocabulary.is_special_or_unused)) if self.vocabulary else max(1, self.vocab_size - 5)

    def _check_balance(self) -> None:
        forced = self.number("count_forced_random") if "count_forced_random" in self.scan.attributes else None
        free = self.rows - (forced or 0)
        spread = SIGMAS * math.sqrt(max(free, 0)) / 2
        if forced is not None:
            self.expected_random = expected = forced + free / 2
            if abs(self.random - expected) > spread:
                self.problem(
                    f"{self.random} of {self.rows} rows have label 1 (random); expected {expected:.0f}, within {spread:.0f}: half of those "
                    f"that have a choice, and {forced} that have none"
                )
        elif self.random < self.rows / 2 - spread or (self.random == self.rows and self.rows > 20):
            self.problem(f"{self.random} of {self.rows} rows have label 1 (random); expected half of them or more, but not all")

    def _check_counts(self) -> None:
        """What the attributes say of the rows."""
        found = {"instances": self.rows, "used_tokens": self.used, "masked": self.masked, "random_next": self.random}
        for name, number in found.items():
            said = self.scan.attributes.get(f"count_{name}")
            if said is not None and said != number:
                self.problem(f"attribute count_{name} is {said}, but there are {number}")
            elif said is None and self.own:
                self.problem(f"attribute count_{name} is missing")
        wanted = {"max_seq_length": self.length, "max_predictions_per_seq": self.most}
        for name, number in wanted.items():
            said = self.scan.attributes.get(name)
            if said is not None and said != number and not (self.layout == "binned" and name == "max_seq_length"):
                self.problem(f"attribute {name} is {said}, but the rows have {number}")


def _plain(value: Any) -> Any:
    """The value of an attribute as a Python number or text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, (str, int, float)) else str(value)


def counts_of(attributes: Mapping[str, Any]) -> dict[str, int]:
    """The counts a records file tells of itself; those that are missing are left out."""
    names = [field.name for field in dataclasses.fields(RecordCounts)]
    return {name: int(attributes[f"count_{name}"]) for name in names if f"count_{name}" in attributes}


def thin(hashes: draws.Keys, shift: int, most: int) -> tuple[draws.Keys, int]:
    """Sorted ``hashes`` below ``2**64 >> shift``, with ``shift`` raised until there are at most ``most``: the same sample in every file."""
    while len(hashes) > most:
        shift += 1
        hashes = hashes[: np.searchsorted(hashes, np.uint64(0xFFFFFFFFFFFFFFFF >> shift), "right")]
    return hashes, shift


def _sums(values: NDArray) -> NDArray[np.int64]:
    """Sums of the rows of small numbers."""
    return values.sum(axis=1, dtype=np.int32 if values.dtype.itemsize == 1 else np.int64).astype(np.int64)


def _spread(values: NDArray, counts: NDArray[np.int64], width: int) -> NDArray:
    """Rows of ``counts`` values, one after the other, to rows of ``width`` with 0 behind them."""
    table = np.zeros((len(counts), width), values.dtype)
    table[np.arange(width) < counts[:, None]] = values
    return table
