"""The Triton kernel of :mod:`berth.kernels.cross_entropy`: rows of logits become their loss, their hit and, in place, their gradient.

One program a row. It reads the row three times (largest value; sum of exponentials; gradient) and writes it once, but only the first
reading comes from memory: a row of 16-bit logits has 60 kB at V = 30528, and those in flight stay in the L2 cache.
Importing this needs ``triton``, which CUDA builds of torch bring along; nothing else imports it where there is no GPU.

Rejected: maximum and sum in one reading (twice the exponentials, for a reading the cache serves).
"""

from __future__ import annotations

import torch
import triton  # type: ignore
import triton.language as tl  # type: ignore
from torch import Tensor

_BLOCK, _WARPS = 4096, 16


def reduce_rows(
    logits_RV: Tensor, bias_V: Tensor, labels_R: Tensor, ignored: int, losses_R: Tensor, hits_R: Tensor, gradients: bool, scale: float
) -> None:
    """Fill ``losses_R`` (fp32) and ``hits_R`` (bool), both contiguous, for logits (16-bit or fp32, contiguous) plus bias (fp32) and int64 labels.

    With ``gradients`` the logits become ``scale * (softmax - onehot)``, 0 where the label is ``ignored``.
    """
    rows, vocabulary = logits_RV.shape
    hits = hits_R.view(torch.uint8)
    bias, labels = bias_V.contiguous(), labels_R.contiguous()
    _rows_kernel[(rows,)](logits_RV, bias, labels, losses_R, hits, ignored, scale, vocabulary, gradients, _BLOCK, num_warps=_WARPS)


@triton.jit
def _row_part(start, bias, column, V: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits plus bias in fp32, -inf outside of the row."""
    inside = column < V
    return tl.load(start + column, mask=inside, other=float("-inf")).to(tl.float32) + tl.load(bias + column, mask=inside, other=0.0)


@triton.jit
def _rows_kernel(logits, bias, labels, losses, hits, ignored, scale, V: tl.constexpr, GRADIENTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    start = logits + row * V
    lane = tl.arange(0, BLOCK)

    largest_at = tl.full([BLOCK], 0, tl.int32)
    largest_in = tl.full([BLOCK], float("-inf"), tl.float32)
    target_in = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        column = first + lane
        x = _row_part(start, bias, column, V)
        larger = x > largest_in
        largest_at = tl.where(larger, column, largest_at)
        largest_in = tl.where(larger, x, largest_in)
        target_in = tl.where(column == label, x, target_in)
    largest = tl.max(largest_in, axis=0)
    argmax = tl.min(tl.where(largest_in == largest, largest_at, V), axis=0)

    sum_in = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        column = first + lane
        x = _row_part(start, bias, column, V)
        sum_in += tl.exp(x - largest)
    total = tl.sum(sum_in, axis=0)

    counted = label != ignored
    loss = largest + tl.log(total) - tl.sum(target_in, axis=0)
    tl.store(losses + row, tl.where(counted, loss, 0.0))
    tl.store(hits + row, ((argmax == label) & counted).to(tl.uint8))
    if GRADIENTS:
        for first in range(0, V, BLOCK):
            column = first + lane
            x = _row_part(start, bias, column, V)
            gradient = (tl.exp(x - largest) / total - tl.where(column == label, 1.0, 0.0)) * scale
            tl.store(start + column, tl.where(counted, gradient, 0.0).to(logits.dtype.element_ty), mask=column < V)
