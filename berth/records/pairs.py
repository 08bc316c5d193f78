"""Sentence pairs for next-sentence prediction, all documents and copies in lockstep.

In: :class:`TokenText`. Out: :class:`Instances`: for every training row where its segments A and B lie in the token array,
whether B is random, and the key of its random draws. 29 bytes a row; no token is copied here.

The procedure is BERT's (Devlin et al. 2018): walk a document, take sentences up to the target length, split them at a
random sentence edge into A and B; half the time replace B by sentences of another document and give the unused ones back;
cut the longer side from a random end until the row fits. It runs as numpy steps over *lanes*, one per (document, copy),
each at a token position: step ``n`` makes the ``n``-th chunk of every document that is long enough.

Where it is stricter than the public scripts:

* the label is always true: 0 only if B is the text that follows A, 1 only if B is from another document, which exists (a
  shard with one document is refused) and is drawn among the others, never "given up after ten tries";
* a sentence longer than the target is taken in consecutive pieces, the last chunk of it shared with what follows, so
  no text is dropped before the final cut and such chunks still have two segments (split in the middle);
* a chunk of one sentence (the end of a document) has nothing that could follow: its B is random, and it is counted.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from berth.errors import DataError
from berth.records import draws
from berth.records.options import RecordOptions
from berth.records.tokens import TokenText

Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Instances:
    """Rows to be written, as places in the token array. All of length N.

    Attributes:
        a_starts, b_starts: int64, first token of A and B.
        a_lengths, b_lengths: uint16, at least 1; together at most ``max_seq_length - 3``.
        labels: int8, 0 next, 1 random.
        forced: bool, B is random because the document had nothing left to follow.
        keys: uint64, the key of the row's random draws.
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
        """Move to ``positions`` and drop the lanes that reached the end of their document."""
        left = positions < self.ends
        return _Lanes(self.documents[left], positions[left], self.ends[left], self.targets[left], self.keys[left])


def make_instances(text: TokenText, options: RecordOptions, shard: str) -> Instances:
    """All instances of a shard, shuffled by its key.

    Args:
        text: the tokenised shard, two documents or more.
        options: lengths, probabilities, copies, seed.
        shard: the shard's file name; with the seed it decides every draw.

    Raises:
        DataError: the shard has one document only.
    """
    if len(text.document_ends) < 2:
        raise DataError(
            f"{shard}: only one document with text; a random next sentence must come from another document. Separate "
            "documents by blank lines, or make fewer shards so that each holds at least two"
        )
    shard_key = draws.shard_key(options.random_seed, shard)
    lanes = _start_lanes(text, options, shard_key)
    chunks: list[Instances] = []
    while len(lanes.documents):
        made, positions = _make_chunk(text, options, lanes, len(chunks))
        chunks.append(made)
        lanes = lanes.advance(positions)
    instances = Instances.concatenate(chunks)
    chunks.clear()
    return instances.take(draws.permutation(shard_key, len(instances)))


def _document_tokens(text: TokenText) -> Ints:
    """int64 [D + 1]: edges of the documents in tokens."""
    return np.concatenate([[0], text.sentence_ends[text.document_ends - 1]])


def _start_lanes(text: TokenText, options: RecordOptions, shard_key: draws.Keys) -> _Lanes:
    edges = _document_tokens(text)
    count = len(text.document_ends)
    documents = np.tile(np.arange(count), options.dupe_factor)
    copies = np.repeat(np.arange(options.dupe_factor), count)
    keys = draws.fold(draws.fold(shard_key, documents), copies)
    longest = options.max_seq_length - 3
    short = draws.uniform(keys, draws.SHORT) < options.short_seq_prob
    targets = np.where(short, 2 + draws.below(keys, draws.SHORT_LENGTH, longest - 1), longest)
    return _Lanes(documents, edges[documents], edges[documents + 1], targets, keys)


def _take_up_to(ends: Ints, starts: Ints, targets: Ints, document_ends: Ints) -> Ints:
    """Where a chunk that begins at ``starts`` ends: the first sentence end that reaches the target, or the document's.

    If the sentence that reaches it is itself longer than the target, the chunk ends inside it, exactly at the target.
    """
    last = np.searchsorted(ends, starts + targets, "left")
    last = np.minimum(last, len(ends) - 1)
    stop = np.minimum(ends[last], document_ends)
    length = ends[last] - np.where(last > 0, ends[last - 1], 0)
    return np.where(length > targets, np.minimum(stop, starts + targets), stop)


def _make_chunk(text: TokenText, options: RecordOptions, lanes: _Lanes, number: int) -> tuple[Instances, Ints]:
    """The next chunk of every lane as an instance, and where each lane goes on."""
    ends, starts = text.sentence_ends, lanes.positions
    keys = draws.fold(lanes.keys, number)
    stops = _take_up_to(ends, starts, lanes.targets, lanes.ends)
    # Sentence edges strictly inside the chunk are where A may end.
    first_edge = np.searchsorted(ends, starts, "right")
    edges = np.searchsorted(ends, stops, "left") - first_edge
    chosen = first_edge + draws.below(keys, draws.SPLIT, np.maximum(edges, 1))
    inside_sentence = (edges == 0) & (stops - starts == lanes.targets) & (stops < ends[np.minimum(first_edge, len(ends) - 1)])
    a_stops = np.where(edges > 0, ends[np.minimum(chosen, len(ends) - 1)], stops)
    a_stops = np.where(inside_sentence, starts + (stops - starts) // 2, a_stops)
    forced = a_stops == stops
    random = forced | (draws.uniform(keys, draws.IS_RANDOM) < 0.5)
    b_starts, b_stops = _random_segments(text, lanes, keys, lanes.targets - (a_stops - starts))
    made = _trim(
        keys,
        options.max_seq_length - 3,
        (starts, a_stops - starts),
        (np.where(random, b_starts, a_stops), np.where(random, b_stops - b_starts, stops - a_stops)),
        random,
        forced,
    )
    return made, np.where(random, a_stops, stops)


def _random_segments(text: TokenText, lanes: _Lanes, keys: draws.Keys, room: Ints) -> tuple[Ints, Ints]:
    """For every lane sentences of another document, from a random one on, that fill ``room`` tokens (at least one)."""
    count = len(text.document_ends)
    others = draws.below(keys, draws.RANDOM_DOCUMENT, count - 1)
    others += others >= lanes.documents
    sentence_edges = np.concatenate([[0], text.document_ends])
    token_edges = _document_tokens(text)
    low, high = sentence_edges[others], sentence_edges[others + 1]
    sentence = low + draws.below(keys, draws.RANDOM_START, high - low)
    starts = np.where(sentence > 0, text.sentence_ends[sentence - 1], 0)
    return starts, _take_up_to(text.sentence_ends, starts, np.maximum(room, 1), token_edges[others + 1])


def _trim(
    keys: draws.Keys,
    longest: int,
    a: tuple[Ints, Ints],
    b: tuple[Ints, Ints],
    random: NDArray[np.bool_],
    forced: NDArray[np.bool_],
) -> Instances:
    """Cut A and B (starts, lengths) to ``longest`` tokens together.

    BERT removes one token at a time from the longer side (B when equal), from its front or back by a coin. In closed
    form: first the longer side down to the shorter one, then both in turn; the number taken from the front is binomial.
    """
    (a_starts, a_lengths), (b_starts, b_lengths) = a, b
    excess = np.maximum(a_lengths + b_lengths - longest, 0)
    uneven = np.minimum(excess, np.abs(a_lengths - b_lengths))
    even = excess - uneven
    from_a = np.where(a_lengths > b_lengths, uneven, 0) + even // 2
    from_b = np.where(a_lengths > b_lengths, 0, uneven) + (even + 1) // 2
    return Instances(
        a_starts=a_starts + draws.heads(keys, draws.TRIM_A, from_a),
        a_lengths=(a_lengths - from_a).astype(np.uint16),
        b_starts=b_starts + draws.heads(keys, draws.TRIM_B, from_b),
        b_lengths=(b_lengths - from_b).astype(np.uint16),
        labels=random.astype(np.int8),
        forced=forced,
        keys=keys,
    )
