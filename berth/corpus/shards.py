"""Sentences to shards of equal size, training and test apart.

In: sentences, one file or a folder of parts (one sentence a line, blank lines between documents). Out, in one folder:
``<prefix>_training_<i>.txt`` and ``<prefix>_test_<i>.txt`` in the same format.

Two passes, so that memory does not grow with the text: the first notes where each document lies and how long it is (32
bytes a document, up to 90 while documents are dealt out), the second copies; both by several processes. Documents stay
whole. The test set is a random choice of documents (by ``seed``) of the asked share of the bytes; then the largest
document goes to the least filled shard, and so on. Every shard gets at least two documents: a random next sentence must
come from another document of the same shard.

The copying is a stage of :mod:`berth.corpus.parts`: finished shards are not written again after an interruption. While it runs,
the set's manifest (:mod:`berth.corpus.shardset`) says incomplete, so a folder in which old and new shards may be mixed is
refused until sharding is run again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import itertools
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from berth.corpus.parts import Span, Task, cut_file, run_stage
from berth.corpus.shardset import shard_prefix, write_manifest
from berth.errors import ConfigError, DataError
from berth.files import fsync_directory, remove_dead_leftovers, sha256_json
from berth.text.lines import invalid_utf8, text_files
from berth.workers import map_processes

MIN_DOCUMENTS = 2  # a shard: fewer, and no random next sentence exists
_COPY_BYTES = 1 << 20
_INDEX_BYTES = 64 << 20  # text indexed by one process at a time
_BLOCK = 1 << 14  # documents that are Python objects at a time


@dataclasses.dataclass(frozen=True)
class ShardCounts:
    """What :func:`make_shards` wrote; sizes are bytes of text per shard, extremes over the training shards."""

    documents: int
    sentences: int
    training_shards: int
    test_shards: int
    training_documents: int
    test_documents: int
    training_bytes: int
    test_bytes: int
    smallest_shard: int
    largest_shard: int
    stale_removed: int
    shards_kept: int


@dataclasses.dataclass(frozen=True)
class DocumentIndex:
    """Where the documents of sentences files lie. All arrays are int64 [documents]; offsets and sizes in bytes.

    ``files`` numbers the file of each document. ``digest`` is of all the bytes that were read.
    """

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    sentences: NDArray[np.int64]
    files: NDArray[np.int64]
    digest: str


def _index_span(numbered: tuple[int, Span]) -> tuple[int, bytes, NDArray[np.int64]]:
    """Locate the documents of one span: its number, the digest of its bytes, int64 [3, documents] (start, size, sentences)."""
    number, span = numbered
    columns = array("q")
    digest = hashlib.sha256()
    offset, start, end, lines = span.start, 0, 0, 0
    with open(span.file, "rb") as handle:
        handle.seek(span.start)
        while offset < span.stop:
            raw = handle.readline()
            if not raw:
                raise DataError(f"{span.file} became shorter while it was being read; run again when nobody writes to it")
            digest.update(raw)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise invalid_utf8(span.file, offset + error.start, raw[error.start]) from None
            if not offset:
                text = text.removeprefix("\ufeff")
            if text.strip():
                if not lines:
                    start = offset + (len(raw) - len(text.encode("utf-8")) if not offset else 0)
                lines += 1
                end = offset + len(raw)
            elif lines:
                columns.extend((start, end - start, lines))
                lines = 0
            offset += len(raw)
    if lines:
        columns.extend((start, end - start, lines))
    return number, digest.digest(), np.frombuffer(columns, np.int64).reshape(-1, 3).T


def index_documents(files: Sequence[Path], processes: int = 1) -> DocumentIndex:
    """Read sentences files once and locate their documents.

    Any number of blank lines (white space only) parts two documents; the end of a file ends its last one. Raises
    :class:`DataError` for bytes that are not UTF-8 (with their offset) and when there is no text.
    """
    spans = [(number, span) for number, file in enumerate(files) for span in cut_file(file, "blank_line", _INDEX_BYTES)]
    found = sorted(map_processes(_index_span, list(enumerate(span for _, span in spans)), processes), key=lambda made: made[0])
    table = np.empty((4, sum(made.shape[1] for _, _, made in found)), np.int64)
    if not table.shape[1]:
        raise DataError(f"{files[0]}: no sentence in {len(files)} file(s): every line is blank")
    begin = 0
    for number, _, made in found:
        end = begin + made.shape[1]
        table[:3, begin:end], table[3, begin:end] = made, spans[number][0]
        begin = end
    digest = hashlib.sha256(b"".join(part for _, part, _ in found)).hexdigest()
    return DocumentIndex(table[0], table[1], table[2], table[3], digest)


def _in_blocks(values: NDArray[np.int64]) -> Iterator[int]:
    """The values as plain numbers, of which only some exist at a time."""
    for begin in range(0, len(values), _BLOCK):
        yield from values[begin : begin + _BLOCK].tolist()


def _choose_test(sizes: NDArray[np.int64], order: NDArray[np.int64], fraction: float, least: int, most: int) -> NDArray[np.bool_]:
    """bool [documents], the test set: in ``order``, those that fit under the share, then small ones up to ``least``."""
    target = fraction * float(sizes.sum())
    chosen = np.zeros(len(sizes), bool)
    count, filled = 0, 0.0
    for document, size in zip(_in_blocks(order), _in_blocks(sizes[order]), strict=True):
        if count >= most or filled >= target:
            break
        if filled + size / 2 <= target:
            chosen[document] = True
            filled += size
            count += 1
    if count < least:
        rest = order[~chosen[order]]
        chosen[rest[np.argsort(sizes[rest], kind="stable")][: least - count]] = True
    return chosen


def _balance(documents: NDArray[np.int64], sizes: NDArray[np.int64], shards: int) -> list[NDArray[np.int64]]:
    """Documents (in a random order) to ``shards`` arrays of about equal bytes and at least two documents each."""
    by_size = documents[np.argsort(-sizes[documents], kind="stable")]
    heap = [(0, shard) for shard in range(shards)]
    owner = np.empty(len(by_size), np.int32)
    for place, size in enumerate(_in_blocks(sizes[by_size])):
        load, shard = heap[0]
        owner[place] = shard
        heapq.heapreplace(heap, (load + size, shard))
    edges = np.cumsum(np.bincount(owner, minlength=shards))[:-1]
    plan = np.split(by_size[np.argsort(owner, kind="stable")], edges)
    for poor in range(shards):
        while len(plan[poor]) < MIN_DOCUMENTS:
            rich = max(range(shards), key=lambda shard: len(plan[shard]))
            plan[poor] = np.append(plan[poor], plan[rich][-1:])  # its smallest, since documents arrived by falling size
            plan[rich] = plan[rich][:-1]
    return [np.sort(shard) for shard in plan]


def plan_shards(
    sizes: NDArray[np.int64], training: int, test: int, fraction_test_set: float, seed: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Decide which documents go to which shard (pure; the same arguments give the same plan).

    Args:
        sizes: int64 [documents], bytes of each.
        training, test: numbers of shards.
        fraction_test_set: share of the bytes for the test shards, 0 <= f < 1; not used with ``test == 0``.
        seed: which documents are chosen for the test set.

    Returns:
        int64 arrays, the document numbers of each training shard and of each test shard, ascending.

    Raises:
        ConfigError: numbers out of range. DataError: fewer than two documents a shard.
    """
    if training < 1 or test < 0:
        raise ConfigError(f"--n_training_shards {training} must be at least 1 and --n_test_shards {test} at least 0")
    if not 0 <= fraction_test_set < 1 or (test > 0 and fraction_test_set == 0):
        raise ConfigError(f"--fraction_test_set {fraction_test_set} must be above 0 and below 1; for no test set use --n_test_shards 0")
    if seed < 0:
        raise ConfigError(f"--seed {seed} must not be negative")
    count = len(sizes)
    if count == 1 and training + test:
        raise DataError(
            "the text is one single document, and each shard needs at least two. Blank lines part documents: put them into the "
            "sentences file, or make it again by data/sentences.py from a folder (one document a file) or with --documents "
            "blank_line"
        )
    if count < MIN_DOCUMENTS * (training + test):
        raise DataError(
            f"{count} documents are too few for {training} training and {test} test shards: each needs at least "
            f"{MIN_DOCUMENTS}, together {MIN_DOCUMENTS * (training + test)}; ask for fewer shards"
        )
    order = np.random.default_rng(seed).permutation(count)
    chosen = np.zeros(count, bool)
    if test:
        chosen = _choose_test(sizes, order, fraction_test_set, MIN_DOCUMENTS * test, count - MIN_DOCUMENTS * training)
    in_test = chosen[order]
    return _balance(order[~in_test], sizes, training), _balance(order[in_test], sizes, test) if test else []


@dataclasses.dataclass(frozen=True)
class _Copier:
    """Writes one shard. Payload: int64 [3, documents]: file number, start, size."""

    files: tuple[Path, ...]

    def __call__(self, payload: NDArray[np.int64], output: IO[str]) -> Mapping[str, int]:
        target: IO[bytes] = output.buffer  # type: ignore[attr-defined]
        between = b""
        edges = [0, *(np.flatnonzero(np.diff(payload[0])) + 1).tolist(), payload.shape[1]]
        for first, last in itertools.pairwise(edges):  # the documents of one file, which is opened once
            with open(self.files[payload[0, first]], "rb") as source:
                for begin in range(first, last, _BLOCK):
                    for start, size in payload[1:, begin : min(begin + _BLOCK, last)].T.tolist():
                        target.write(between)
                        between = b"\n"
                        source.seek(start)
                        _copy_document(source, size, target)
        return {"documents": payload.shape[1]}


def _copy_document(source: IO[bytes], left: int, target: IO[bytes]) -> None:
    """Copy ``left`` bytes; line ends become LF, and there is one at the end."""
    last = b""
    while left:
        piece = source.read(min(left, _COPY_BYTES))
        if not piece:
            raise DataError("the sentences became shorter while they were being sharded; run again when nobody writes to them")
        left -= len(piece)
        last = piece[-1:]
        target.write(piece.replace(b"\r\n", b"\n").replace(b"\r", b" "))
    if last != b"\n":
        target.write(b"\n")


def _sentence_files(source: Path, folder: Path, prefix: str) -> list[Path]:
    """The sentences to shard. Raises :class:`ConfigError` when one of them looks like a shard of this output."""
    if not source.exists():
        raise DataError(f"{source}: no such sentences file or folder; make it with data/sentences.py")
    files = text_files(source)
    for file in files:
        if file.resolve().parent == folder.resolve() and (source.is_dir() or file.name.startswith(prefix + "_")):
            raise ConfigError(f"--input {file} lies among the shards of this output; use another --prefix or --output_dir")
    return files


def make_shards(
    sentences: str | Path,
    output_dir: str | Path,
    prefix: str,
    training: int,
    test: int,
    fraction_test_set: float,
    seed: int,
    processes: int = 1,
) -> ShardCounts:
    """Write the shards of sentences (a file, or a folder of parts) to ``output_dir``. The same arguments give the same bytes.

    Raises:
        ConfigError: numbers or prefix are wrong, or the input is itself a shard name of this run.
        DataError: input missing, not UTF-8, empty, or with too few documents; the folder holds shards of another prefix.
        OSError: the folder cannot be written; the set is then marked incomplete, or was not touched.
    """
    source, folder = Path(sentences), Path(output_dir)
    if not re.fullmatch(r"[^\s/\\.][^/\\\n]*", prefix):
        raise ConfigError(f"--prefix {prefix!r} must be a plain file name without '/' that does not start with a dot")
    files = _sentence_files(source, folder, prefix)
    index = index_documents(files, processes)
    plans = plan_shards(index.sizes, training, test, fraction_test_set, seed)
    if folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if shard_prefix(path.name) not in (None, prefix))
        if others:
            raise DataError(
                f"{folder} holds shards of another prefix ({others[0]}); training would mix them in: use another "
                "--output_dir, or move them away"
            )
    named = {
        f"{prefix}_{split}_{number}.txt": (documents, sha256_json([index.digest, number, split]))
        for split, plan in zip(("training", "test"), plans, strict=True)
        for number, documents in enumerate(plan)
    }
    tasks = (
        Task(name, np.stack([index.files[documents], index.starts[documents], index.sizes[documents]]), digest)
        for name, (documents, digest) in named.items()
    )
    folder.mkdir(parents=True, exist_ok=True)
    remove_dead_leftovers(folder, lambda name: shard_prefix(name) == prefix)
    write_manifest(folder, prefix, None)
    options: dict[str, Any] = {
        "n_training_shards": training, "n_test_shards": test, "fraction_test_set": fraction_test_set, "seed": seed, "prefix": prefix,
    }  # fmt: skip
    stale = [path for path in folder.iterdir() if shard_prefix(path.name) == prefix and path.name not in named]
    made = run_stage("shards", folder, tasks, _Copier(tuple(files)), options, processes, total=len(named))
    for path in stale:
        path.unlink(missing_ok=True)
    fsync_directory(folder)
    sizes = {name: {"bytes": (folder / name).stat().st_size, "documents": len(documents)} for name, (documents, _) in named.items()}
    write_manifest(folder, prefix, sizes)
    written = [size["bytes"] for size in sizes.values()]
    return ShardCounts(
        documents=len(index.sizes),
        sentences=int(index.sentences.sum()),
        training_shards=training,
        test_shards=test,
        training_documents=sum(map(len, plans[0])),
        test_documents=sum(map(len, plans[1])),
        training_bytes=sum(written[:training]),
        test_bytes=sum(written[training:]),
        smallest_shard=min(written[:training]),
        largest_shard=max(written[:training]),
        stale_removed=len(stale),
        shards_kept=made.kept,
    )
