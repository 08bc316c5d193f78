"""Micro-batches in one buffer: what comes out is what went in, in the model's types; and the order of copies and work."""

import dataclasses
import itertools

import pytest
import torch

from berth.training.batches import MicroBatch
from berth.training.transfer import ALIGNMENT, Arriving, layout, pack, prefetched, unpack

CPU = torch.device("cpu")


def padded(sequences, length, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 30000, (sequences, length), generator=draw, dtype=torch.int32)
    return MicroBatch(
        input_ids=ids,
        token_type_ids=torch.randint(0, 2, ids.shape, generator=draw, dtype=torch.int8),
        labels=torch.randint(-100, 100, ids.shape, generator=draw, dtype=torch.int32),
        next_sentence_label=torch.randint(-100, 2, (sequences,), generator=draw, dtype=torch.int8),
        masked_index=torch.randint(0, max(ids.numel(), 1), (length // 2,), generator=draw),
        masked=length // 2,
        attention_mask=torch.rand(ids.shape, generator=draw) < 0.5,
    )


def packed(tokens, sequences, seed=0):
    one = padded(1, tokens, seed)
    flat = {name: tensor.flatten() for name, tensor in one.tensors().items() if name != "attention_mask"}
    bounds = torch.linspace(0, tokens, sequences + 1).int()
    places = torch.arange(tokens, dtype=torch.int16)
    return dataclasses.replace(one, **flat, attention_mask=None, position_ids=places, cu_seqlens=bounds, max_seqlen=tokens)


def same(ours, theirs):
    assert ours.tensors().keys() == theirs.tensors().keys()
    for name, tensor in theirs.tensors().items():
        assert ours.tensors()[name].dtype == tensor.dtype and torch.equal(ours.tensors()[name], tensor), name
    assert (ours.masked, ours.max_seqlen) == (theirs.masked, theirs.max_seqlen)


@pytest.mark.parametrize("seed", range(8))
def test_packing_and_unpacking_is_a_plain_move(seed):
    """Random odd shapes, all the types batches are read in, fields that are None."""
    draw = torch.Generator().manual_seed(seed)
    rows, width = torch.randint(1, 40, (2,), generator=draw).tolist()
    micro = padded(rows, width, seed) if seed % 2 else packed(rows * width, rows, seed)
    places, size = layout(micro)
    buffer = torch.full((size,), 171, dtype=torch.uint8)
    pack(micro, places, buffer)
    same(unpack(micro, places, buffer), micro.to(CPU))


def test_views_are_of_the_buffer_and_nothing_overlaps():
    micro = padded(3, 5)
    places, size = layout(micro)
    assert all(place.start % ALIGNMENT == 0 for place in places) and size % ALIGNMENT == 0
    ends = [(place.start, place.start + place.bytes) for place in places]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends)) and ends[-1][1] <= size
    assert sum(place.bytes for place in places) == sum(t.numel() * t.element_size() for t in micro.tensors().values())


def test_rows_that_are_slices_of_wider_ones():
    wide = padded(6, 20)
    sliced = dataclasses.replace(wide, input_ids=wide.input_ids[:, :7], labels=wide.labels[::2])
    places, size = layout(sliced)
    buffer = torch.empty(size, dtype=torch.uint8)
    pack(sliced, places, buffer)
    same(unpack(sliced, places, buffer), sliced.to(CPU))


def test_nothing_masked():
    micro = dataclasses.replace(padded(2, 4), masked_index=torch.empty(0, dtype=torch.int64), masked=0)
    places, size = layout(micro)
    buffer = torch.empty(size, dtype=torch.uint8)
    pack(micro, places, buffer)
    same(unpack(micro, places, buffer), micro.to(CPU))


class Recorder:
    """A copier that writes down what is asked of it."""

    def __init__(self):
        self.events = []

    def start(self, micro):
        self.events.append(f"start {micro.masked}")
        return micro

    def finish(self, under_way):
        self.events.append(f"finish {under_way.masked}")
        return under_way.to(CPU)


def numbered(count):
    return [dataclasses.replace(padded(1, 4), masked=number) for number in range(count)]


def test_the_next_copy_begins_before_the_work_on_this_one():
    copier = Recorder()
    for micro in prefetched(numbered(3), CPU, ahead=1, using=copier):
        copier.events.append(f"work {micro.masked}")
    assert copier.events == [
        "start 0", "start 1", "finish 0", "work 0", "start 2", "finish 1", "work 1", "finish 2", "work 2",
    ]  # fmt: skip


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_all_arrive_in_order(ahead, count):
    copier = Recorder()
    assert [micro.masked for micro in prefetched(numbered(count), CPU, ahead, copier)] == list(range(count))
    assert (
        copier.events == []
        if ahead == 0
        else sorted(copier.events) == sorted(f"{what} {n}" for what in ("start", "finish") for n in range(count))
    )


def test_on_a_cpu_nothing_but_types_changes():
    micro = padded(3, 4)
    (there,) = prefetched([micro], CPU)
    same(there, micro.to(CPU))
    assert there.attention_mask is micro.attention_mask


@pytest.mark.parametrize("value", [0.25, float("inf"), float("nan"), 1e300])
def test_a_number_arrives_as_it_was(value):
    number = Arriving(torch.tensor(value, dtype=torch.float64)).value()
    assert number == value or (number != number and value != value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_to_a_gpu_equal_plain_ones():
    device = torch.device("cuda", 0)
    micro_batches = [padded(3, 40, 1), packed(77, 5, 2), padded(1, 1, 3), packed(512, 9, 4)]
    for ours, theirs in zip(prefetched(micro_batches, device), micro_batches, strict=True):
        same(ours, theirs.to(device))
    assert Arriving(torch.tensor(2.5, device=device)).value() == 2.5
