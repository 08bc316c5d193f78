"""ShardedLamb against Lamb: whole tensors in artificial segments, flat partitions over several ranks (threads here), emptied groups."""

import threading

import pytest
import torch

import optimization
from berth.training.sharded_lamb import Segment, ShardedLamb

SHAPES = [(700, 9), (16, 24), (8, 8), (5, 3), (24,), (6,)]
DECAYED = 4
PATHS = [pytest.param(False, id="loop"), pytest.param(True, id="foreach")]
LIMIT = 1.0


def tensors(seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    made = [(torch.randn(shape, generator=draw) * 0.05).to(dtype) for shape in SHAPES]
    made[2].zero_()  # no norm, no ratio
    return made


def gradients(step, dtype=torch.float32):
    made = [gradient * 20 for gradient in tensors(1000 + step, dtype)]
    made[3].zero_()
    return made


def groups(parameters, decayed):
    return [{"params": parameters[:decayed], "weight_decay": 0.01}, {"params": parameters[decayed:], "weight_decay": 0.0}]


def whole_run(steps, dtype=torch.float64, **options):
    """(weights, norms of the gradients) of Lamb itself."""
    weights = [torch.nn.Parameter(tensor) for tensor in tensors(0, dtype)]
    lamb = optimization.Lamb(groups(weights, DECAYED), lr=0.05, **options)
    norms = []
    for step in range(steps):
        for weight, gradient in zip(weights, gradients(step, dtype), strict=True):
            weight.grad = gradient
        lamb.step()
        norms.append(lamb.grad_norm)
    return [weight.detach() for weight in weights], norms


class Sum:
    """The sum over threads that all call it with a tensor; counts its calls."""

    def __init__(self, threads):
        self.barrier, self.parts, self.calls = threading.Barrier(threads), {}, 0

    def __call__(self, values):
        self.parts[threading.get_ident()] = values.clone()
        self.barrier.wait(20)
        total = torch.stack([self.parts[key] for key in sorted(self.parts)]).sum(dim=0)
        if self.barrier.wait(20) == 0:
            self.parts, self.calls = {}, self.calls + 1
        self.barrier.wait(20)
        return total


def partitions(listed, cuts):
    """The tensors laid end to end with a gap (padding) after each, cut at ``cuts``; each part with its segments."""
    ends = [0]
    for tensor in listed:
        ends.append(ends[-1] + tensor.numel() + 3)
    flat = torch.zeros(ends[-1])
    for start, tensor in zip(ends, listed, strict=False):
        flat[start : start + tensor.numel()] = tensor.reshape(-1)
    parts = []
    for low, high in zip([0, *cuts], [*cuts, len(flat)], strict=True):
        segments = []
        for number, tensor in enumerate(listed):
            first, last = max(ends[number], low), min(ends[number] + tensor.numel(), high)
            if first < last or number % 2:  # empty ones may be named, too
                segments.append((first - low if first < last else 0, max(last - first, 0), number))
        parts.append((flat[low:high].clone(), segments))
    return parts


def sharded_run(cuts, steps, norms, foreach):
    """Each of ``len(cuts) + 1`` ranks holds one flat part of the decayed and one of the plain tensors; the whole tensors after ``steps``."""
    world, add = len(cuts[0]) + 1, Sum(len(cuts[0]) + 1)
    start = tensors(0)
    parts = [partitions(start[:DECAYED], cuts[0]), partitions(start[DECAYED:], cuts[1])]
    errors = []

    def rank(number):
        try:
            pieces = [torch.nn.Parameter(part[number][0]) for part in parts]
            optimizer = ShardedLamb(
                groups(pieces, 1), reduce=add, tensors=len(SHAPES), lr=0.05, max_grad_norm=LIMIT, foreach=foreach
            )  # fmt: skip
            shifted = [(at, length, tensor + DECAYED) for at, length, tensor in parts[1][number][1]]
            optimizer.set_segments({pieces[0]: parts[0][number][1], pieces[1]: shifted})
            for step in range(steps):
                made = gradients(step)
                cut = [partitions(made[:DECAYED], cuts[0]), partitions(made[DECAYED:], cuts[1])]
                for piece, part in zip(pieces, cut, strict=True):
                    piece.grad = part[number][0]
                optimizer.step(grad_norm=norms[step])
            assert [group["step"] for group in optimizer.param_groups] == [steps, steps]
            for part, piece in zip(parts, pieces, strict=True):
                part[number] = (piece.detach(), part[number][1])
        except BaseException as error:
            errors.append(error)
            add.barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert add.calls == steps
    result = []
    for half, listed in zip(parts, (start[:DECAYED], start[DECAYED:]), strict=True):
        flat, at = torch.cat([piece for piece, _ in half]), 0
        for tensor in listed:
            result.append(flat[at : at + tensor.numel()].view(tensor.shape))
            assert not flat[at + tensor.numel() : at + tensor.numel() + 3].any(), "padding stays zero"
            at += tensor.numel() + 3
    return result


def worst(ours, theirs):
    return max(float((one.detach().double() - other.double()).abs().max()) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize("options", [{}, {"adam_w_mode": False}, {"use_nvlamb": True}, {"max_grad_norm": 0}], ids=str)
def test_one_process_with_tensors_in_segments(foreach, options):
    """Each tensor is one parameter, named in two or three segments: the same as Lamb in the same type."""
    expected, norms = whole_run(6, torch.float32, foreach=foreach, **options)
    weights = [torch.nn.Parameter(tensor) for tensor in tensors(0)]
    calls = []
    optimizer = ShardedLamb(
        groups(weights, DECAYED), reduce=lambda values: calls.append(values.shape) or values, tensors=9, lr=0.05, foreach=foreach, **options
    )
    optimizer.set_segments(
        {
            w: [Segment(0, 2, n), Segment(2, w.numel() // 2, n), (2 + w.numel() // 2, w.numel() - 2 - w.numel() // 2, n)]
            for n, w in enumerate(weights)
        }
    )
    for step in range(6):
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient
        optimizer.step(grad_norm=norms[step])
    assert worst(weights, expected) <= 1e-7
    assert worst(weights, tensors(0)) > 1e-2
    assert calls == [(9, 2)] * 6


@pytest.mark.parametrize("foreach", PATHS)
@pytest.mark.parametrize(
    "cuts",
    [
        pytest.param(([3000], [15]), id="two"),
        pytest.param(([100, 100, 6299, 6301], [0, 24, 26, 33]), id="five, some with nothing, tensors over several"),
        pytest.param(([6312, 6400, 6720], [36, 36, 36]), id="four, plain ones on one"),
    ],
)
def test_flat_partitions_over_ranks_equal_float64(cuts, foreach):
    expected, norms = whole_run(6)
    assert worst(sharded_run(cuts, 6, norms, foreach), expected) < 2e-6


@pytest.mark.parametrize("seed", range(5))
def test_random_cuts(seed):
    draw = torch.Generator().manual_seed(seed)
    world = int(torch.randint(2, 7, (), generator=draw))
    lengths = [sum(torch.Size(shape).numel() + 3 for shape in part) for part in (SHAPES[:DECAYED], SHAPES[DECAYED:])]
    cuts = [sorted(torch.randint(0, length + 1, (world - 1,), generator=draw).tolist()) for length in lengths]
    expected, norms = whole_run(3)
    assert worst(sharded_run(cuts, 3, norms, False), expected) < 2e-6


def make(params, tensors_=2, **options):
    return ShardedLamb(params, reduce=lambda values: values, tensors=tensors_, **options)


def test_emptied_groups_do_not_count_and_every_step_reduces_once():
    """DeepSpeed steps group by group, with the parameters of the others taken out."""
    first, second = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    calls = []
    optimizer = ShardedLamb(groups([first, second], 1), reduce=lambda values: calls.append(1) or values, tensors=2, max_grad_norm=0)
    optimizer.set_segments({first: [Segment(0, 4, 0)]})
    for held in (first, second):
        for group, parameter in zip(optimizer.param_groups, (first, second), strict=True):
            group["params"] = [parameter] if parameter is held else []
        held.grad = torch.ones(4)
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 1] and len(calls) == 2
    assert (first != 1).all() and (second != 1).all()


def test_a_rank_with_empty_pieces_only_takes_part():
    piece = torch.nn.Parameter(torch.empty(0))
    seen = []
    optimizer = ShardedLamb([piece], reduce=lambda values: seen.append(values.clone()) or values, tensors=3)
    optimizer.set_segments({piece: [Segment(0, 0, 2)]})
    piece.grad = torch.empty(0)
    optimizer.step(grad_norm=1.0)
    assert torch.equal(seen[0], torch.zeros(3, 2, dtype=torch.float64)) and optimizer.param_groups[0]["step"] == 1


def test_overflow_changes_nothing_and_does_not_reduce():
    piece = torch.nn.Parameter(torch.ones(4))
    piece.grad = torch.ones(4)
    optimizer = ShardedLamb([piece], reduce=lambda values: pytest.fail("reduced"), tensors=1)
    optimizer.step(found_inf=True)
    assert torch.equal(piece.detach(), torch.ones(4)) and optimizer.param_groups[0]["step"] == 0


def test_clipping_needs_the_norm_of_the_whole():
    piece = torch.nn.Parameter(torch.ones(4))
    piece.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"grad_norm=.*max_grad_norm=0"):
        make([piece]).step()


@pytest.mark.parametrize("segment", [(-1, 2, 0), (0, 5, 0), (3, 2, 0), (0, 1, 2), (0, 1, -1), (0, -1, 0)])
def test_segments_lie_in_their_parameter(segment):
    piece = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="segment .* does not lie in a parameter of 4 elements and tensors 0..1"):
        make([piece]).set_segments({piece: [segment]})
