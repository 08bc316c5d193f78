"""Rows for masked language modelling alone: the whole text, in order, documents parted by [SEP], every row full but the ends."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.records import chunks
from berth.records.chunks import chunk_blocks, separators
from berth.records.masking import RowMaker
from berth.records.options import RecordOptions
from berth.records.pairs import Instances
from berth.records.tokens import TokenText


def text_of(documents: list[list[int]], first: int) -> TokenText:
    lengths = [length for document in documents for length in document]
    return TokenText(
        (first + np.arange(sum(lengths)) % 1000).astype(np.uint16),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([[0], np.cumsum([len(document) for document in documents])]),
        0,
        0,
    )


documents_strategy = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    documents=documents_strategy, length=st.integers(5, 40), copies=st.integers(1, 4), seed=st.integers(0, 99),
    prob=st.sampled_from([0.15, 0.9]), whole_words=st.booleans(), block=st.sampled_from([1, 3, 1 << 16]),
)  # fmt: skip
def test_rows_are_the_text(vocabulary, documents, length, copies, seed, prob, whole_words, block):
    first = vocabulary.ids["w0"]
    text = text_of(documents, first)
    options = RecordOptions(
        max_seq_length=length, max_predictions_per_seq=length, masked_lm_prob=prob, dupe_factor=copies, random_seed=seed,
        objective="mlm", whole_word_mask=whole_words,
    )  # fmt: skip
    wanted: list[int] = []
    for start, stop in zip(text.document_tokens[:-1], text.document_tokens[1:], strict=True):
        wanted += [*text.ids[start:stop].tolist(), vocabulary.sep_id]
    wanted.pop()
    before, chunks.INSTANCES_PER_BLOCK = chunks.INSTANCES_PER_BLOCK, block
    try:
        made = Instances.concatenate(list(chunk_blocks(text, options, "s.txt")))
    finally:
        chunks.INSTANCES_PER_BLOCK = before
    assert len(np.unique(made.keys)) == len(made) and not made.labels.any() and not made.forced.any() and not made.b_lengths.any()
    rows = RowMaker(vocabulary, options, separators(text)).make(text.ids, made)
    bare = RowMaker(vocabulary, dataclasses.replace(options, masking="none", whole_word_mask=False), separators(text)).make(text.ids, made)
    used = rows.input_mask.sum(axis=1)
    assert (used == made.lengths).all() and (rows.input_mask == (np.arange(length) < used[:, None])).all()
    assert not rows.segment_ids.any() and (bare.input_mask == rows.input_mask).all()
    assert not bare.masked_lm_positions.any() and not bare.masked_lm_ids.any()
    copy, at, room = 0, 0, length - 2
    shifts = []
    for number in range(len(made)):
        ids, size = rows.input_ids[number].copy(), int(used[number])
        chosen = rows.masked_lm_positions[number] > 0
        places = rows.masked_lm_positions[number][chosen]
        assert len(places) <= max(1, round(size * prob)) and (np.diff(places) > 0).all()
        ids[places] = rows.masked_lm_ids[number][chosen]
        assert (ids == bare.input_ids[number]).all()
        assert ids[0] == vocabulary.cls_id and ids[size - 1] == vocabulary.sep_id and not ids[size:].any()
        special = np.isin(ids[places], [vocabulary.cls_id, vocabulary.sep_id, vocabulary.pad_id])
        assert not special.any() and (places < size - 1).all()
        assert ids[1 : size - 1].tolist() == wanted[at : at + size - 2]
        first_row = at == 0
        at += size - 2
        if first_row and copy:
            shifts.append(size - 2)
        else:
            assert size == length or at == len(wanted), "only the last row is shorter"
        if at == len(wanted):
            copy, at = copy + 1, 0
    assert copy == copies and at == 0, "every copy is the whole text"
    assert all(1 <= shift <= room for shift in shifts)


def test_copies_begin_elsewhere(vocabulary):
    text = text_of([[50] * 20], vocabulary.ids["w0"])
    options = RecordOptions(max_seq_length=66, max_predictions_per_seq=9, dupe_factor=8, objective="mlm")
    made = Instances.concatenate(list(chunk_blocks(text, options, "s.txt")))
    ends = {int(length) for start, length in zip(made.a_starts, made.a_lengths, strict=True) if start == 0}
    assert len(ends) > 4
    other = Instances.concatenate(list(chunk_blocks(text, options, "t.txt")))
    assert not np.isin(made.keys, other.keys).any()
