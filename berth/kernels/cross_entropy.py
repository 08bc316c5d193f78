"""Vocabulary projection, cross-entropy, number of correct predictions and all gradients, a chunk of rows at a time.

In:  hidden states of the positions that are predicted, the embedding table, the bias, labels.
Out: :func:`linear_cross_entropy`: the summed loss and how many labels are the largest logit of their row. The [M, V] logits never exist
     whole; where they would be needed again, in the backward pass, there are finished gradients that only want the incoming one as a factor.

A chunk of logits is turned into its own gradient in place, on a CPU a few rows at a time while they are in the cache, on a GPU by one
Triton kernel (:mod:`berth.kernels.cross_entropy_triton`). Products that enter fp32 sums leave the matrix product as fp32 where the device
can do that. Both are tried on the device first (:func:`unsupported`).

Rejected: logits recomputed in the backward pass (a fourth matrix product, and one [V, H] buffer fits); the cast of the weight to 16 bits
outside of the operation (its gradient would be rounded to 16 bits on the way back); counting hits with ``argmax`` (on a CPU it takes
longer than the softmax).

Suffixes of tensor names: M rows, R rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_FP16_SCALE = 2.0**10  # of fp16 logits' gradients: 1 / V is subnormal there, and a product with weights below 32 stays below 65504
_CPU_ROWS = 64  # that are in the cache at a time; 8 to 64 took the same (2026-11)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignored: int = -100, *, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of ``hidden @ weight.T + bias`` over the labels that are not ``ignored``.

    Args:
        hidden: [M, H]; M may be 0.
        weight: [V, H].
        bias: [V].
        labels: int64 [M], each ``ignored`` or in [0, V); not checked, as that would wait for the device.
        rows: of one chunk; None: :func:`rows_at_once`.

    Returns:
        The loss, fp32 [] (fp64 for fp64), and how many of the labels are their row's largest logit, int64 [] (of equal ones the first counts).

    The product is computed in the type of the inputs, or in autocast's where that is on, as :func:`torch.nn.functional.linear` does;
    bias, softmax and sums are fp32. Gradients have the types of the inputs; chunks are summed in fp32, a chunk's bf16 product is rounded
    once where the device has no fp32 product of 16-bit factors (CPUs). There is no second derivative.

    Raises:
        ValueError: shapes do not fit, labels are not int64, or types differ outside of autocast.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(f"hidden {list(hidden.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)}: need [M, H], [V, H], [V]")
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}: need torch.int64 {list(hidden.shape[:1])}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows={rows}: must be at least 1")
    kind = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    elif not hidden.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"hidden, weight and bias are {hidden.dtype}, {weight.dtype}, {bias.dtype}: must be one type outside of autocast")
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight, bias)]
    chunk = rows_at_once(kind) if rows is None else rows
    loss, correct, *_ = _linear_cross_entropy(hidden, weight, bias, labels, ignored, chunk, dtype, wanted)
    return loss, correct


def rows_at_once(kind: str) -> int:
    """How many rows of logits are in memory at a time on a device of ``kind``: 'cpu', 'cuda', ...

    A GPU has large products with 4096 of them (250 MB in 16 bits at V = 30528). On a CPU 256 rows of fp32 stay below the 32 MiB from which
    the allocator gives memory back to the system each time: first touching it anew took a third of a product's time. Fewer rows read the
    weight's gradient too often: 128 are a tenth slower, 512 and 1024 no faster (two cores, H 256, 2026-11).
    """
    return 256 if kind == "cpu" else 4096


def unsupported(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why a GPU takes a plain form of something, None if it does not (or is none). Results are the same, the memory traffic is not.

    ``dtype`` is what the product is computed in. Kernel and products are tried once, on a small case; the first call here or of
    :func:`linear_cross_entropy` must therefore not be made while a CUDA graph is captured.
    """
    device = torch.device(device)
    reasons = _reasons(device, dtype)
    parts = (f"{part}: {reason}" for part, reason in zip(("kernel", "fp32 products", "fp32 sums"), reasons, strict=True) if reason)
    return "; ".join(parts) or None if device.type == "cuda" else None


# ------------------------------------------------------------------------------------------------------------ the operation


@torch.library.custom_op("berth::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignored: int, rows: int, dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, hits and the gradients of hidden, weight and bias that are ``wanted``, times :func:`_scale`, in fp32 (fp64 for fp64)."""
    loss, correct, d_hidden, d_weight, d_bias = _outputs(hidden, weight, bias, dtype, wanted)
    count, device = hidden.shape[0], hidden.device
    losses_M, hits_M = loss.new_empty(count), labels.new_empty(count, dtype=torch.bool)
    d_bias.zero_()
    if not count:
        d_weight.zero_()
    with torch.autocast(device.type, enabled=False):
        hidden_MH, weight_VH, bias_V = hidden.to(dtype), weight.to(dtype), bias.to(loss.dtype)
        products = _Products(device, dtype)
        reduce = _reduce if _reasons(device, dtype).kernel else _reduce_triton
        buffer = hidden_MH.new_empty(min(rows, count), weight.shape[0])
        for start in range(0, count, rows):
            here = slice(start, min(start + rows, count))
            logits_RV = torch.mm(hidden_MH[here], weight_VH.T, out=buffer[: here.stop - start])
            reduce(logits_RV, bias_V, labels[here], ignored, losses_M[here], hits_M[here], any(wanted), d_bias)
            if wanted[0]:
                products.store(logits_RV, weight_VH, d_hidden[here])
            if wanted[1]:
                (products.add if start else products.store)(logits_RV.T, hidden_MH[here], d_weight)
    torch.sum(losses_M, 0, out=loss)
    torch.sum(hits_M, 0, out=correct)
    return loss, correct, d_hidden, d_weight, d_bias


def _outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the operation returns, uninitialised; a gradient that is not wanted has no elements."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    d_hidden, d_weight, d_bias = (
        x.new_empty(x.shape if want else (0,), dtype=exact) for x, want in zip((hidden, weight, bias), wanted, strict=True)
    )
    return hidden.new_empty((), dtype=exact), hidden.new_empty((), dtype=torch.int64), d_hidden, d_weight, d_bias


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignored: int, rows: int, dtype: torch.dtype, wanted: list[bool]
) -> tuple[Tensor, ...]:
    return _outputs(hidden, weight, bias, dtype, wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, _, _, _, dtype, wanted = inputs
    ctx.save_for_backward(*output[2:])
    ctx.dtypes, ctx.wanted, ctx.scale = (hidden.dtype, weight.dtype, bias.dtype), wanted, _scale(dtype)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _scaled(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    factor = grad_loss / ctx.scale
    parts = zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    return *((gradient * factor).to(dtype) if want else None for gradient, dtype, want in parts), None, None, None, None, None


_linear_cross_entropy.register_autograd(_scaled, setup_context=_save)


def _scale(dtype: torch.dtype) -> float:
    """Factor of all gradients until the backward pass; a power of two, so that it changes no fp32 digit."""
    return _FP16_SCALE if dtype == torch.float16 else 1.0


# --------------------------------------------------------------------------------------- from logits to their gradients


def _reduce(
    logits_RV: Tensor, bias_V: Tensor, labels_R: Tensor, ignored: int, losses_R: Tensor, hits_R: Tensor, gradients: bool, d_bias_V: Tensor
) -> None:
    """Fill ``losses_R`` and ``hits_R``. With ``gradients``, logits become their gradients times :func:`_scale`; their sum is added to
    ``d_bias_V`` if that has elements."""
    on_cpu, scale = logits_RV.device.type == "cpu", _scale(logits_RV.dtype)
    rows = _CPU_ROWS if on_cpu else logits_RV.shape[0]
    buffer = bias_V.new_empty(min(rows, logits_RV.shape[0]), logits_RV.shape[1]) if logits_RV.dtype != bias_V.dtype else None
    for logits, labels, losses, hits in zip(*(x.split(rows) for x in (logits_RV, labels_R, losses_R, hits_R)), strict=True):
        values = logits if buffer is None else buffer[: logits.shape[0]].copy_(logits)
        values.add_(bias_V)
        skipped = labels == ignored
        targets = labels.masked_fill(skipped, 0)[:, None]
        at_target = values.gather(1, targets)
        if on_cpu:
            largest = _largest_on_cpu(values, targets, at_target, hits)
        else:
            largest = values.amax(1, keepdim=True)
            torch.eq(values.argmax(1), labels, out=hits)
        hits.masked_fill_(skipped, False)
        torch.softmax(values, 1, out=values)
        log_sum = largest - values.amax(1, keepdim=True).log_()  # the largest probability is exp(largest - log_sum), at least 1 / V
        losses.copy_((log_sum - at_target).squeeze(1)).masked_fill_(skipped, 0.0)
        if not gradients:
            continue
        if scale != 1:
            values.mul_(scale)
        values.scatter_(1, targets, values.gather(1, targets) - scale)
        if not on_cpu or skipped.any():
            values.masked_fill_(skipped[:, None], 0.0)
        if d_bias_V.numel():
            d_bias_V.add_(values.sum(0))
        if buffer is not None:
            logits.copy_(values)


def _largest_on_cpu(values_RV: Tensor, targets_R1: Tensor, at_target_R1: Tensor, hits_R: Tensor) -> Tensor:
    """The largest value of each row [R, 1]; ``hits_R`` becomes whether it is (first) at the target. One pass unless there is a tie."""
    others = values_RV.scatter_(1, targets_R1, -torch.inf).amax(1, keepdim=True)
    values_RV.scatter_(1, targets_R1, at_target_R1)
    torch.gt(at_target_R1, others, out=hits_R[:, None])
    tied = (at_target_R1 == others).squeeze(1)
    if tied.any():
        hits_R[tied] = values_RV[tied].argmax(1) == targets_R1[tied].squeeze(1)
    return torch.maximum(others, at_target_R1)


def _reduce_triton(
    logits_RV: Tensor, bias_V: Tensor, labels_R: Tensor, ignored: int, losses_R: Tensor, hits_R: Tensor, gradients: bool, d_bias_V: Tensor
) -> None:
    """As :func:`_reduce`: the logits are read from memory and written back once."""
    from berth.kernels.cross_entropy_triton import reduce_rows

    reduce_rows(logits_RV, bias_V, labels_R, ignored, losses_R, hits_R, gradients, _scale(logits_RV.dtype))
    if gradients and d_bias_V.numel():
        d_bias_V.add_(logits_RV.sum(0, dtype=d_bias_V.dtype))


# ------------------------------------------------------------------------------------------------- products with fp32 sums


class _Products:
    """Matrix products of ``dtype`` whose results are fp32 (fp64 for fp64).

    Where a device cannot give them out, a bf16 product is rounded once, as a layer's gradient is; an fp16 one could overflow: its factors
    become fp32.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        reasons = _reasons(device, dtype)
        self._plain = dtype in (torch.float32, torch.float64)
        self._fp32_product, self._fp32_sum = not reasons.product, not reasons.sum
        self._widened = dtype == torch.float16

    def store(self, left: Tensor, right: Tensor, total: Tensor) -> None:
        """``total = left @ right``."""
        if self._plain:
            torch.mm(left, right, out=total)
        elif self._fp32_product:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        elif self._widened:
            torch.mm(left.to(total.dtype), right.to(total.dtype), out=total)
        else:
            total.copy_(left @ right)

    def add(self, left: Tensor, right: Tensor, total: Tensor) -> None:
        """``total += left @ right``."""
        if self._plain:
            total.addmm_(left, right)
        elif self._fp32_sum:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        elif self._fp32_product:
            total.add_(torch.mm(left, right, out_dtype=total.dtype))
        elif self._widened:
            total.addmm_(left.to(total.dtype), right.to(total.dtype))
        else:
            total.add_(left @ right)


# ------------------------------------------------------------------------------------------------------------------ probes


class _Reasons(NamedTuple):
    """Why a device does without the kernel, 16-bit products with fp32 results, and adding those to an fp32 matrix; None if it does not."""

    kernel: str | None
    product: str | None
    sum: str | None


@functools.cache
def _reasons(device: torch.device, dtype: torch.dtype) -> _Reasons:
    if device.type != "cuda":
        other = f"not on a {device.type} device"
        return _Reasons(other, other, other)
    if dtype == torch.float64:
        return _Reasons("not for fp64", None, None)
    kernel = _reason(_try_kernel, device, dtype)
    if dtype == torch.float32:
        return _Reasons(kernel, None, None)
    return _Reasons(kernel, _reason(_try_product, device, dtype), _reason(_try_sum, device, dtype))


def _reason(trial: Callable[[torch.device, torch.dtype], None], device: torch.device, dtype: torch.dtype) -> str | None:
    """None if ``trial`` returns; else in a line what it raised. Any exception counts: a compiler's or a driver's has no common class."""
    try:
        trial(device, dtype)
    except Exception as error:
        first, *_ = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {first}"
    return None


def _try_kernel(device: torch.device, dtype: torch.dtype) -> None:
    """Raise unless the kernel gives what :func:`_reduce` gives on the CPU: two blocks of columns, a tie, an ignored label, a sure hit;
    labels and bias with every other place in memory."""
    vocabulary = 5000
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, vocabulary, generator=generator)).to(dtype)
    bias = torch.randn(vocabulary, generator=generator)
    logits[0, 7], logits[1, 4500], logits[1, 9], bias[9], bias[4500] = 40, 40, 40, 0, 0
    labels = torch.tensor([7, 4500, 9, -100, 4999])

    def run(reduce: Callable[..., None], where: torch.device) -> tuple[Tensor, ...]:
        values, losses, d_bias = logits.to(where, copy=True), torch.empty(5, device=where), torch.zeros(vocabulary, device=where)
        hits = torch.empty(5, dtype=torch.bool, device=where)
        strided_bias, strided_labels = (x.to(where).repeat_interleave(2)[::2] for x in (bias, labels))
        reduce(values, strided_bias, strided_labels, -100, losses, hits, True, d_bias)
        return losses.cpu(), hits.cpu(), values.cpu().float() / _scale(dtype), d_bias.cpu() / _scale(dtype)

    precisions = (1e-4, 0.0, *[1e-4 if dtype == torch.float32 else 2e-2] * 2)
    for actual, expected, precision in zip(run(_reduce_triton, device), run(_reduce, torch.device("cpu")), precisions, strict=True):
        torch.testing.assert_close(actual, expected, rtol=precision, atol=precision)


def _try_product(device: torch.device, dtype: torch.dtype) -> None:
    """Raise unless a product has digits ``dtype`` has not."""
    left, right, expected = _factors(device, dtype)
    result = torch.empty(expected.shape, device=device)
    torch.mm(left, right, out_dtype=torch.float32, out=result)
    torch.testing.assert_close(result.cpu().double(), expected, rtol=1e-4, atol=1e-4)


def _try_sum(device: torch.device, dtype: torch.dtype) -> None:
    """Raise unless a product can be added to fp32 in place."""
    left, right, expected = _factors(device, dtype)
    result = torch.ones(expected.shape, device=device)
    torch.addmm(result, left, right, out_dtype=torch.float32, out=result)
    torch.testing.assert_close(result.cpu().double(), expected + 1, rtol=1e-4, atol=1e-4)


def _factors(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Two factors, the left one transposed as it is in use, and their product in fp64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, size, generator=generator).to(dtype) for size in (48, 32))
    return left.to(device).T, right.to(device), left.double().T @ right.double()
