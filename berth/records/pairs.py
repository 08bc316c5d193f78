"""Sentence pairs for next-sentence prediction, all documents and copies in lockstep.

In: :class:`TokenText`. Out: :class:`Instances`: for every training row where its segments A and B lie in the token array,
whether B is random, and the key of its random draws. 30 bytes a row; no token is copied here. They come in blocks and in no order worth
keeping: rows are later sorted by ``Instances.order``, a hash of their keys.

The procedure is BERT's (Devlin et al. 2018): walk a document, take sentences up to the target length, split them at a
random sentence edge into A and B; half the time replace B by sentences of another document and give the unused ones back;
cut the longer side from a random end until the row fits. It runs as numpy steps over *lanes*, one per (document, copy),
each at a token position: step ``n`` makes the ``n``-th chunk of every document that is long enough. Only where chunks begin
and end depends on the step before; everything else is computed afterwards for thousands of rows at once.

Where it is stricter than the public scripts:

* the label is always true: 0 only if B is the text that follows A, 1 only if B is from another document, which exists (a
  shard with one document is refused) and is drawn among the others, never "given up after ten tries";
* a sentence longer than a row is taken in consecutive pieces, the last one together with what follows, so no text is
  dropped before the final cut; a chunk that lies inside one such sentence is split in the middle (cutting at the drawn
  *short* targets as well was tried: a target of 3 tokens shreds a document into rows of 3, mean fill 93 % -> 75 %);
* a chunk of one sentence (the end of a document) has nothing that could follow: its B is random, and it is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from berth.errors import DataError
from berth.records import draws
from berth.records.options import RecordOptions
from berth.records.tokens import TokenText

Ints = NDArray[np.int64]

LANES_PER_BLOCK = 1 << 14  # (document, copy) pairs walked together
INSTANCES_PER_BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Instances:
    """Rows to be written, as places in the token array. All of length N.

    Attributes:
        a_starts, b_starts: int64, first token of A and B.
        a_lengths, b_lengths: uint16, at least 1; together at most ``max_seq_length - 3``. Without next-sentence prediction
            ``b_lengths`` is 0 and ``a_starts``, ``a_lengths`` count a separator between two documents as a token.
        labels: int8, 0 next, 1 random.
        forced: bool, B is random because the document had nothing left to follow.
        keys: uint64, the key of the row's random draws, different for every row.
    """

    a_starts: Ints
    a_lengths: NDArray[np.uint16]
    b_starts: Ints
    b_lengths: NDArray[np.uint16]
    labels: NDArray[np.int8]
    forced: NDArray[np.bool_]
    keys: draws.Keys

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def order(self) -> draws.Keys:
        """uint64: rows are written in ascending order of this hash, which shuffles them."""
        return draws.fold(self.keys, draws.SHUFFLE)

    @property
    def lengths(self) -> Ints:
        """Positions of each row that are not padding, special tokens included."""
        b = self.b_lengths.astype(np.int64)
        return self.a_lengths + b + np.where(b > 0, 3, 2)

    def take(self, rows: NDArray[np.int64] | slice) -> Instances:
        """The instances of ``rows``, in that order."""
        return Instances(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    @staticmethod
    def concatenate(parts: list[Instances]) -> Instances:
        fields = [field.name for field in dataclasses.fields(Instances)]
        return Instances(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


@dataclasses.dataclass(frozen=True)
class _Lanes:
    """The state of every unfinished (document, copy): all arrays of one length.

    ``documents`` numbers; ``positions`` of the next token; ``ends`` of the document in tokens; ``targets`` in tokens;
    ``keys``.
    """

    documents: Ints
    positions: Ints
    ends: Ints
    targets: Ints
    keys: draws.Keys

    def advance(self, positions: Ints) -> _Lanes:
        """The lanes at ``positions``, without those that have reached their end."""
        moved = dataclasses.replace(self, positions=positions)
        left = positions < self.ends
        return moved if left.all() else _Lanes(*(getattr(moved, field.name)[left] for field in dataclasses.fields(moved)))


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """Chunks of lanes, before B is chosen: ``starts`` to ``stops`` in tokens, A ends at ``a_stops``."""

    documents: Ints
    starts: Ints
    a_stops: Ints
    stops: Ints
    targets: Ints
    random: NDArray[np.bool_]
    keys: draws.Keys


def make_instances(text: TokenText, options: RecordOptions, shard: str) -> Instances:
    """All instances of a shard in memory, in the order of their rows; errors as :func:`instance_blocks`."""
    instances = Instances.concatenate(list(instance_blocks(text, options, shard)))
    return instances.take(np.argsort(instances.order, kind="stable"))


def instance_blocks(text: TokenText, options: RecordOptions, shard: str) -> Iterator[Instances]:
    """Make the instances of a shard, some ten thousand at a time.

    Args:
        text: the tokens.
        options: lengths, copies, seed.
        shard: the shard's file name; with the seed it decides every draw.

    Raises :class:`DataError` for a text with a single document (no other document to take a random B from).
    """
    if text.documents < 2:
        raise DataError(
            f"{shard}: only one document with text; a random next sentence must come from another document. Separate "
            "documents by blank lines, or make fewer shards so that each holds at least two"
        )
    shard_key = draws.shard_key(options.random_seed, shard)
    longest = options.max_seq_length - 3
    step = max(1, LANES_PER_BLOCK // options.dupe_factor)
    for first in range(0, text.documents, step):
        lanes = _start_lanes(text, options, shard_key, first, min(first + step, text.documents))
        number, waiting, rows = 0, list[_Chunks](), 0
        while len(lanes.documents):
            chunks, positions = _next_chunks(text, lanes, number, longest)
            waiting.append(chunks)
            rows += len(positions)
            number, lanes = number + 1, lanes.advance(positions)
            if rows >= INSTANCES_PER_BLOCK or not len(lanes.documents):
                yield _choose_b(text, waiting, longest)
                waiting, rows = [], 0


def _start_lanes(text: TokenText, options: RecordOptions, shard_key: draws.Keys, first: int, last: int) -> _Lanes:
    """The lanes of documents ``first`` to ``last - 1``, every copy of them."""
    edges = text.sentence_edges[text.document_edges[first : last + 1]]
    documents = np.tile(np.arange(first, last), options.dupe_factor)
    copies = np.repeat(np.arange(options.dupe_factor), last - first)
    keys = draws.fold(draws.fold(shard_key, documents), copies)
    longest = options.max_seq_length - 3
    short = draws.uniform(keys, draws.SHORT) < options.short_seq_prob
    targets: Ints = np.where(short, 2 + draws.below(keys, draws.SHORT_LENGTH, longest - 1), longest)
    return _Lanes(documents, edges[documents - first], edges[documents - first + 1], targets, keys)


def _take_up_to(text: TokenText, starts: Ints, wanted: Ints, longest: int, document_ends: Ints) -> Ints:
    """Where a segment that begins at ``starts`` ends: the first sentence end that reaches ``wanted``, or the document's.

    If the sentence that reaches it is itself longer than a row (``longest``), it ends inside it, ``longest`` tokens on.
    """
    edges = text.sentence_edges
    last = np.minimum(np.searchsorted(edges, starts + wanted, "left"), text.sentences)
    stops = np.minimum(edges[last], document_ends)
    return np.where(edges[last] - edges[last - 1] > longest, np.minimum(stops, starts + longest), stops)


def _split(text: TokenText, starts: Ints, stops: Ints, keys: draws.Keys, longest: int) -> Ints:
    """Where segment A ends in the chunks ``starts`` to ``stops``: a random sentence edge inside, ``stops`` if there is none.

    A chunk inside one sentence that is longer than a row is split in the middle.
    """
    edges = text.sentence_edges
    first = np.searchsorted(edges, starts, "right")
    inside = np.searchsorted(edges, stops, "left") - first
    chosen = np.minimum(first + draws.below(keys, draws.SPLIT, np.maximum(inside, 1)), text.sentences)
    piece = (edges[first] - edges[first - 1] > longest) & (stops - starts > 1)
    return np.where(inside > 0, edges[chosen], np.where(piece, starts + (stops - starts) // 2, stops))


def _next_chunks(text: TokenText, lanes: _Lanes, number: int, longest: int) -> tuple[_Chunks, Ints]:
    """The next chunk of every lane, and where each lane goes on: behind A if B is random, else behind B."""
    starts, keys = lanes.positions, draws.fold(lanes.keys, number)
    stops = _take_up_to(text, starts, lanes.targets, longest, lanes.ends)
    a_stops = _split(text, starts, stops, keys, longest)
    random = (a_stops == stops) | (draws.uniform(keys, draws.IS_RANDOM) < 0.5)
    return _Chunks(lanes.documents, starts, a_stops, stops, lanes.targets, random, keys), np.where(random, a_stops, stops)


def _choose_b(text: TokenText, parts: list[_Chunks], longest: int) -> Instances:
    """Chunks to instances: B from another document where it is random, both sides cut until the row fits."""
    chunks = _Chunks(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(_Chunks)))
    b_starts, b_lengths = chunks.a_stops.copy(), chunks.stops - chunks.a_stops
    rows = np.flatnonzero(chunks.random)
    room = (chunks.targets - (chunks.a_stops - chunks.starts))[rows]
    starts, stops = _random_segments(text, chunks.documents[rows], chunks.keys[rows], room, longest)
    b_starts[rows], b_lengths[rows] = starts, stops - starts
    return _trim(chunks, b_starts, b_lengths, longest)


def _random_segments(text: TokenText, documents: Ints, keys: draws.Keys, room: Ints, longest: int) -> tuple[Ints, Ints]:
    """Sentences of another document than ``documents``, from a random one on, that fill ``room`` tokens (at least one)."""
    others = draws.below(keys, draws.RANDOM_DOCUMENT, text.documents - 1)
    others += others >= documents
    low, high = text.document_edges[others], text.document_edges[others + 1]
    starts = text.sentence_edges[low + draws.below(keys, draws.RANDOM_START, high - low)]
    return starts, _take_up_to(text, starts, np.maximum(room, 1), longest, text.sentence_edges[high])


def _trim(chunks: _Chunks, b_starts: Ints, b_lengths: Ints, longest: int) -> Instances:
    """Cut A and B to ``longest`` tokens together.

    BERT removes one token at a time from the longer side (B when equal), from its front or back by a coin. In closed
    form: first the longer side down to the shorter one, then both in turn; the number taken from the front is binomial.
    """
    a_lengths = chunks.a_stops - chunks.starts
    excess = np.maximum(a_lengths + b_lengths - longest, 0)
    uneven = np.minimum(excess, np.abs(a_lengths - b_lengths))
    even = excess - uneven
    from_a = np.where(a_lengths > b_lengths, uneven, 0) + even // 2
    from_b = np.where(a_lengths > b_lengths, 0, uneven) + (even + 1) // 2
    return Instances(
        a_starts=chunks.starts + draws.heads(chunks.keys, draws.TRIM_A, from_a),
        a_lengths=(a_lengths - from_a).astype(np.uint16),
        b_starts=b_starts + draws.heads(chunks.keys, draws.TRIM_B, from_b),
        b_lengths=(b_lengths - from_b).astype(np.uint16),
        labels=chunks.random.astype(np.int8),
        forced=chunks.a_stops == chunks.stops,
        keys=chunks.keys,
    )
