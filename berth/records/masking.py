"""Instances to rows: gather the tokens, choose positions, mask 80/10/10.

In: token ids, :class:`Instances` of one block of rows. Out: :class:`Rows`, the six arrays of the records schema. With
``masking="none"`` no position is chosen: masks are then drawn when the rows are read (:mod:`berth.records.dynamic`).

Of ``len`` real positions, specials included, ``k = min(P, max(1, round(len * prob)))`` are chosen (round half to even, as in
the public scripts), never a special one. A chosen token becomes ``[MASK]`` (80 %), stays (10 %) or becomes a random ordinary
piece (10 %): never a special token and never ``[unusedN]``, which do not occur in text. With whole-word masking words (a
piece and the ``##`` pieces after it) are taken in random order while they fit into ``k``; if not even one fits, the row has no
mask.

Orders are decided by unique integer keys, so the result does not depend on how a library breaks ties.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from berth.records import draws
from berth.records.options import RecordOptions
from berth.records.pairs import Instances
from berth.records.rows import Rows
from berth.text.vocabulary import Vocabulary

_LAST = np.uint32(0xFFFFFFFF)
_MASKED, _KEPT = np.uint64(round(0.8 * 2**32)), np.uint64(round(0.9 * 2**32))  # 80 % [MASK], then 10 % as it was, then 10 % random
NARROW_FILL, NARROW_STEP = 0.8, 64  # blocks with a smaller mean fill are made in arrays of multiples of so many positions


class RowMaker:
    """Makes rows for one vocabulary and one set of options."""

    def __init__(self, vocabulary: Vocabulary, options: RecordOptions, separators: NDArray[np.int64] | None = None) -> None:
        """``separators``: where ``[SEP]`` stands between documents (:func:`berth.records.chunks.separators`), for rows without B."""
        self.vocabulary, self.options, self.separators = vocabulary, options, separators
        self.ordinary = np.flatnonzero(~vocabulary.is_special_or_unused).astype(np.int32)
        self.positions = np.arange(options.max_seq_length, dtype=np.int32)
        self.position_mask = np.uint32((1 << max(1, (options.max_seq_length - 1).bit_length())) - 1)

    def make(self, tokens: NDArray[np.unsignedinteger], block: Instances) -> Rows:
        """Rows of ``block``; ``tokens`` is the flat array its places refer to.

        Short rows are made in narrower arrays: with short documents most of a row is padding, which need not be looked at.
        """
        lengths, most = block.lengths, self.options.max_seq_length
        if lengths.mean() > NARROW_FILL * most:
            return self._make(tokens, block, most)
        full, masked = (len(block), most), (len(block), self.options.max_predictions_per_seq)
        rows = Rows(
            input_ids=np.zeros(full, np.int32),
            input_mask=np.zeros(full, np.int8),
            segment_ids=np.zeros(full, np.int8),
            masked_lm_positions=np.zeros(masked, np.int32),
            masked_lm_ids=np.zeros(masked, np.int32),
            next_sentence_labels=block.labels,
        )
        edges = [*range(NARROW_STEP, most, NARROW_STEP), most]
        width_class = np.searchsorted(edges, lengths)
        for number in np.unique(width_class):
            chosen, width = np.flatnonzero(width_class == number), edges[number]
            made = self._make(tokens, block.take(chosen), width)
            for name in ("input_ids", "input_mask", "segment_ids"):
                getattr(rows, name)[chosen, :width] = getattr(made, name)
            rows.masked_lm_positions[chosen] = made.masked_lm_positions
            rows.masked_lm_ids[chosen] = made.masked_lm_ids
        return rows

    def _make(self, tokens: NDArray[np.unsignedinteger], block: Instances, width: int) -> Rows:
        """Rows of ``width`` positions, which none of ``block`` exceeds."""
        gather = self._gather if self.separators is None else self._gather_chunks
        ids, candidate, segments, mask = gather(tokens, block, width)
        if self.options.masking == "none":
            empty = np.zeros((len(ids), self.options.max_predictions_per_seq), np.int32)
            return Rows(ids, mask, segments, empty, empty, block.labels)
        positions, labels = self.mask(ids, candidate, block.keys)
        return Rows(ids, mask, segments, positions, labels, block.labels)

    def mask(self, ids: NDArray[np.int32], candidate: NDArray[np.bool_], keys: draws.Keys) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Choose positions among ``candidate`` and write what the model sees there into ``ids``.

        Args:
            ids: int32 [N, L], unmasked, 0 is padding; changed in place.
            candidate: bool [N, L], ordinary tokens; every real position that is none is taken for a special token.
            keys: uint64 [N], the key of each row's draws.

        Returns:
            Positions int32 [N, P], ascending, 0 behind the last, and the original ids there, int32 [N, P].
        """
        wanted = np.minimum(self.mask_counts((ids != 0).sum(axis=1, dtype=np.int64)), candidate.sum(axis=1, dtype=np.int64))
        if self.options.whole_word_mask:
            found, chosen = self._choose_words(ids, candidate, wanted, keys)
        else:
            found, chosen = self._choose_pieces(candidate, wanted, keys)
        original = np.where(chosen, np.take_along_axis(ids, found, axis=1), 0)
        self._replace(ids, found, chosen, original, keys)
        most = (len(ids), self.options.max_predictions_per_seq)
        positions, labels = np.zeros(most, np.int32), np.zeros(most, np.int32)
        positions[:, : found.shape[1]], labels[:, : found.shape[1]] = found, original
        return positions, labels

    def mask_counts(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many positions of rows with ``lengths`` real positions are to be masked."""
        counts = np.rint(lengths * self.options.masked_lm_prob).astype(np.int64)
        return np.clip(counts, 1, self.options.max_predictions_per_seq)

    def _gather(
        self, tokens: NDArray[np.unsignedinteger], block: Instances, width: int
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.int8], NDArray[np.int8]]:
        """``[CLS] A [SEP] B [SEP]`` padded: ids, ordinary tokens, segment ids and mask, all [rows, L]."""
        a = block.a_lengths.astype(np.int32)[:, None]
        b = block.b_lengths.astype(np.int32)[:, None]
        position, length = self.positions[:width], a + b + 3
        valid = position < length
        in_b = position > a + 1
        candidate = valid & (position > 0) & (position != a + 1) & (position != length - 1)
        kind = np.int32 if len(tokens) < 1 << 30 else np.int64
        in_a, after = (block.a_starts - 1).astype(kind), (block.b_starts - block.a_lengths - 2).astype(kind)
        source = np.where(in_b, after[:, None], in_a[:, None])
        source += position
        ids = np.take(tokens, source, mode="clip").astype(np.int32)
        ids *= valid
        rows = np.arange(len(ids))
        ids[:, 0] = self.vocabulary.cls_id
        ids[rows, a[:, 0] + 1] = self.vocabulary.sep_id
        ids[rows, length[:, 0] - 1] = self.vocabulary.sep_id
        return ids, candidate, (valid & in_b).view(np.int8), valid.view(np.int8)

    def _gather_chunks(
        self, tokens: NDArray[np.unsignedinteger], block: Instances, width: int
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.int8], NDArray[np.int8]]:
        """``[CLS] A [SEP]`` padded, with ``[SEP]`` between the documents inside A; result as :meth:`_gather`."""
        assert self.separators is not None
        starts, length, position = block.a_starts, block.lengths.astype(np.int32), self.positions[:width]
        first = np.searchsorted(self.separators, starts)
        inside = np.searchsorted(self.separators, starts + block.a_lengths) - first
        row = np.repeat(np.arange(len(starts)), inside)
        which = np.arange(len(row)) - np.repeat(np.cumsum(inside) - inside - first, inside)
        between = np.zeros((len(starts), width), bool)
        between[row, self.separators[which] - starts[row] + 1] = True
        before = np.cumsum(between, axis=1, dtype=np.int32) - between
        source = (starts - first - 1)[:, None] + position - before
        np.clip(source, 0, len(tokens) - 1, out=source)
        valid = position < length[:, None]
        ids = tokens[source].astype(np.int32)
        ids[between] = self.vocabulary.sep_id
        ids *= valid
        ids[:, 0] = self.vocabulary.cls_id
        ids[np.arange(len(ids)), length - 1] = self.vocabulary.sep_id
        candidate = valid & ~between & (position > 0) & (position != length[:, None] - 1)
        return ids, candidate, np.zeros(ids.shape, np.int8), valid.view(np.int8)

    def _ordered_keys(self, keys: draws.Keys, width: int) -> NDArray[np.uint32]:
        """uint32 [N, width]: the draw of every position of each row, its low bits replaced by the position itself (unique)."""
        drawn = draws.fold_short(draws.fold(keys, draws.MASK_ORDER), self.positions[:width])
        drawn &= ~self.position_mask
        drawn |= self.positions[:width].astype(np.uint32)
        return drawn

    def _choose_pieces(
        self, candidate: NDArray[np.bool_], wanted: NDArray[np.int64], keys: draws.Keys
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The ``wanted`` candidates of each row with the smallest draws: positions [rows, most wanted] ascending, 0 where unused."""
        most = int(wanted.max(initial=0))
        order = np.where(candidate, self._ordered_keys(keys, candidate.shape[1]), _LAST)
        if 0 < most < order.shape[1]:
            order = np.partition(order, most - 1, axis=1)
        order = order[:, :most]
        order.sort(axis=1)
        chosen = np.arange(most) < wanted[:, None]
        return _ascending((order & self.position_mask).astype(np.int64), chosen, candidate.shape[1])

    def _choose_words(
        self, ids: NDArray[np.int32], candidate: NDArray[np.bool_], wanted: NDArray[np.int64], keys: draws.Keys
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Whole words in random order while they fit into ``wanted``; result as :meth:`_choose_pieces`."""
        position, width = self.positions[: candidate.shape[1]], candidate.shape[1]
        after_candidate = np.zeros_like(candidate)
        after_candidate[:, 1:] = candidate[:, :-1]
        starts = candidate & ~(after_candidate & self.vocabulary.is_continuation[ids])
        edge = starts | ~candidate
        word_start = np.maximum.accumulate(np.where(edge, position, 0), axis=1)
        # Words by their draw: only the first piece of a word takes part, the others follow it.
        order = np.where(starts, self._ordered_keys(keys, width), _LAST)
        by_draw = np.argsort(order, axis=1)
        lengths = np.take_along_axis(np.where(starts, self._next_edge(edge) - position, 0), by_draw, axis=1)
        accepted = np.zeros_like(candidate)
        left = wanted.copy()
        for column in range(int(starts.sum(axis=1).max(initial=0))):
            fits = (lengths[:, column] > 0) & (lengths[:, column] <= left)
            left -= np.where(fits, lengths[:, column], 0)
            accepted[:, column] = fits
            if not left.any():
                break
        accepted_starts = np.zeros_like(candidate)
        np.put_along_axis(accepted_starts, by_draw, accepted, axis=1)
        chosen = np.take_along_axis(accepted_starts, word_start, axis=1)
        places = np.where(chosen, position, width).astype(np.int64)
        places.sort(axis=1)
        places = places[:, : int(wanted.max(initial=0))]
        chosen = places < width
        return np.where(chosen, places, 0), chosen

    def _next_edge(self, edge: NDArray[np.bool_]) -> NDArray[np.int32]:
        """int32 [rows, width]: the first edge after each position, the width if there is none."""
        length = np.int32(edge.shape[1])
        following = np.full(edge.shape, length, np.int32)
        following[:, :-1] = np.where(edge, self.positions[: edge.shape[1]], length)[:, 1:]
        return np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1]

    def _replace(
        self,
        ids: NDArray[np.int32],
        positions: NDArray[np.int64],
        chosen: NDArray[np.bool_],
        labels: NDArray[np.int32],
        keys: draws.Keys,
    ) -> None:
        """Write what the model sees at the chosen positions into ``ids``."""
        drawn = draws.fold(draws.fold(keys, draws.MASK_CHOICE)[:, None], positions)
        kind = drawn >> np.uint64(32)  # the upper half decides what happens, the lower half which piece
        random = self.ordinary[((drawn & np.uint64(0xFFFFFFFF)) * np.uint64(len(self.ordinary)) >> np.uint64(32)).astype(np.int64)]
        seen = np.where(kind < _MASKED, np.int32(self.vocabulary.mask_id), np.where(kind < _KEPT, labels, random))
        row, column = np.nonzero(chosen)
        ids[row, positions[row, column]] = seen[row, column]


def _ascending(positions: NDArray[np.int64], chosen: NDArray[np.bool_], width: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Chosen positions first and ascending, 0 behind them."""
    positions = np.where(chosen, positions, width)
    positions.sort(axis=1)
    chosen = positions < width
    return np.where(chosen, positions, 0), chosen
