"""Rows: layout, number of masks, 80/10/10 by statistics, whole words, replacements from ordinary pieces only."""

import dataclasses

import numpy as np
import pytest

from berth.records.masking import RowMaker
from berth.records.options import RecordOptions
from berth.records.pairs import make_instances
from berth.records.rows import Rows
from berth.records.tokens import TokenText, tokenize_files
from berth.text.vocabulary import SPECIAL_TOKENS, Vocabulary

SIZE = 2000
PIECES = (*SPECIAL_TOKENS, *(f"[unused{n}]" for n in range(300)), *(f"w{n}" for n in range(1000)), *(f"##c{n}" for n in range(695)))
VOCABULARY = Vocabulary(PIECES, "0" * 64)


def random_text(continuations: float = 0.0) -> TokenText:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 30, 3000)
    count = int(lengths.sum())
    ids = np.where(rng.random(count) < continuations, rng.integers(1305, SIZE, count), rng.integers(305, 1305, count))
    return TokenText(ids.astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)]), np.arange(0, 3001, 30), 0, 0)


def make(options: RecordOptions, text: TokenText) -> tuple[Rows, np.ndarray]:
    """Rows, and their ids before masking."""
    rows = RowMaker(VOCABULARY, options).make(text.ids, make_instances(text, options, "s.txt"))
    original = rows.input_ids.copy()
    row, column = np.nonzero(rows.masked_lm_positions)
    original[row, rows.masked_lm_positions[row, column]] = rows.masked_lm_ids[row, column]
    return rows, original


@pytest.mark.parametrize(("length", "most", "prob"), [(128, 20, 0.15), (64, 4, 0.15), (40, 40, 0.6), (5, 1, 0.15)])
def test_number_of_masks(length, most, prob):
    options = RecordOptions(max_seq_length=length, max_predictions_per_seq=most, masked_lm_prob=prob, dupe_factor=1)
    rows, _ = make(options, random_text())
    used = rows.input_mask.sum(axis=1, dtype=int)
    wanted = [min(most, max(1, round(n * prob)), n - 3) for n in used.tolist()]
    assert np.count_nonzero(rows.masked_lm_positions, axis=1).tolist() == wanted


def test_full_rows_have_19_and_77_masks():
    for length, most, wanted in ((128, 20, 19), (512, 80, 77)):
        options = RecordOptions(max_seq_length=length, max_predictions_per_seq=most)
        assert RowMaker(VOCABULARY, options).mask_counts(np.array([length])).tolist() == [wanted]
        assert options.wanted_predictions == wanted


def test_layout_of_a_row():
    text = random_text()
    options = RecordOptions(max_seq_length=48, max_predictions_per_seq=7)
    block = make_instances(text, options, "s.txt")
    rows, original = make(options, text)
    for row in range(0, len(block), 97):
        one = block.take(slice(row, row + 1))
        a = text.ids[one.a_starts[0] : one.a_starts[0] + one.a_lengths[0]].tolist()
        b = text.ids[one.b_starts[0] : one.b_starts[0] + one.b_lengths[0]].tolist()
        tokens = [2, *a, 3, *b, 3]
        padding = [0] * (48 - len(tokens))
        assert original[row].tolist() == tokens + padding
        assert rows.input_mask[row].tolist() == [1] * len(tokens) + padding
        assert rows.segment_ids[row].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1) + padding


def test_eighty_ten_ten_and_no_special_replacement():
    options = RecordOptions(max_seq_length=128, dupe_factor=8)
    rows, original = make(options, random_text())
    row, column = np.nonzero(rows.masked_lm_positions)
    seen = rows.input_ids[row, rows.masked_lm_positions[row, column]]
    labels = rows.masked_lm_ids[row, column]
    count = len(labels)
    assert count > 40_000
    is_mask, is_kept = seen == VOCABULARY.mask_id, seen == labels
    assert is_mask.mean() == pytest.approx(0.8, abs=4 * (0.16 / count) ** 0.5)
    assert is_kept.mean() == pytest.approx(0.1 + 0.1 / 1695, abs=4 * (0.09 / count) ** 0.5)
    replaced = seen[~is_mask & ~is_kept]
    assert not VOCABULARY.is_special_or_unused[replaced].any()
    assert replaced.min() < 320 and replaced.max() > 1985, "all ordinary pieces can be drawn"
    assert not np.isin(labels, [0, 2, 3, 4]).any(), "a special token was masked"
    untouched = np.ones_like(rows.input_ids, bool)
    untouched[row, rows.masked_lm_positions[row, column]] = False
    assert (rows.input_ids == original)[untouched].all()
    real = rows.input_mask.astype(bool)
    relative = rows.masked_lm_positions[row, column] / real.sum(axis=1)[row]
    assert relative.mean() == pytest.approx(0.5, abs=0.01), "positions are evenly spread"


def words_of(ids: np.ndarray, special: np.ndarray) -> list[list[int]]:
    """Positions of the words of one row, the slow way."""
    words: list[list[int]] = []
    for position, piece in enumerate(ids.tolist()):
        if special[position]:
            words.append([])
        elif VOCABULARY.is_continuation[piece] and words[-1]:
            words[-1].append(position)
        else:
            words.append([position])
    return [word for word in words if word]


@pytest.mark.parametrize("continuations", [0.0, 0.3, 0.8])
def test_whole_words(continuations):
    options = RecordOptions(max_seq_length=64, max_predictions_per_seq=9, dupe_factor=1, whole_word_mask=True)
    rows, original = make(options, random_text(continuations))
    used = rows.input_mask.sum(axis=1, dtype=int)
    limit = np.clip(np.rint(used * 0.15).astype(int), 1, 9)
    counts = np.count_nonzero(rows.masked_lm_positions, axis=1)
    assert (counts <= limit).all()
    if not continuations:
        assert (counts == limit).all()
    for row in range(len(original)):
        special = np.isin(original[row], [0, 2, 3])
        masked = set(rows.masked_lm_positions[row, : counts[row]].tolist())
        words = words_of(original[row], special)
        for word in words:
            assert masked.issuperset(word) or masked.isdisjoint(word)
        left = limit[row] - counts[row]
        assert all(len(word) > left for word in words if masked.isdisjoint(word)), "one more word would have fitted"


def test_rows_do_not_depend_on_the_block():
    text = random_text(0.3)
    for whole in (False, True):
        options = RecordOptions(max_seq_length=64, max_predictions_per_seq=9, whole_word_mask=whole)
        block, maker = make_instances(text, options, "s.txt"), RowMaker(VOCABULARY, options)
        together = maker.make(text.ids, block)
        alone = maker.make(text.ids, block.take(np.array([5, 700, 3])))
        for field in dataclasses.fields(Rows):
            assert (getattr(together, field.name)[[5, 700, 3]] == getattr(alone, field.name)).all()


def test_cased_text_stays_cased(tmp_path):
    pieces = (*SPECIAL_TOKENS, "Árvíztűrő", "Tükörfúrógép", "arvizturo", "tukorfurogep")
    (tmp_path / "t.txt").write_text("Árvíztűrő Tükörfúrógép\n", encoding="utf-8")
    vocabulary = Vocabulary(pieces, "0" * 64)
    assert tokenize_files([tmp_path / "t.txt"], vocabulary, lowercase=False).ids.tolist() == [5, 6]
    assert tokenize_files([tmp_path / "t.txt"], vocabulary, lowercase=True).ids.tolist() == [7, 8]
