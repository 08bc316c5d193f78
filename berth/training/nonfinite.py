"""Which gradients are not finite, in words: after a step whose gradient norm is not.

In: a rank's gradients, or its pieces of them, by name. Out: the names, the same on all ranks, and a sentence that says where in the
model they are and where in the backward pass it began. It runs after bad steps only; the norm decides which those are.

Rejected: ``isnan(tensor).any()`` tensor by tensor (a wait for the GPU each); the 2-norm (sums of squares overflow though all is finite).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a layer inside a parameter's name: the first number between dots."""


@torch.no_grad()
def nonfinite_names(
    named_gradients: Iterable[tuple[str, Tensor | None]], sum_: Callable[[Tensor], Tensor], device: torch.device | None = None
) -> list[tuple[str, str]]:
    """Names of the tensors with a value that is not finite on any rank, in the order given, each with 'nan' or (no NaN, but) 'inf'.

    Args:
        named_gradients: the same names in the same order on every rank; the tensor is the rank's whole gradient, its piece, an empty
            one, or ``None``.
        sum_: adds a float32 tensor of shape [names, 2] up over the ranks that hold pieces; called once, also where nothing is bad.
        device: where that tensor is made; by default where the first gradient is, else the CPU.
    """
    named = list(named_gradients)
    if not named:
        return []
    held = [(index, tensor) for index, (_, tensor) in enumerate(named) if tensor is not None and tensor.numel()]
    if device is None:
        device = next((tensor.device for _, tensor in named if tensor is not None), torch.device("cpu"))
    counts = torch.zeros(len(named), 2, device=device)
    if held:
        # the largest magnitude is NaN where a NaN is, infinite where (else) an infinity is, and never overflows
        largest = torch.stack([norm.to(device, torch.float32) for norm in torch._foreach_norm([t for _, t in held], float("inf"))])
        indices = torch.tensor([index for index, _ in held], device=device)
        counts[indices] = torch.stack([largest.isnan(), largest.isinf()], dim=1).float()
    bad = (sum_(counts) > 0).tolist()
    return [(name, "nan" if nan else "inf") for (name, _), (nan, inf) in zip(named, bad, strict=True) if nan or inf]


def describe(found: Sequence[tuple[str, str]], names: Sequence[str] = (), limit: int = 5) -> str:
    """``found`` for a message, for instance ``bert.encoder.layer.{3-23}.output.dense.weight and 40 more of 398 tensors, all nan``.

    Args:
        found: what :func:`nonfinite_names` returned.
        names: all names that were looked at, in the order of the model; with them the number of tensors is said, and where in the
            backward pass it began.
        limit: groups of equal tensors of several layers that are named.
    """
    if not found:
        return "no single value: every gradient is finite, their norm is too large for a number"
    kinds = sorted({kind for _, kind in found})
    alike = len(kinds) == 1
    groups: dict[tuple[str, str], list[str]] = {}
    for name, kind in found:
        groups.setdefault((_LAYER.sub("{}", name, count=1), kind), []).append(name)
    listed = list(groups.items())[:limit]
    shown = ", ".join(_folded(pattern, members) + ("" if alike else f" ({kind})") for (pattern, kind), members in listed)
    more = len(found) - sum(len(members) for _, members in listed)
    total = f" of {len(names)} tensors" if names else ""
    if more:
        shown += f" and {more} more{total}"
    elif total:
        shown += f" ({len(found)}{total})"
    return shown + (f", all {kinds[0]}" if alike and len(found) > 1 else f", {kinds[0]}" if alike else "") + _origin(found, names)


def _folded(pattern: str, members: list[str]) -> str:
    """``a.{3-5,7}.b`` for a.3.b, a.4.b, a.5.b and a.7.b."""
    if len(members) == 1:
        return members[0]
    return pattern.replace("{}", "{" + _ranges([_layer(name) for name in members]) + "}", 1)


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _layer(name: str) -> int:
    """The number of the layer, -1 outside the layers."""
    match = _LAYER.search(name)
    return int(match.group()) if match else -1


def _origin(found: Sequence[tuple[str, str]], names: Sequence[str]) -> str:
    """Where it began, as far as the names tell: the backward pass goes from the last layer to the first, and what is bad spreads."""
    last = max((_layer(name) for name in names), default=-1)
    bad = {_layer(name) for name, _ in found}
    if last < 0:
        return ""
    if len(found) == len(names):
        return "; every gradient is bad, so the loss or the forward pass was"
    highest = max(bad)
    if 0 <= highest < last:
        good = f"layer {last} is" if highest + 1 == last else f"layers {highest + 1}-{last} are"
        return f"; {good} finite, and the backward pass reaches what comes last first: it began in layer {highest}"
    return ""
