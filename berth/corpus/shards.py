"""Sentences to shards of equal size, training and test apart.

In: a sentences file (one sentence a line, blank lines between documents). Out, in one folder: ``<prefix>_training_<i>.txt``
and ``<prefix>_test_<i>.txt`` in the same format.

Two passes, so that memory does not grow with the text: the first notes where each document lies and how long it is (28
bytes a document), the second copies. Documents stay whole. The test set is a random choice of documents (by ``seed``) of
the asked share of the bytes; then the largest document goes to the least filled shard, and so on. Every shard gets at
least two documents: a random next sentence must come from another document of the same shard.

All shards appear together: they are written under temporary names and synced; only then the manifest
(:mod:`berth.corpus.shardset`) is marked incomplete, shards of an earlier run are removed, the new ones renamed and the
manifest completed. A run killed in between leaves a folder that is refused until sharding is run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import os
import re
from array import array
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from berth.corpus.shardset import shard_prefix, write_manifest
from berth.errors import ConfigError, DataError
from berth.files import atomic_path, fsync_directory, remove_dead_leftovers
from berth.text.lines import invalid_utf8

MIN_DOCUMENTS = 2  # a shard: fewer, and no random next sentence exists
_COPY_BYTES = 1 << 20


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


@dataclasses.dataclass(frozen=True)
class DocumentIndex:
    """Where the documents of a sentences file lie. All arrays are int64 [documents]; offsets and sizes in bytes."""

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    sentences: NDArray[np.int64]


def index_documents(path: Path) -> DocumentIndex:
    """Read a sentences file once and locate its documents.

    Any number of blank lines (white space only) parts two documents; the last needs none after it. Raises
    :class:`DataError` for a missing file, bytes that are not UTF-8 (with their offset) and a file without text.
    """
    starts, sizes, sentences = array("q"), array("q"), array("q")
    offset = start = end = lines = 0
    if not path.is_file():
        raise DataError(f"{path}: no such sentences file; make it with data/sentences.py")
    with open(path, "rb") as handle:
        for raw in handle:
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise invalid_utf8(path, offset + error.start, raw[error.start]) from None
            if not offset:
                text = text.removeprefix("\ufeff")
            if text.strip():
                if not lines:
                    start = offset + (len(raw) - len(text.encode("utf-8")) if not offset else 0)
                lines += 1
                end = offset + len(raw)
            elif lines:
                starts.append(start)
                sizes.append(end - start)
                sentences.append(lines)
                lines = 0
            offset += len(raw)
    if lines:
        starts.append(start)
        sizes.append(end - start)
        sentences.append(lines)
    if not starts:
        raise DataError(f"{path}: no sentence in it (every line is blank)")
    return DocumentIndex(*(np.frombuffer(column, np.int64) for column in (starts, sizes, sentences)))


def _choose_test(sizes: NDArray[np.int64], order: NDArray[np.int64], fraction: float, least: int, most: int) -> list[int]:
    """Documents of the test set: in ``order``, those that fit under the share, then small ones up to ``least``."""
    target = fraction * float(sizes.sum())
    chosen: list[int] = []
    filled = 0.0
    for document in order.tolist():
        if len(chosen) >= most or filled >= target:
            break
        if filled + sizes[document] / 2 <= target:
            chosen.append(document)
            filled += float(sizes[document])
    if len(chosen) < least:
        taken = set(chosen)
        rest = [document for document in order.tolist() if document not in taken]
        rest.sort(key=lambda document: int(sizes[document]))
        chosen += rest[: least - len(chosen)]
    return chosen


def _balance(documents: list[int], sizes: NDArray[np.int64], shards: int) -> list[list[int]]:
    """Documents (in a random order) to ``shards`` lists of about equal bytes and at least two documents each."""
    by_size = sorted(documents, key=lambda document: -int(sizes[document]))
    heap = [(0, shard) for shard in range(shards)]
    plan: list[list[int]] = [[] for _ in range(shards)]
    for document in by_size:
        load, shard = heapq.heappop(heap)
        plan[shard].append(document)
        heapq.heappush(heap, (load + int(sizes[document]), shard))
    for poor in plan:
        while len(poor) < MIN_DOCUMENTS:
            rich = max(plan, key=len)
            poor.append(rich.pop())  # its smallest, since documents arrived by falling size
    return [sorted(shard) for shard in plan]


def plan_shards(
    sizes: NDArray[np.int64], training: int, test: int, fraction_test_set: float, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Decide which documents go to which shard (pure; the same arguments give the same plan).

    Args:
        sizes: int64 [documents], bytes of each.
        training, test: numbers of shards.
        fraction_test_set: share of the bytes for the test shards, 0 <= f < 1; not used with ``test == 0``.
        seed: which documents are chosen for the test set.

    Returns:
        Document numbers of each training shard and of each test shard, ascending.

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
    chosen: list[int] = []
    if test:
        chosen = _choose_test(sizes, order, fraction_test_set, MIN_DOCUMENTS * test, count - MIN_DOCUMENTS * training)
    taken = set(chosen)
    rest = [document for document in order.tolist() if document not in taken]
    return _balance(rest, sizes, training), _balance(chosen, sizes, test) if test else []


def _copy_shard(source: IO[bytes], target: IO[bytes], index: DocumentIndex, documents: list[int]) -> int:
    """Copy ``documents`` to one shard; line ends become LF. Returns the bytes written."""
    written = 0
    for number, document in enumerate(documents):
        if number:
            written += target.write(b"\n")
        source.seek(int(index.starts[document]))
        left = int(index.sizes[document])
        last = b""
        while left:
            piece = source.read(min(left, _COPY_BYTES))
            if not piece:
                raise DataError("the sentences file became shorter while it was being sharded; run again")
            left -= len(piece)
            last = piece[-1:]
            written += target.write(piece.replace(b"\r\n", b"\n").replace(b"\r", b" "))
        if last != b"\n":
            written += target.write(b"\n")
    return written


def _remove_stale(folder: Path, prefix: str, keep: set[str]) -> int:
    """Delete shards of ``prefix`` in ``folder`` that are not in ``keep``; returns how many."""
    stale = [path for path in folder.iterdir() if shard_prefix(path.name) == prefix and path.name not in keep]
    for path in stale:
        path.unlink()
    if stale:
        fsync_directory(folder)
    return len(stale)


def make_shards(
    sentences: str | Path,
    output_dir: str | Path,
    prefix: str,
    training: int,
    test: int,
    fraction_test_set: float,
    seed: int,
) -> ShardCounts:
    """Write the shards of a sentences file to ``output_dir`` (see the module). The same arguments give the same bytes.

    Raises:
        ConfigError: numbers or prefix are wrong, or the input is itself a shard name of this run.
        DataError: input missing, not UTF-8, empty, or with too few documents; the folder holds shards of another prefix.
        OSError: the folder cannot be written; the shards then are what they were before.
    """
    source, folder = Path(sentences), Path(output_dir)
    if not re.fullmatch(r"[^\s/\\.][^/\\\n]*", prefix):
        raise ConfigError(f"--prefix {prefix!r} must be a plain file name without '/' that does not start with a dot")
    index = index_documents(source)
    plans = plan_shards(index.sizes, training, test, fraction_test_set, seed)
    named = [
        (f"{prefix}_{split}_{number}.txt", documents)
        for split, plan in zip(("training", "test"), plans, strict=True)
        for number, documents in enumerate(plan)
    ]
    names = {name for name, _ in named}
    if source.resolve().parent == folder.resolve() and source.name.startswith(prefix + "_"):
        raise ConfigError(f"--input {source} looks like a shard of this output; use another --prefix or --output_dir")
    if folder.is_dir():
        others = sorted(path.name for path in folder.iterdir() if shard_prefix(path.name) not in (None, prefix))
        if others:
            raise DataError(
                f"{folder} holds shards of another prefix ({others[0]}); training would mix them in: use another "
                "--output_dir, or move them away"
            )
    remove_dead_leftovers(folder, lambda name: shard_prefix(name) == prefix)
    written: list[int] = []
    with contextlib.ExitStack() as renames, open(source, "rb") as handle:
        for name, documents in named:
            temporary = renames.enter_context(atomic_path(folder / name))
            with open(temporary, "wb") as target:
                written.append(_copy_shard(handle, target, index, documents))
                target.flush()
                os.fsync(target.fileno())
        write_manifest(folder, prefix, None)
        stale = _remove_stale(folder, prefix, names)
    sizes = {name: {"bytes": size, "documents": len(documents)} for (name, documents), size in zip(named, written, strict=True)}
    write_manifest(folder, prefix, sizes)
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
        stale_removed=stale,
    )
