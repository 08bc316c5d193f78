"""Cutting the stream into micro-batches: labels, padding, and the same samples however it is cut."""

import dataclasses
import itertools
import zlib

import numpy as np
import pytest
import torch

from berth.errors import DataError
from berth.records.reader import SampleStream, open_index
from berth.training.batches import GRANULES, BatchPlan, combined_crc, step_batches, to_micro_batch, to_packed
from tests.support import SEQ_LENGTH, VOCAB_SIZE, make_project, write_records
from tests.unit.records.test_layouts import arrays, bins, pack


@pytest.fixture
def stream(tmp_path):
    return SampleStream(open_index(make_project(tmp_path) / "records", "training"), 3, VOCAB_SIZE)


def test_labels_stand_at_their_positions(stream):
    rows = stream.rows(0, 12)
    batch = to_micro_batch(rows)
    width = batch.input_ids.shape[1]
    assert width % 8 == 0 and width >= rows.input_mask.sum(1).max() > width - 8
    for row in range(12):
        expected = {int(p): int(i) for p, i in zip(rows.masked_lm_positions[row], rows.masked_lm_ids[row], strict=True) if p}
        found = {p: int(batch.labels[row, p]) for p in range(width) if batch.labels[row, p] != -100}
        assert found == expected
    assert batch.masked_index.tolist() == np.flatnonzero(batch.labels.numpy() != -100).tolist()
    assert np.array_equal(batch.attention_mask.numpy(), rows.input_mask[:, :width] == 1)
    assert np.array_equal(batch.input_ids.numpy(), rows.input_ids[:, :width])


def test_positions_after_the_first_zero_are_padding(stream):
    rows = stream.rows(0, 1)
    rows.masked_lm_positions[0] = [3, 0, 5, 0, 0]
    rows.masked_lm_ids[0] = [9, 9, 9, 9, 9]
    assert to_micro_batch(rows).masked_index.tolist() == [3]


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 24, 1), (1, 4, 6), (2, 6, 2), (4, 3, 2), (3, 8, 1)])
def test_every_cut_takes_the_same_samples(stream, world, micro, accumulation):
    plans = [BatchPlan(24, micro, accumulation, rank, world) for rank in range(world)]
    for first in (0, 24, 150):  # the last crosses the end of the epoch
        steps = [plan.build(stream, first) for plan in plans]
        taken = [tuple(row) for step in steps for batch in step.micro_batches for row in _padded(batch)]
        wanted = [tuple(row) for row in stream.rows(first, 24).input_ids]
        assert sorted(taken) == sorted(wanted)
        assert sum(step.masked for step in steps) == int((stream.rows(first, 24).masked_lm_positions > 0).sum())
        lengths = stream.rows(first, 24).input_mask.sum(axis=1, dtype=np.int64)
        assert sum(step.tokens for step in steps) == int(lengths.sum())
        assert sum(step.squares for step in steps) == sum(int(length) ** 2 for length in lengths)
        assert combined_crc([step.checksum for step in steps], steps[0].bytes) == zlib.crc32(np.array(wanted, np.int32).tobytes())
        assert all(len(step.micro_batches) == accumulation for step in steps)


def _padded(batch):
    rows = batch.input_ids.numpy()
    return np.pad(rows, ((0, 0), (0, 32 - rows.shape[1])))


def test_grouping_by_length_saves_padding(stream):
    grouped = BatchPlan(48, 8, 6, 0, 1).build(stream, 0)
    plain = BatchPlan(48, 8, 6, 0, 1, group_by_length=False).build(stream, 0)
    cells = [sum(batch.input_ids.numel() for batch in step.micro_batches) for step in (grouped, plain)]
    assert cells[0] < cells[1] and grouped.checksum == plain.checksum and grouped.tokens == plain.tokens


@pytest.mark.parametrize("prefetch", [0, 2])
def test_prefetching_changes_nothing(stream, prefetch):
    plan = BatchPlan(16, 8, 2, 0, 1)
    batches = step_batches(stream, plan, 32, prefetch)
    got = list(itertools.islice(batches, 4))
    batches.close()
    assert [batch.first_sample for batch in got] == [32, 48, 64, 80]
    assert [batch.checksum for batch in got] == [plan.build(stream, at).checksum for at in (32, 48, 64, 80)]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_the_reader_reach_the_caller(tmp_path, prefetch):
    index = open_index(make_project(tmp_path) / "records", "training")
    batches = step_batches(SampleStream(index, 1, vocab_size=10), BatchPlan(4, 4, 1, 0, 1), 0, prefetch)
    with pytest.raises(DataError, match="vocabulary has 10"):
        next(batches)


def test_tensors_are_small_until_they_are_on_the_device(stream):
    batch = to_micro_batch(stream.rows(0, 12))
    names = ("input_ids", "token_type_ids", "labels", "next_sentence_label")
    assert [getattr(batch, name).dtype for name in names] == [torch.int32, torch.int8, torch.int32, torch.int8]
    moved = batch.to(torch.device("cpu"))
    assert all(getattr(moved, name).dtype is torch.int64 for name in (*names, "masked_index"))
    assert moved.attention_mask.dtype is torch.bool and torch.equal(moved.labels, batch.labels.long())


def test_positions_in_any_order(stream):
    rows = stream.rows(0, 2)
    rows.masked_lm_positions[:, :3], rows.masked_lm_positions[:, 3:] = [9, 4, 6], 0
    rows.masked_lm_ids[:, :3] = [11, 12, 13]
    batch = to_micro_batch(rows)
    width = batch.input_ids.shape[1]
    assert batch.masked_index.tolist() == [4, 6, 9, width + 4, width + 6, width + 9]
    assert batch.labels.flatten()[batch.masked_index].tolist() == [12, 13, 11] * 2


def test_rows_of_one_bin_are_trimmed_to_it(stream):
    rows = stream.rows(0, 6).fitted(64, 5)
    short = rows.take(np.flatnonzero(rows.lengths() <= rows.lengths().min()))
    assert to_micro_batch(short).input_ids.shape[1] < 40


def test_a_masked_position_in_the_padding_is_refused(stream):
    """Its label would stand in the next row."""
    rows = stream.rows(0, 4)
    short = rows.take(np.argsort(rows.lengths())[:2])
    assert short.lengths().max() <= SEQ_LENGTH - 8
    short.masked_lm_positions[0, 0] = SEQ_LENGTH - 1
    with pytest.raises(DataError, match="masked position lies behind"):
        to_micro_batch(short)


def _sequences(batch) -> list[tuple]:
    """(ids, types, labels, pair label) of every sequence of a packed micro-batch that is no filler."""
    bounds = batch.cu_seqlens.tolist()
    found = []
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        if batch.next_sentence_label[number] != -100:
            assert batch.position_ids[start:end].tolist() == list(range(end - start))
            parts = (batch.input_ids, batch.token_type_ids, batch.labels)
            found.append((*(tuple(part[start:end].tolist()) for part in parts), int(batch.next_sentence_label[number])))
    return found


def _sequences_of(rows) -> list[tuple]:
    """The same from rows, one by one."""
    found = []
    for row, length in enumerate(rows.lengths()):
        labels = [-100] * length
        for position, token in zip(rows.masked_lm_positions[row], rows.masked_lm_ids[row], strict=True):
            if position:
                labels[position] = int(token)
        parts = (rows.input_ids[row, :length], rows.segment_ids[row, :length])
        found.append((*(tuple(part.tolist()) for part in parts), tuple(labels), int(rows.next_sentence_labels[row])))
    return found


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_packed_sequences_are_those_of_the_rows(stream, count, few_shapes):
    rows = stream.rows(0, count)
    batch = to_packed(rows, max_seqlen=SEQ_LENGTH, few_shapes=few_shapes)
    assert _sequences(batch) == _sequences_of(rows)
    bounds, tokens = batch.cu_seqlens.numpy(), len(batch.input_ids)
    assert batch.cu_seqlens.dtype is torch.int32 and bounds[0] == 0 and bounds[-1] == tokens
    assert np.diff(bounds).min() >= 0 and np.diff(bounds).max() <= SEQ_LENGTH
    assert tokens % 16 == 0 and tokens - rows.lengths().sum() < max(16, count * SEQ_LENGTH / GRANULES + 16)
    index = batch.masked_index.numpy()
    assert len(index) % 16 == 0 and batch.masked == int((rows.masked_lm_positions > 0).sum())
    assert index[: batch.masked].tolist() == np.flatnonzero(batch.labels.numpy() != -100).tolist()
    assert (batch.labels.numpy()[index[batch.masked :]] == -100).all()


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 24, 1), (1, 4, 6), (2, 6, 2), (3, 8, 1)])
@pytest.mark.parametrize("grouped", [True, False])
def test_every_packed_cut_takes_the_same_samples(stream, world, micro, accumulation, grouped):
    plans = [BatchPlan(24, micro, accumulation, rank, world, grouped, unpad=True) for rank in range(world)]
    for first in (0, 150):
        steps = [plan.build(stream, first) for plan in plans]
        taken = [sequence for step in steps for batch in step.micro_batches for sequence in _sequences(batch)]
        wanted = _sequences_of(stream.rows(first, 24))
        assert (sorted(taken) == sorted(wanted)) if grouped else (taken == wanted)
        assert all(len(step.micro_batches) == accumulation for step in steps)
        padded = [dataclasses.replace(plan, unpad=False).build(stream, first) for plan in plans]
        for one, other in zip(steps, padded, strict=True):
            assert (one.tokens, one.squares, one.masked, one.checksum) == (other.tokens, other.squares, other.masked, other.checksum)


def test_packed_micro_batches_have_about_as_many_tokens_and_fall_in_length(stream):
    step = BatchPlan(96, 12, 8, 0, 1, unpad=True).build(stream, 0)
    tokens = [len(batch.input_ids) for batch in step.micro_batches]
    assert max(tokens) - min(tokens) <= 2 * 16
    for batch in step.micro_batches:
        lengths = batch.cu_seqlens.diff()[:12]
        assert (lengths[1:] <= lengths[:-1]).all()


def test_few_shapes_are_few(stream):
    """As many sizes as granules at most, and one number of sequences."""
    plan = BatchPlan(64, 64, 1, 0, 1, unpad=True, few_shapes=True)
    steps = [plan.build(stream, 64 * number).micro_batches[0] for number in range(12)]
    granule = -(-64 * SEQ_LENGTH // GRANULES // 16) * 16
    assert {len(batch.input_ids) % granule for batch in steps} == {0}
    assert len({len(batch.cu_seqlens) for batch in steps}) == 1


def test_a_masked_position_behind_its_row_is_refused_when_packed(stream):
    rows = stream.rows(0, 4)
    shortest = int(rows.lengths().argmin())
    rows.masked_lm_positions[shortest, 0] = rows.lengths()[shortest]
    with pytest.raises(DataError, match="masked position lies behind"):
        to_packed(rows, max_seqlen=SEQ_LENGTH)


def test_packed_tensors_on_the_device_have_the_types_the_model_takes(stream):
    batch = to_packed(stream.rows(0, 5), max_seqlen=SEQ_LENGTH)
    arguments = batch.to(torch.device("cpu")).arguments()
    assert "attention_mask" not in arguments and arguments.pop("max_seqlen") == SEQ_LENGTH
    assert arguments.pop("cu_seqlens").dtype is torch.int32
    assert {tensor.dtype for tensor in arguments.values()} == {torch.int64}
    padded = to_micro_batch(stream.rows(0, 5))
    assert {"position_ids", "cu_seqlens", "max_seqlen", "masked"}.isdisjoint(padded.arguments())


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same 300 rows as padded, packed and binned records."""
    root = tmp_path_factory.mktemp("layouts")
    write_records(root / "padded" / "a_training_0.hdf5", 300, 0)
    data = arrays(root / "padded" / "a_training_0.hdf5")
    (root / "packed").mkdir()
    pack(root / "packed" / "a_training_0.hdf5", data, 0, 300)
    bins(root / "binned", data)
    return root


@pytest.mark.parametrize("layout", ["padded", "packed", "binned"])
def test_the_checksum_does_not_depend_on_the_number_of_ranks(layouts, layout):
    """Steps of one bin, mixed ones at the end of an epoch, and one across epochs: equal for every cut, and that of the padded rows."""
    index = open_index(layouts / layout, "training")
    widths, found = set(), set()
    for first in range(0, 360, 24):
        whole = SampleStream(index, 3, VOCAB_SIZE, group=24).rows(first, 24).fitted(SEQ_LENGTH, 5)
        wanted = zlib.crc32(whole.input_ids.astype("<i4").tobytes())
        for world in (1, 2, 4, 8):
            stream = SampleStream(index, 3, VOCAB_SIZE, group=24)
            steps = [BatchPlan(24, 24 // world, 1, rank, world).build(stream, first) for rank in range(world)]
            assert combined_crc([step.checksum for step in steps], steps[0].bytes) == wanted, (first, world)
            widths.add(len({stream.rows(first + rank * 24 // world, 24 // world).input_ids.shape[1] for rank in range(world)}))
        found.add(wanted)
    assert len(found) == 15
    assert (max(widths) > 1) == (layout == "binned"), "ranks read rows of different widths only where there are bins"


def test_the_checksum_is_of_the_rows_and_their_order(layouts):
    padded, packed = (SampleStream(open_index(layouts / name, "training"), 0, VOCAB_SIZE, shuffle=False) for name in ("padded", "packed"))
    one, other = (BatchPlan(24, 24, 1, 0, 1).build(stream, 0) for stream in (padded, packed))
    assert one.checksum == other.checksum, "the same rows, however they are stored"
    halves = [BatchPlan(24, 12, 1, rank, 2).build(padded, 0) for rank in range(2)]
    assert combined_crc([halves[1].checksum, halves[0].checksum], halves[0].bytes) != one.checksum
    assert combined_crc([one.checksum], one.bytes) == one.checksum and combined_crc([], 0) == 0
