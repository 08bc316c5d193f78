"""Which part of what lies where, by brute force over every element."""

import pytest
import torch

from berth.training.pieces import chunked_rows, equal_ranges, spans

SHAPES = [torch.Size(shape) for shape in ((5, 3), (1, 4), (7,), (2, 2, 2), (4, 1))]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_rows_are_cut_as_torch_cuts_them(world):
    layout = chunked_rows(SHAPES, world)
    for number, shape in enumerate(SHAPES):
        whole = torch.arange(shape.numel()).view(shape)
        chunks = [chunk.reshape(-1) for chunk in whole.chunk(world)]
        for rank in range(world):
            low, high = layout.ranges[rank][number]
            expected = chunks[rank] if rank < len(chunks) else whole.new_empty(0)
            assert torch.equal(whole.view(-1)[low:high], expected)


@pytest.mark.parametrize(("world", "size"), [(2, 40), (3, 20), (4, 16), (9, 8)])
def test_equal_ranges_of_a_flat_buffer(world, size):
    starts = [0, 16, 24, 32, 40]
    layout = equal_ranges(SHAPES, starts, size, world)
    for number, (shape, start) in enumerate(zip(SHAPES, starts, strict=True)):
        for rank in range(world):
            low, high = layout.ranges[rank][number]
            expected = [at for at in range(shape.numel()) if (start + at) // size == rank]
            assert list(range(low, high)) == expected
    assert layout.only([3, 1]).shapes == [SHAPES[3], SHAPES[1]]
    assert layout.only([3, 1]).ranges == [[held[3], held[1]] for held in layout.ranges]


@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [0, 0, 4], [7], [], [0]])
@pytest.mark.parametrize("width", [1, 2, 4, 100])
def test_windows_over_pieces(lengths, width):
    elements = [(piece, at) for piece, length in enumerate(lengths) for at in range(length)]
    for low in range(0, len(elements) + 1, width):
        found = [None] * width
        for piece, start, at, length in spans(lengths, low, low + width):
            assert length > 0
            for offset in range(length):
                found[at + offset] = (piece, start + offset)
        expected = elements[low : low + width]
        assert found == expected + [None] * (width - len(expected))
