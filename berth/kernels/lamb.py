"""LAMB in two passes over memory on a GPU: Triton kernels that update all tensors of a group in one launch.

In: parameter groups as :class:`optimization.Lamb` takes them, of contiguous float32 tensors on one device. Out: :class:`TritonLamb`, with the
state, the interface and (within rounding) the results of :class:`optimization.Lamb`; checkpoints move between them.

A launch covers the tensors of a group through two tables on the device: the addresses of parameter, gradient and moments of every tensor,
and a list of blocks (number of the tensor, number of the block in it). They are made anew when an address or a size changes. Sums of squares
go to a buffer, one pair a block, and a second kernel adds up those of a tensor, always in the same order: no atomics, so that a step repeats
itself bitwise. Nothing is read back by the host; clipping and the guard against a gradient that is not finite are numbers on the device.

Bytes moved a parameter: pass 1 reads parameter, gradient and moments and writes the moments (24), pass 2 reads parameter and moments,
computes the direction again and writes the parameter (16): 40, and 4 for the norm of the gradient before. A tensor without trust ratio takes one
pass (28). BERT-large: 14.8 GB a step; six float32 arrays a pass and no recomputation would move 48 bytes, torch's batched kernels about 120.

Rejected: storing the direction between the passes (as many bytes, and a buffer of 1.3 GB at BERT-large); a norm kernel of our own
(``torch._foreach_norm`` reads the gradients once as well); a cooperative kernel that keeps a tensor on the chip between the passes (no tensor of the
encoder fits the cache that is left over); rates and moments' constants in a table on the device (a copy from the host each step).

``TRITON_INTERPRET=1`` set before the first import runs the kernels on a CPU: how the tests compare them with a float64 formula.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import triton  # type: ignore
import triton.language as tl  # type: ignore
from torch import Tensor

import optimization

_BLOCK = 2048
"""Elements of one program: 16 a thread with 4 warps, four 16-byte loads of each array. A power of two."""

_WARPS = 4

_SUMS_BLOCK = 1024
"""Blocks whose sums are added up at once by the program of a tensor."""

_VECTOR = 4
"""Elements of a 16-byte load; needs addresses and sizes that are multiples of it."""


@triton.jit
def _locate(table, blocks, control, VECTOR: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Number of the program's tensor, its four pointers at the program's block, and how many elements to update from there on (none where
    the guard forbids it)."""
    program = tl.program_id(0)
    tensor = tl.load(blocks + 2 * program)
    start = tl.load(blocks + 2 * program + 1).to(tl.int64) * BLOCK
    row = table + 5 * tensor
    # the compiler cannot know what an address from memory is a multiple of; without the hints it loads 4 bytes at a time
    parameter = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 4 * VECTOR) + start
    gradient = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 4 * VECTOR) + start
    first = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 4 * VECTOR) + start
    second = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 4 * VECTOR) + start
    left = (tl.multiple_of(tl.load(row + 4), VECTOR) - start) * tl.load(control + 1).to(tl.int64)
    return tensor, parameter, gradient, first, second, left


@triton.jit
def _direction(p, m, v, correction1, correction2_root, eps, update_decay):  # type: ignore[no-untyped-def]
    """Adam's direction plus the weight decay; the same numbers in both passes."""
    denominator = tl.div_rn(tl.sqrt_rn(v), correction2_root) + eps
    return tl.div_rn(tl.div_rn(m, denominator), correction1) + update_decay * p


@triton.jit
def _advance(  # type: ignore[no-untyped-def]
    table, blocks, control, sums, lr, beta1, beta2, beta3, beta4, correction1,
    correction2_root, eps, gradient_decay, update_decay, TRUST: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 1: the moments, and the sums of p^2 and u^2 of the block; the parameters themselves where there is no trust ratio."""
    _, parameter, gradient, first, second, left = _locate(table, blocks, control, VECTOR, BLOCK)
    offsets = tl.arange(0, BLOCK)
    divisor = tl.load(control)
    mask = offsets < left
    p = tl.load(parameter + offsets, mask=mask, other=0.0)
    g = tl.load(gradient + offsets, mask=mask, other=0.0)
    m = tl.load(first + offsets, mask=mask, other=0.0)
    v = tl.load(second + offsets, mask=mask, other=0.0)
    s = tl.div_rn(g, divisor) + gradient_decay * p
    m = beta1 * m + beta3 * s
    v = beta2 * v + beta4 * s * s
    tl.store(first + offsets, m, mask=mask)
    tl.store(second + offsets, v, mask=mask)
    u = _direction(p, m, v, correction1, correction2_root, eps, update_decay)
    if TRUST:
        u = tl.where(mask, u, 0.0)  # with eps = 0 the direction of nothing is 0 / 0
        program = tl.program_id(0)
        tl.store(sums + 2 * program, tl.sum(p * p))
        tl.store(sums + 2 * program + 1, tl.sum(u * u))
    else:
        tl.store(parameter + offsets, p - lr * u, mask=mask)


@triton.jit
def _ratios(sums, starts, ratios, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Trust ratio of a tensor a program, from the sums of its blocks (float64 in between)."""
    tensor = tl.program_id(0)
    begin = tl.load(starts + tensor)
    end = tl.load(starts + tensor + 1)
    offsets = tl.arange(0, BLOCK)
    weight = tl.zeros([BLOCK], dtype=tl.float64)
    update = tl.zeros([BLOCK], dtype=tl.float64)
    block = begin
    while block < end:  # a range would not run in the interpreter
        mask = block + offsets < end
        weight += tl.load(sums + 2 * (block + offsets), mask=mask, other=0.0).to(tl.float64)
        update += tl.load(sums + 2 * (block + offsets) + 1, mask=mask, other=0.0).to(tl.float64)
        block += BLOCK
    weight_norm = tl.sqrt(tl.sum(weight)).to(tl.float32)
    update_norm = tl.sqrt(tl.sum(update)).to(tl.float32)
    usable = (weight_norm != 0) & (update_norm != 0)
    tl.store(ratios + tensor, tl.where(usable, tl.div_rn(weight_norm, tl.where(usable, update_norm, 1.0)), 1.0))


@triton.jit
def _apply(  # type: ignore[no-untyped-def]
    table, blocks, control, ratios, lr, correction1, correction2_root, eps, update_decay,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 2: the parameters."""
    tensor, parameter, _, first, second, left = _locate(table, blocks, control, VECTOR, BLOCK)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < left
    p = tl.load(parameter + offsets, mask=mask, other=0.0)
    m = tl.load(first + offsets, mask=mask, other=0.0)
    v = tl.load(second + offsets, mask=mask, other=0.0)
    u = _direction(p, m, v, correction1, correction2_root, eps, update_decay)
    tl.store(parameter + offsets, p - (lr * tl.load(ratios + tensor)) * u, mask=mask)


@dataclasses.dataclass
class _Launch:
    """Tensors that one launch covers, and its tables on the device.

    ``table`` int64 [tensors, 5]: addresses of parameter, gradient, first and second moment, number of elements. ``blocks`` int32
    [blocks, 2]: number of the tensor and of the block in it. ``starts`` int32 [tensors + 1]: where a tensor's blocks begin.
    ``sums`` float32 [blocks, 2], ``ratios`` float32 [tensors]: scratch.
    """

    rows: tuple[tuple[int, ...], ...]
    vector: int
    table: Tensor
    blocks: Tensor
    starts: Tensor
    sums: Tensor
    ratios: Tensor

    @classmethod
    def of(cls, rows: tuple[tuple[int, ...], ...], vector: int, device: torch.device) -> _Launch:
        counts = torch.tensor([-(-row[4] // _BLOCK) for row in rows], dtype=torch.int64)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        tensor = torch.repeat_interleave(torch.arange(len(rows)), counts)
        blocks = torch.stack([tensor, torch.arange(len(tensor)) - starts[tensor]], dim=1)
        return cls(
            rows,
            vector,
            _on(device, torch.tensor(rows, dtype=torch.int64)),
            _on(device, blocks.to(torch.int32)),
            _on(device, starts.to(torch.int32)),
            torch.zeros(len(tensor), 2, device=device),
            torch.ones(len(rows), device=device),
        )

    def moved(self, rows: tuple[tuple[int, ...], ...]) -> _Launch:
        """The same tensors at other addresses."""
        return dataclasses.replace(self, rows=rows, table=_on(self.table.device, torch.tensor(rows, dtype=torch.int64)))

    def run(self, rule: optimization.Rule, control: Tensor) -> None:
        shape = {"VECTOR": self.vector, "BLOCK": _BLOCK, "num_warps": _WARPS}
        shared = (rule.correction1, rule.correction2_root, rule.eps)
        grid = (len(self.blocks),)
        _advance[grid](
            self.table, self.blocks, control, self.sums, rule.lr, rule.beta1, rule.beta2, rule.beta3, 1.0 - rule.beta2, *shared,
            rule.gradient_decay, rule.update_decay, TRUST=rule.trust_ratio, **shape,
        )  # fmt: skip
        if rule.trust_ratio:
            _ratios[(len(self.rows),)](self.sums, self.starts, self.ratios, BLOCK=_SUMS_BLOCK)
            _apply[grid](self.table, self.blocks, control, self.ratios, rule.lr, *shared, rule.update_decay, **shape)


class TritonLamb(optimization.Lamb):
    """:class:`optimization.Lamb` by the kernels of this module. The host waits for nothing, unless ``found_inf`` is given.

    When the gradient norm (given or computed) is not finite, parameters and moments stay as they are, though the step was counted, because
    the host does not know: :meth:`undo_step` takes the counts back, for whoever reads the norm afterwards. Gradients of other types
    or layouts are copied. ``ValueError`` for parameters that are not contiguous float32 tensors of one device.
    """

    guards_nonfinite = True

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, **options)
        self._launches: dict[int, list[_Launch]] = {}
        self._norm_before: Tensor | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As Lamb's; ``ValueError`` for parameters that the kernels cannot update."""
        super().add_param_group(param_group)
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype != torch.float32 or not parameter.is_contiguous() or parameter.device != device:
                raise ValueError(
                    f"TritonLamb needs contiguous float32 parameters of one device ({device}), got {parameter.dtype} of shape "
                    f"{list(parameter.shape)} on {parameter.device}; optimization.Lamb takes them"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has other addresses: its tables are made anew."""
        super().__setstate__({"_launches": {}, "_norm_before": None, **state})

    def undo_step(self) -> None:
        """Take back what the last :meth:`step` counted; right only after one whose gradient norm was not finite."""
        for group in self.param_groups:
            group["step"] -= 1
        self.grad_norm = self._norm_before

    def _divisor(self, gradients: list[Tensor], grad_scale: Any, grad_norm: Any) -> Tensor:
        """The divisor of the gradients, and whether it and the norm are finite (1 or 0): float32 [2], computed on the device."""
        self._norm_before = self.grad_norm
        divisor = super()._divisor(gradients, grad_scale, grad_norm)
        assert self.grad_norm is not None
        finite = torch.isfinite(divisor) & torch.isfinite(self.grad_norm)
        return torch.stack([divisor, finite.to(divisor.dtype)]).float()

    def _update(self, number: int, rule: optimization.Rule, pairs: list[tuple[Tensor, Tensor]], divisor: Tensor) -> None:
        """Update group ``number``; ``divisor`` is what :meth:`_divisor` gave."""
        quads = [(parameter, gradient.to(torch.float32).contiguous(), *self._moments(parameter)) for parameter, gradient in pairs]
        rows = [(*(tensor.data_ptr() for tensor in quad), quad[0].numel()) for quad in quads if quad[0].numel()]
        if not rows:
            return
        device = quads[0][0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self._launches[number] = _launches(rows, device, self._launches.get(number, []))
            for launch in self._launches[number]:
                launch.run(rule, divisor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Lamb's; moments that were saved in another layout are made contiguous."""
        super().load_state_dict(state_dict)
        for moments in self.state.values():
            for key, moment in moments.items():
                moments[key] = moment.contiguous()


def _launches(rows: list[tuple[int, ...]], device: torch.device, before: list[_Launch]) -> list[_Launch]:
    """Tensors that 16-byte loads suit, and the others; with the tables of ``before`` as far as they are still right."""
    kinds: dict[int, list[tuple[int, ...]]] = {}
    for row in rows:
        suits = row[4] % _VECTOR == 0 and all(address % (4 * _VECTOR) == 0 for address in row[:4])
        kinds.setdefault(_VECTOR if suits else 1, []).append(row)
    known = {launch.vector: launch for launch in before}
    found = []
    for vector, listed in kinds.items():
        wanted, launch = tuple(listed), known.get(vector)
        if launch is None or [row[4] for row in launch.rows] != [row[4] for row in wanted]:
            launch = _Launch.of(wanted, vector, device)
        elif launch.rows != wanted:
            launch = launch.moved(wanted)
        found.append(launch)
    return found


def _on(device: torch.device, table: Tensor) -> Tensor:
    """A small table on ``device``, through pinned memory: the host does not wait for the copy."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
