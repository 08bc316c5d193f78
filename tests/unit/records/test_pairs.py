"""Pair generation: labels are true, nothing is lost, lengths hold. Token ids are their own positions here."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from berth.errors import DataError
from berth.records import pairs
from berth.records.options import RecordOptions
from berth.records.pairs import Instances, make_instances
from berth.records.tokens import TokenText


def text_of(documents: list[list[int]]) -> TokenText:
    """A text whose sentences have the given token counts and whose token ``i`` has id ``i``."""
    lengths = [length for document in documents for length in document]
    return TokenText(
        ids=np.arange(sum(lengths), dtype=np.uint32),
        sentence_edges=np.concatenate([[0], np.cumsum(lengths)]),
        document_edges=np.concatenate([[0], np.cumsum([len(document) for document in documents])]),
        empty_sentences=0,
        empty_documents=0,
    )


def document_numbers(text: TokenText, tokens: np.ndarray) -> np.ndarray:
    return np.searchsorted(text.document_tokens, tokens, "right") - 1


def untrimmed(chunks, b_starts, b_lengths, longest):
    forced = chunks.a_stops == chunks.stops
    labels = chunks.random.astype(np.int8)
    return Instances(chunks.starts, chunks.a_stops - chunks.starts, b_starts, b_lengths, labels, forced, chunks.keys)


documents_strategy = st.lists(st.lists(st.one_of(st.integers(1, 8), st.integers(1, 60)), min_size=1, max_size=12), min_size=2, max_size=6)
options_strategy = st.builds(
    RecordOptions,
    max_seq_length=st.integers(5, 40),
    max_predictions_per_seq=st.just(3),
    short_seq_prob=st.sampled_from([0.0, 0.1, 1.0]),
    dupe_factor=st.integers(1, 3),
    random_seed=st.integers(0, 1000),
)


@settings(max_examples=200, deadline=None)
@given(documents=documents_strategy, options=options_strategy)
def test_lengths_and_labels_hold(documents, options):
    text = text_of(documents)
    made = make_instances(text, options, "s.txt")
    a_lengths, b_lengths = made.a_lengths.astype(int), made.b_lengths.astype(int)
    assert a_lengths.min() >= 1 and b_lengths.min() >= 1
    assert (a_lengths + b_lengths).max() <= options.max_seq_length - 3
    a_document, b_document = document_numbers(text, made.a_starts), document_numbers(text, made.b_starts)
    assert (document_numbers(text, made.a_starts + a_lengths - 1) == a_document).all()
    assert (document_numbers(text, made.b_starts + b_lengths - 1) == b_document).all()
    follows = made.labels == 0
    assert (a_document[follows] == b_document[follows]).all()
    assert (made.b_starts >= made.a_starts + a_lengths)[follows].all()
    assert (a_document[~follows] != b_document[~follows]).all()
    assert (made.labels[made.forced] == 1).all()


@settings(max_examples=200, deadline=None)
@given(documents=documents_strategy, options=options_strategy)
def test_no_token_is_lost_before_the_final_cut(documents, options):
    text = text_of(documents)
    with mock.patch.object(pairs, "_trim", untrimmed):
        made = make_instances(text, options, "s.txt")
    covered = np.zeros(len(text.ids), int)
    for row in range(len(made)):
        stop = made.a_starts[row] + made.a_lengths[row]
        if made.labels[row] == 0:
            assert made.b_starts[row] == stop, "an actual next segment begins where A ends"
            stop += made.b_lengths[row]
        covered[made.a_starts[row] : stop] += 1
    assert (covered == options.dupe_factor).all()
    starts_sentence = np.isin(made.b_starts, text.sentence_edges)
    assert starts_sentence[made.labels == 1].all(), "a random segment begins with a sentence"


def reference_trim(a: int, b: int, longest: int) -> tuple[int, int]:
    """BERT's procedure, one token at a time: how many tokens each side loses."""
    cut_a = cut_b = 0
    while a - cut_a + b - cut_b > longest:
        if a - cut_a > b - cut_b:
            cut_a += 1
        else:
            cut_b += 1
    return cut_a, cut_b


def test_trim_equals_the_procedure_it_replaces():
    lengths = np.array([(a, b, longest) for a in range(1, 14) for b in range(1, 14) for longest in (2, 5, 9)])
    keys = np.arange(len(lengths), dtype=np.uint64)
    for longest in (2, 5, 9):
        of = lengths[:, 2] == longest
        a, b = lengths[of, 0], lengths[of, 1]
        starts = np.full(of.sum(), 100)
        nothing = np.zeros(of.sum(), bool)
        made = pairs._trim(pairs._Chunks(starts, starts, starts + a, starts + a, starts, nothing, keys[of]), starts, b, longest)
        wanted = np.array([reference_trim(x, y, longest) for x, y in zip(a, b, strict=True)])
        assert (a - made.a_lengths == wanted[:, 0]).all() and (b - made.b_lengths == wanted[:, 1]).all()
        assert ((made.a_starts >= 100) & (made.a_starts <= 100 + wanted[:, 0])).all()


def test_half_of_the_pairs_are_random_and_other_documents_equally_likely():
    text = text_of([[5] * 400 for _ in range(8)])
    made = make_instances(text, RecordOptions(max_seq_length=64, dupe_factor=20), "s.txt")
    free = ~made.forced
    assert len(made) > 5000
    assert made.labels[free].mean() == pytest.approx(0.5, abs=0.02)
    random = made.labels == 1
    own = document_numbers(text, made.a_starts)[random]
    other = document_numbers(text, made.b_starts)[random]
    shares = np.bincount((other - own) % 8, minlength=8) / random.sum()
    assert shares[0] == 0
    assert shares[1:] == pytest.approx(1 / 7, abs=0.02)


def test_single_sentence_documents_are_random_and_counted():
    made = make_instances(text_of([[4], [7], [3]]), RecordOptions(max_seq_length=32), "s.txt")
    assert len(made) == 15 and made.labels.all() and made.forced.all()


def test_a_sentence_longer_than_a_row_is_cut_into_pieces_that_follow_each_other():
    made = make_instances(text_of([[1000], [1000]]), RecordOptions(max_seq_length=23, short_seq_prob=0, dupe_factor=1), "s.txt")
    assert not made.forced.any()
    follows = made.labels == 0
    assert 0.3 < follows.mean() < 0.7
    assert (made.a_starts + made.a_lengths == made.b_starts)[follows].all()
    assert (made.a_lengths[follows] == 10).mean() > 0.9, "only the rest of a sentence is shorter"


def test_copies_differ_and_shards_differ():
    text = text_of([[6] * 50, [4] * 60])
    options = RecordOptions(max_seq_length=32, dupe_factor=2)
    first, again, other = (make_instances(text, options, name) for name in ("a.txt", "a.txt", "b.txt"))
    assert (first.keys == again.keys).all() and (first.b_starts == again.b_starts).all()
    assert not np.isin(first.keys, other.keys).any()
    assert len(np.unique(first.keys)) == len(first), "every row of every copy has its own draws"


def test_one_document_is_refused():
    with pytest.raises(DataError, match=r"s\.txt: only one document.*another document"):
        make_instances(text_of([[3, 4, 5]]), RecordOptions(), "s.txt")
