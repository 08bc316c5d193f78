"""Micro-batches on their way to a GPU, and numbers on their way back, without a wait for either.

In: micro-batches in CPU memory. Out: the same ones on the device, in the types the model takes. All tensors of a micro-batch lie in one
pinned buffer and travel in one copy, in the types they were read in (half to an eighth of the bytes), on a stream of their own while the
micro-batch before is computed. On a CPU nothing is copied that need not be.

Rejected: a copy for each tensor (seven launches and seven pinned buffers); one pinned buffer for the whole run (the host would have to wait
until it is free; torch keeps freed ones for the next micro-batch and knows when they are).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from berth.training.batches import MicroBatch, as_model_takes

ALIGNMENT = 256
"""Bytes to a multiple of which a tensor begins in the buffer, as the allocator of CUDA memory would place it."""


class Place(NamedTuple):
    """Where a field of a micro-batch lies in a buffer of bytes."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int

    @property
    def bytes(self) -> int:
        """How many it takes."""
        return self.shape.numel() * self.dtype.itemsize


def layout(micro: MicroBatch) -> tuple[list[Place], int]:
    """Places of all tensors of ``micro``, and the bytes they take together."""
    places, end = [], 0
    for name, tensor in micro.tensors().items():
        places.append(Place(name, tensor.dtype, tensor.shape, end))
        end += -(-places[-1].bytes // ALIGNMENT) * ALIGNMENT
    return places, end


def pack(micro: MicroBatch, places: Iterable[Place], buffer: Tensor) -> None:
    """Copy the tensors of ``micro`` to their places in ``buffer``, uint8 in CPU memory."""
    tensors = micro.tensors()
    for place in places:
        _view(buffer, place).copy_(tensors[place.name])


def unpack(micro: MicroBatch, places: Iterable[Place], buffer: Tensor) -> MicroBatch:
    """``micro`` with its tensors taken from ``buffer`` (uint8, on any device), in the types the model takes; what is no tensor stays."""
    tensors: dict[str, Any] = {place.name: as_model_takes(place.name, _view(buffer, place)) for place in places}
    return dataclasses.replace(micro, **tensors)


def _view(buffer: Tensor, place: Place) -> Tensor:
    return buffer[place.start : place.start + place.bytes].view(place.dtype).view(place.shape)


class Copier(Protocol):
    """Copies in two halves, so that there can be work in between."""

    def start(self, micro: MicroBatch) -> Any: ...

    def finish(self, under_way: Any) -> MicroBatch: ...


class _CudaCopier:
    """To a GPU on a side stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def start(self, micro: MicroBatch) -> Any:
        places, size = layout(micro)
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        pack(micro, places, pinned)
        with torch.cuda.stream(self._stream):
            there = pinned.to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return micro, places, there, arrived

    def finish(self, under_way: Any) -> MicroBatch:
        micro, places, there, arrived = under_way
        current = torch.cuda.current_stream(self._device)
        current.wait_event(arrived)
        there.record_stream(current)
        return unpack(micro, places, there)


class _InPlace:
    """Where nothing is gained by starting early."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self, micro: MicroBatch) -> MicroBatch:
        return micro

    def finish(self, under_way: MicroBatch) -> MicroBatch:
        return under_way.to(self._device)


@functools.cache
def copier(device: torch.device) -> Copier:
    """The one for ``device``."""
    return _CudaCopier(device) if device.type == "cuda" else _InPlace(device)


def prefetched(
    micro_batches: Iterable[MicroBatch], device: torch.device, ahead: int = 1, using: Copier | None = None
) -> Iterator[MicroBatch]:  # fmt: skip
    """``micro_batches`` (of one step: nothing is copied while the step before is computed) on ``device``, in their order.

    Args:
        ahead: how many are under way while the caller works on one. 0 copies each with plain calls when it is asked for.
        using: copies; None = :func:`copier`.
    """
    if ahead == 0:
        yield from (micro.to(device) for micro in micro_batches)
        return
    using = using or copier(device)
    under_way: collections.deque[Any] = collections.deque()
    for micro in micro_batches:
        under_way.append(using.start(micro))
        if len(under_way) > ahead:
            yield using.finish(under_way.popleft())
    while under_way:
        yield using.finish(under_way.popleft())


class Arriving:
    """A number on its way to the host. What is launched after this object was made is not waited for.

    Args:
        number: 0-dim, not changed until it is read.
    """

    def __init__(self, number: Tensor) -> None:
        self._here, self._arrived = number, None
        if number.is_cuda:
            self._here = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._here.copy_(number, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(number.device))

    def value(self) -> float:
        """The number; waits until it is here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._here)
