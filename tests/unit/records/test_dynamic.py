"""Masks drawn at load: the rules of the static ones, other masks every epoch, the same whoever asks."""

import dataclasses
import zlib

import numpy as np
import pytest

from berth.records.dynamic import DynamicMasker, Masking, restored
from berth.records.reader import FIELDS, SampleStream, open_index
from berth.records.rows import Rows
from berth.text.vocabulary import SPECIAL_TOKENS, Vocabulary
from tests.support import SEQ_LENGTH, write_records

UNUSED = 20
PIECES = (*SPECIAL_TOKENS, *(f"w{n}" for n in range(35)), *(f"##c{n}" for n in range(36)), *(f"[unused{n}]" for n in range(UNUSED)))
# the ids of tests.support.write_records: [CLS] 2, [SEP] 3, [MASK] 4, ordinary ones from 5
VOCABULARY = Vocabulary(PIECES, "0" * 64)


def masker(prob=0.15, most=5, whole=False, seed=1):
    return DynamicMasker(VOCABULARY, Masking(prob, most, whole), seed)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    for number in range(2):
        write_records(folder / f"a_training_{number}.hdf5", 2000, number, vocab_size=76)
    return open_index(folder, "training")


@pytest.fixture(scope="module")
def plain(index):
    """The first epoch as it is stored."""
    return SampleStream(index, 3, 96).rows(0, 4000)


def test_originals_come_back(plain):
    ids = restored(plain)
    assert not (ids == VOCABULARY.mask_id).any() and (plain.input_ids == VOCABULARY.mask_id).any()
    row, column = np.nonzero(plain.masked_lm_positions)
    at = plain.masked_lm_positions[row, column]
    assert np.array_equal(ids[row, at], plain.masked_lm_ids[row, column])
    untouched = np.ones(ids.shape, bool)
    untouched[row, at] = False
    assert np.array_equal(ids[untouched], plain.input_ids[untouched])
    assert (plain.input_ids == VOCABULARY.mask_id).any(), "the rows given are left as they are"


def test_rules_of_the_masks(index, plain):
    rows = SampleStream(index, 3, 96, transform=masker(0.3, 20)).rows(0, 4000)
    ids, chosen = restored(rows), rows.masked_lm_positions > 0
    assert np.array_equal(ids, restored(plain)), "same samples, same originals"
    for field in ("input_mask", "segment_ids", "next_sentence_labels"):
        assert np.array_equal(getattr(rows, field), getattr(plain, field))
    lengths = rows.lengths()
    assert np.array_equal(chosen.sum(1), [min(20, max(1, round(int(n) * 0.3))) for n in lengths])
    assert ((np.diff(rows.masked_lm_positions, axis=1) > 0) | ~chosen[:, 1:]).all(), "ascending"
    labels = rows.masked_lm_ids[chosen]
    assert labels.min() >= 5, "no special token is masked"
    row, column = np.nonzero(chosen)
    seen = rows.input_ids[row, rows.masked_lm_positions[row, column]]
    is_mask, kept = seen == VOCABULARY.mask_id, seen == labels
    count = len(seen)
    assert count > 20_000
    assert is_mask.mean() == pytest.approx(0.8, abs=5 * (0.16 / count) ** 0.5)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / 71, abs=5 * (0.09 / count) ** 0.5)
    replaced = seen[~is_mask & ~kept]
    assert replaced.min() == 5 and replaced.max() == 75, "never a special token nor [unusedN]"


def test_every_epoch_has_other_masks(index):
    stream = SampleStream(index, 3, 96, transform=masker())
    epochs = [stream.rows(4000 * epoch, 4000) for epoch in range(3)]
    masks = []
    for rows in epochs:
        order = np.lexsort(restored(rows).T)
        masks.append(rows.masked_lm_positions[order])
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (masks[one] == masks[other]).all(1).mean() < 0.05
    other_seed = SampleStream(index, 3, 96, transform=masker(seed=2)).rows(0, 4000)
    assert (other_seed.masked_lm_positions == epochs[0].masked_lm_positions).all(1).mean() < 0.05


def test_masks_do_not_depend_on_who_asks(index):
    """Another order of questions, other sizes, a fresh process: the same rows."""
    whole = SampleStream(index, 3, 96, transform=masker()).rows(0, 9000)
    again = SampleStream(index, 3, 96, transform=masker())
    rng = np.random.default_rng(0)
    for first, count in zip(rng.integers(0, 8000, 30), rng.integers(1, 1000, 30), strict=True):
        part = again.rows(int(first), int(count))
        for field in FIELDS:
            assert np.array_equal(getattr(part, field), getattr(whole, field)[first : first + count])


def test_the_masks_are_those_of_earlier_versions(plain):
    """Golden: a run that is resumed with a newer berth goes on with the same masks."""
    rows = masker()(plain.take(slice(0, 500)), np.arange(10_000, 10_500))
    assert zlib.crc32(rows.masked_lm_positions.tobytes() + rows.input_ids.tobytes()) == GOLDEN


GOLDEN = 3200826267


def test_records_without_masks(index, plain):
    bare = dataclasses.replace(
        plain, input_ids=restored(plain), masked_lm_positions=np.zeros((4000, 5), np.int32), masked_lm_ids=np.zeros((4000, 5), np.int32)
    )
    numbers = np.arange(4000)
    one, other = masker()(bare, numbers), masker()(plain, numbers)
    for field in FIELDS:
        assert np.array_equal(getattr(one, field), getattr(other, field))


def test_whole_words(plain):
    rows = masker(0.3, 12, whole=True)(plain, np.arange(4000))
    ids = restored(rows)
    inside = np.zeros(ids.shape, bool)
    row, column = np.nonzero(rows.masked_lm_positions)
    inside[row, rows.masked_lm_positions[row, column]] = True
    continues = VOCABULARY.is_continuation[ids]
    assert inside.any(1).mean() > 0.9
    # a continuation after an ordinary piece is masked exactly if that piece is
    ordinary = (ids > 4) & (rows.input_mask == 1)
    joined = continues[:, 1:] & ordinary[:, :-1] & ordinary[:, 1:]
    assert np.array_equal(inside[:, 1:][joined], inside[:, :-1][joined])


def test_rows_of_any_width():
    for width in (5, 16, 64):
        rows = Rows.zeros(3, width, 2)
        rows.input_ids[:], rows.input_mask[:] = 7, 1
        rows.input_ids[:, 0], rows.input_ids[:, width // 2], rows.input_ids[:, -1] = 2, 3, 3
        masked = masker(0.5, 20)(rows, np.arange(3))
        assert masked.input_ids.shape == (3, width) and np.array_equal(restored(masked), rows.input_ids)
        assert (masked.masked_lm_positions > 0).sum() == 3 * min(20, round(width * 0.5), width - 3)


def test_masks_do_not_depend_on_the_width_of_the_batch():
    """A row of a short bin may be read with longer ones by one process and alone by another."""
    numbers = np.array([694033, 1086388, 1172912, 1294687, 1683145])  # their draws agree in 23 bits, where the last mask is chosen
    rows = Rows.zeros(len(numbers), 64, 9)
    rows.input_mask[:], rows.input_ids[:] = 1, 7
    rows.input_ids[:, 0], rows.input_ids[:, 30], rows.input_ids[:, 63] = 2, 3, 3
    narrow, wide = masker(0.15, 20)(rows, numbers), masker(0.15, 20)(rows.fitted(512, 20), numbers)
    assert np.array_equal(narrow.masked_lm_positions, wide.masked_lm_positions)
    assert np.array_equal(narrow.input_ids, wide.input_ids[:, :64])


def test_a_row_with_nothing_to_mask():
    rows = Rows.zeros(1, SEQ_LENGTH, 5)
    rows.input_ids[0, :3], rows.input_mask[0, :3] = [2, 3, 3], 1
    masked = masker()(rows, np.array([7]))
    assert not masked.masked_lm_positions.any() and np.array_equal(masked.input_ids, rows.input_ids)
