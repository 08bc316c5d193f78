"""Attention over packed sequences of different lengths, with dropout: the custom op ``berth::varlen_attention``.

In: queries, keys and values of the tokens of all sequences, end to end, and where each sequence starts. Out: their context. Nothing is
computed for padding, because there is none.

- On CUDA: the flash kernels that torch brings along (``aten::_flash_attention_forward``/``_backward``), which take offsets and dropout.
  ``torch.nn.attention.varlen`` calls the same ones, but always without dropout. A draw has 8 bits: they keep (floor(255 (1 - p)) + 1) / 256 of
  the probabilities and scale them by 1 / (1 - p), so that p = 0.1 keeps 0.8984 of them and multiplies the output by 0.9983 in the mean.
- On a CPU: a block of sequences of equal length at a time, a few MiB, with torch's batched matrix product. The probabilities are kept for
  the backward pass; their sign says which were dropped (one tensor instead of two and a mask). A draw has 16 bits, four to an int64 of the
  default generator; the scale of the kept ones is exactly the inverse of the share that such a draw keeps.

Autocast is not looked at: forward and backward take the types they are given.

On a CPU with several threads, set OMP_WAIT_POLICY=PASSIVE before torch is imported: each of the many small calls ends when its slowest thread does,
and threads that spin meanwhile keep it from running. With more busy processes than cores (2 threads on 2 cores, load 7, 2026-11-21) a step took
2.5 to 7 times as long as padded attention with spinning threads, 0.6 of it with passive ones.

Rejected for the CPU, measured 2026-11-21 on one thread, in nanoseconds per probability (one of the six products of a step: 1.4 in fp32):

- ``native_dropout`` 6.6, ``bernoulli_`` 5.7, ``rand`` 2.8: int64 draws take 0.8, comparing and marking 0.2;
- ``masked_fill_`` and ``where`` 2.7: ``clamp_min`` of signed probabilities takes 0.1;
- products written straight into [T, N, D]: torch then multiplies one matrix at a time;
- scores of 16-bit inputs in 16 bits: a tenth faster, but 0.004 to 0.011 away from float64 instead of 0.003;
- torch's own attention kernel for CPUs: it takes no dropout. What torch does instead is the padded side of ``benchmarks/attention.py``;
- not keeping the probabilities: one more product, softmax and set of draws (not built).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from berth.kernels.dropout import DRAWS, draw, dropped_draws

# Probabilities of a block, in bytes. Between 0.25 and 4 MiB it makes less than a tenth of difference (2026-11-21); the larger, the fewer calls.
BLOCK_BYTES = 2 << 20
# Integers of the same width, whose sign is the sign of the number.
_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_FLASH_TYPES = (torch.float16, torch.bfloat16)
_FLASH_LARGEST_HEAD = 256


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """dropout(softmax(scale * Q K^T)) V of every sequence for itself.

    Compiles into one graph, also with a T that changes; differentiable once in query, key and value. The dropout is drawn from torch's default
    generator of the device.

    Args:
        query, key, value: [T, N, D] of one floating type, the tokens of all sequences; views of a projection will do, D has to be contiguous.
        cu_seqlens: int32 [C + 1] on the same device, non-decreasing from 0 to T: sequence c is the tokens cu_seqlens[c] to cu_seqlens[c + 1] - 1.
            It may be empty. Neighbours of equal length are faster on a CPU.
        max_seqlen: at least the length of the longest sequence, in tokens.
        dropout_p: probability of dropping a probability, 0 <= dropout_p < 1; the others are scaled up.
        scale: of the scores; D ** -0.5 if None.

    Returns:
        [T, N, D] in the type of ``query``.

    Raises:
        ValueError: a shape, type or device does not fit, or dropout_p is out of range; on a CPU also when the offsets break the rule above.
    """
    if query.ndim != 3 or key.shape != query.shape or value.shape != query.shape:
        shapes = [list(x.shape) for x in (query, key, value)]
        raise ValueError(f"query, key and value have the shapes {shapes}: must be the same [T, N, D]")
    if query.dtype not in _INTEGERS or key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype}: must be one of {[*_INTEGERS]}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: must be torch.int32 [C + 1]")
    if not (query.device == key.device == value.device == cu_seqlens.device):
        raise ValueError(
            f"query, key, value and cu_seqlens are on {query.device}, {key.device}, {value.device}, {cu_seqlens.device}: must be one device"
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p {dropout_p}: must be at least 0 and less than 1")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, *_ = torch.ops.berth.varlen_attention(query, key, value, cu_seqlens, max_seqlen, dropout_p, scale, torch.is_grad_enabled())
    return out


def unsupported(device: torch.device | str, dtype: torch.dtype, head_size: int) -> str | None:
    """Why :func:`varlen_attention` cannot be used, in words for a log; None if it can.

    A CUDA device is tried out once: small sequences, some of them empty, forward and backward, against float64 on the CPU. The random state of
    the device stays as it was.

    Args:
        device: where the model is.
        dtype: what the projections give, under autocast its type.
        head_size: D.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return None if dtype in _INTEGERS else f"attention of packed sequences takes {', '.join(map(_name, _INTEGERS))}, not {_name(dtype)}"
    if device.type != "cuda":
        return f"there is no attention of packed sequences for devices of type {device.type}"
    if dtype not in _FLASH_TYPES:
        return f"the flash kernels take {' and '.join(map(_name, _FLASH_TYPES))}, not {_name(dtype)}"
    if head_size % 8 or head_size > _FLASH_LARGEST_HEAD:
        return f"the flash kernels take head sizes that are multiples of 8 up to {_FLASH_LARGEST_HEAD}, not {head_size}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return probe(device if device.index is not None else torch.device("cuda", torch.cuda.current_device()), dtype, head_size)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def probe(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Run the op on the device and compare; None if all is well, else what is wrong: the first line of an error, or the number that is off."""
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False), torch.inference_mode(False), torch.enable_grad():
            return _disagreement(device, dtype, head_size)
    except Exception as error:  # whatever a driver or a kernel comes up with: the padded path is there
        first_line = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {first_line}"


def _disagreement(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """What the op gives on ``device`` that it should not."""
    lengths, heads, dropout_p = (1, 77, 0, 300, 5, 129, 0, 0), 8, 0.1  # of one and of several of the kernels' blocks
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(sum(lengths), 4, heads, head_size, generator=generator).to(dtype)  # as of one projection: with strides

    def run(to: torch.device, as_type: torch.dtype, dropout_p: float) -> tuple[Tensor, ...]:
        query, key, value, grad = inputs.to(to, as_type).unbind(1)
        query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
        out = varlen_attention(query, key, value, cu_seqlens.to(to), max(lengths), dropout_p)
        return tuple(x.detach().double().cpu() for x in (out, *torch.autograd.grad(out, (query, key, value), grad)))

    # The result of an exact computation that is rounded once has an error of eps / 4 or so; P and dS are rounded in between.
    tolerance = 4 * torch.finfo(dtype).eps
    reference = run(torch.device("cpu"), torch.float64, 0.0)
    for name, got, want in zip(
        ("output", "query gradient", "key gradient", "value gradient"), run(device, dtype, 0.0), reference, strict=True
    ):
        error = ((got - want).norm() / want.norm()).item()
        if not error <= tolerance:
            return f"the {name} differs from float64 by {error:.2g} of its norm, {tolerance:.2g} is allowed"

    # of this device only: torch.manual_seed would reach those that fork_rng does not put back
    (torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator).manual_seed(0)
    out, *_, value_grad = run(device, dtype, dropout_p)
    _, _, value, grad = inputs.double().unbind(1)
    # Out of independent values, what is dropped and the scaling up move the output by sqrt(p / (1 - p)) = 1/3 of its norm, and its mean not at all.
    moved = ((out - reference[0]).norm() / reference[0].norm()).item()
    mean = ((out * reference[0]).sum() / reference[0].square().sum()).item()
    if not (0.15 < moved < 0.6 and 0.9 < mean < 1.1):
        return f"dropout {dropout_p} moves the output by {moved:.2g} of its norm, 1/3 is right, and multiplies it by {mean:.3g}, 1 is right"
    # With one and the same mask, (P V) . G = V . (P^T G) in each head; with two, the sides differ by half of the spread that they have themselves.
    sides = (out * grad).sum((0, 2)), (value * value_grad).sum((0, 2))
    spread = out.norm() * grad.norm() / (out.numel() * heads) ** 0.5
    error = ((sides[0] - sides[1]).square().mean().sqrt() / spread).item()
    if not error <= 0.1:
        return f"the backward pass drops other probabilities than the forward pass: {error:.2g}, 0.1 is allowed"
    return None


@torch.library.custom_op("berth::varlen_attention", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float, scale: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, and what the backward pass needs: sums of exponents and two tensors of random state, or probabilities and two empty ones."""
    if query.is_cuda:
        return _flash_forward(query, key, value, cu_seqlens, max_seqlen, dropout_p, scale)
    with torch.autocast("cpu", enabled=False):
        out, saved = _cpu_forward(query, key, value, cu_seqlens, max_seqlen, dropout_p, scale, save)
    return out, saved, query.new_empty(0), query.new_empty(0)


@_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float, scale: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if query.device.type == "cuda":
        return _flash_forward(query, key, value, cu_seqlens, max_seqlen, dropout_p, scale)
    total, heads, _ = query.shape
    saved = query.new_empty(heads, total, max_seqlen) if save else query.new_empty(0)
    return query.new_empty(query.shape), saved, query.new_empty(0), query.new_empty(0)


@torch.library.custom_op("berth::varlen_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    saved: Tensor,
    seed: Tensor,
    offset: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from the gradient of the output and what :func:`_forward` returned."""
    if query.is_cuda:
        return _flash_backward(grad, query, key, value, out, saved, seed, offset, cu_seqlens, max_seqlen, dropout_p, scale)
    with torch.autocast("cpu", enabled=False):
        return _cpu_backward(grad, query, key, value, saved, cu_seqlens, dropout_p, scale)


@_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    saved: Tensor,
    seed: Tensor,
    offset: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if query.device.type == "cuda":
        return _flash_backward(grad, query, key, value, out, saved, seed, offset, cu_seqlens, max_seqlen, dropout_p, scale)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, cu_seqlens, ctx.max_seqlen, ctx.dropout_p, ctx.scale, save = inputs
    assert save, "torch.ops.berth.varlen_attention: save=False keeps nothing for the backward pass"
    ctx.save_for_backward(query, key, value, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    grads = torch.ops.berth.varlen_attention_backward(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.dropout_p, ctx.scale)
    return *grads, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, sums, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, False, False, scale=scale
    )
    return out, sums, seed, offset


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    seed: Tensor,
    offset: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, sums, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, False, seed, offset, scale=scale
    )


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float, scale: float, save: bool
) -> tuple[Tensor, Tensor]:
    """Output [T, N, D], and [N, T, max_seqlen] of memory that begins with the probabilities, block after block; those dropped are negative."""
    total, heads, _ = query.shape
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != total or any(end < start for start, end in itertools.pairwise(ends)):
        raise ValueError(f"cu_seqlens goes from {ends[0]} to {ends[-1]}: must be non-decreasing from 0 to the number of tokens, {total}")
    longest = max(end - start for start, end in itertools.pairwise(ends))
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen {max_seqlen}: must be at least the length of the longest sequence, {longest}")
    out = query.new_empty(query.shape)
    saved = query.new_empty(heads, total, max_seqlen) if save else query.new_empty(0)
    dropped = dropped_draws(dropout_p)
    for block, start in _blocks(ends, query):
        probabilities = (
            _matrices(saved, block, heads, start) if save else query.new_empty(block.sequences * heads, block.length, block.length)
        )
        _softmax(_by_head(query, block), _by_head(key, block), scale, probabilities)
        kept = _drop(probabilities, dropped) if dropped else probabilities
        _multiply(kept, _by_head(value, block), DRAWS / (DRAWS - dropped), out, block)
    return out, saved


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, saved: Tensor, cu_seqlens: Tensor, dropout_p: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With P the probabilities, M the mask of the kept ones / their share, and dO the gradient of the output (softmax backward in its usual form):
    dV = (P M)^T dO;  dP = (dO V^T) M;  dS = P (dP - rowsum(P dP));  dQ = scale dS K;  dK = scale dS^T Q."""
    heads = query.shape[1]
    query_grad, key_grad, value_grad = (query.new_empty(query.shape) for _ in range(3))
    dropped = dropped_draws(dropout_p)
    upscale = DRAWS / (DRAWS - dropped)
    for block, start in _blocks(cu_seqlens.tolist(), query):
        probabilities = _matrices(saved, block, heads, start)
        kept = _kept(probabilities) if dropped else probabilities
        grad_out = _by_head(grad, block)
        _multiply(kept.transpose(1, 2), grad_out, upscale, value_grad, block)
        d_probs = torch.empty_like(probabilities)
        torch.baddbmm(d_probs, grad_out, _by_head(value, block).transpose(1, 2), beta=0, alpha=upscale, out=d_probs)
        if dropped:
            torch.ops.aten.threshold_backward.grad_input(d_probs, kept, 0, grad_input=d_probs)
            probabilities = torch.abs(probabilities, out=kept)
        d_scores = torch.ops.aten._softmax_backward_data.out(d_probs, probabilities, -1, query.dtype, grad_input=d_probs)
        _multiply(d_scores, _by_head(key, block), scale, query_grad, block)
        _multiply(d_scores.transpose(1, 2), _by_head(query, block), scale, key_grad, block)
    return query_grad, key_grad, value_grad


class Block(NamedTuple):
    """``sequences`` of ``length`` > 0 tokens each, end to end from token ``start`` on."""

    start: int
    sequences: int
    length: int


def split(ends: list[int], most: int) -> Iterator[Block]:
    """Neighbours of equal length in blocks of at most ``most`` pairs of tokens (or one sequence); empty sequences are left out.

    Args:
        ends: the offsets, C + 1 of them.
        most: sequences x length^2 of a block.
    """
    start = count = length = 0
    for begin, end in itertools.pairwise(ends):
        if end == begin:
            continue
        if count and (end - begin != length or (count + 1) * length * length > most):
            yield Block(start, count, length)
            count = 0
        if not count:
            start, length = begin, end - begin
        count += 1
    if count:
        yield Block(start, count, length)


def _blocks(ends: list[int], query: Tensor) -> Iterator[tuple[Block, int]]:
    """The blocks and the number of probabilities before each."""
    heads = query.shape[1]
    used = 0
    for block in split(ends, BLOCK_BYTES // (heads * query.element_size())):
        yield block, used
        used += block.sequences * heads * block.length**2


def _matrices(saved: Tensor, block: Block, heads: int, start: int) -> Tensor:
    """[C * N, L, L]: the block's part of ``saved``, from number ``start`` on."""
    _, sequences, length = block
    return saved.view(-1)[start : start + sequences * heads * length**2].view(sequences * heads, length, length)


def _by_head(x_TND: Tensor, block: Block) -> Tensor:
    """[C * N, L, D]. A view where that costs nothing: of a single sequence, unless torch's 16-bit products would copy it themselves, slowly."""
    start, sequences, length = block
    rows = x_TND[start : start + sequences * length]
    if sequences == 1:
        rows = rows.transpose(0, 1)
        return rows.contiguous() if rows.element_size() == 2 else rows
    return rows.unflatten(0, (sequences, length)).transpose(1, 2).flatten(0, 1)


def _multiply(a: Tensor, b: Tensor, alpha: float, out_TND: Tensor, block: Block) -> None:
    """alpha a b, of [C * N, L, L] and [C * N, L, D], into the block's rows of ``out_TND``."""
    start, sequences, length = block
    product = torch.baddbmm(b, a, b, beta=0, alpha=alpha).unflatten(0, (sequences, -1)).transpose(1, 2)
    out_TND[start : start + sequences * length].unflatten(0, (sequences, length)).copy_(product)


def _softmax(query: Tensor, key: Tensor, scale: float, out: Tensor) -> None:
    """softmax(scale Q K^T) into ``out``; scores are 32-bit even where everything else is 16-bit."""
    scores = out
    if out.element_size() == 2:
        query, key, scores = query.float(), key.float(), out.new_empty(out.shape, dtype=torch.float32)
    torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=scale, out=scores)
    torch.softmax(scores, -1, out=scores)
    if scores is not out:
        out.copy_(scores)


def _drop(probabilities: Tensor, dropped: int) -> Tensor:
    """Choose what is dropped, make it negative in place, and return the kept ones with zeros between them, not scaled."""
    draws = draw(probabilities.shape)
    torch.lt(draws, dropped - DRAWS // 2, out=draws)
    bits = probabilities.view(_INTEGERS[probabilities.dtype])
    torch.add(bits, draws, alpha=torch.iinfo(bits.dtype).min, out=bits)  # 1 times the least integer: the sign bit, and nothing else
    return _kept(probabilities)


def _kept(signed: Tensor) -> Tensor:
    """``signed`` with 0 for what is negative. As numbers, not as integers: NaN has to stay NaN, whatever its sign."""
    return torch.clamp_min(signed, 0)
