"""Rows for masked language modelling alone: consecutive chunks of the whole text, as Hugging Face's scripts make them.

In: :class:`TokenText`. Out: :class:`Instances` with an A and no B. The documents of a shard stand one after the other with a
``[SEP]`` between two, and every row takes the next ``max_seq_length - 2`` tokens of that, whatever document they belong to: no
document is truncated, no token is dropped (the last row is shorter), and every row but the last is full. Copy 0 begins at the
first token; every further copy begins with a chunk of random length, so that other neighbours share a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from berth.records import draws
from berth.records.options import RecordOptions
from berth.records.pairs import INSTANCES_PER_BLOCK, Instances, Ints
from berth.records.tokens import TokenText


def separators(text: TokenText) -> Ints:
    """Where a ``[SEP]`` stands in the text: ascending places, counting tokens and separators (int64 [D - 1])."""
    return text.document_tokens[1:-1] + np.arange(text.documents - 1)


def chunk_blocks(text: TokenText, options: RecordOptions, shard: str) -> Iterator[Instances]:
    """The rows of a shard, some ten thousand at a time; ``a_starts`` and ``a_lengths`` count separators as tokens."""
    shard_key = draws.shard_key(options.random_seed, shard)
    room = options.max_seq_length - 2
    total = text.tokens + text.documents - 1
    for copy in range(options.dupe_factor):
        key = draws.fold(shard_key, copy)
        shift = int(draws.below(key, draws.SPLIT, room)[0]) if copy else 0
        count = -(-(total - shift) // room) + (shift > 0)
        for first in range(0, count, INSTANCES_PER_BLOCK):
            number = np.arange(first, min(first + INSTANCES_PER_BLOCK, count))
            starts = np.maximum(number * room - ((room - shift) if shift else 0), 0)
            stops = np.minimum((number + 1) * room - ((room - shift) if shift else 0), total)
            none = np.zeros(len(number), np.int64)
            yield Instances(
                a_starts=starts,
                a_lengths=(stops - starts).astype(np.uint16),
                b_starts=none,
                b_lengths=none.astype(np.uint16),
                labels=none.astype(np.int8),
                forced=none.astype(bool),
                keys=draws.fold(key, number),
            )
