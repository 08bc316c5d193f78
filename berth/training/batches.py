"""Samples -> the micro-batches of one optimizer step, as torch tensors.

Step ``s`` of a run takes the next ``global_batch`` numbers of the stream. Rank ``r`` of ``W`` takes the ``r``-th of ``W`` equal
contiguous slices, cuts it into ``accumulation`` micro-batches, and trims every micro-batch to its longest sequence. With
``group_by_length`` the rank's slice is first sorted by length, which makes the micro-batches homogeneous and saves padding;
the loss is normalised over the global batch, so the step stays the same.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from isal import isal_zlib
from numpy.typing import NDArray

from berth.errors import DataError
from berth.records.reader import SampleStream
from berth.records.rows import NO_LABEL, Rows, flat_places, masked_places

PAD_MULTIPLE = 8
IGNORED = NO_LABEL


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One forward pass. ``B`` sequences of ``S`` tokens, ``M`` masked tokens.

    ``input_ids``, ``labels`` [B, S] (labels -100 where not masked); ``attention_mask`` bool [B, S]; ``token_type_ids`` [B, S];
    ``next_sentence_label`` [B] (-100: no sentence pair); ``masked_index`` int64 [M], flat positions of the labels.

    Integers are int32 and int8 as they are read: half to an eighth of the bytes to fill and to copy. :meth:`to` makes them int64, which
    the model takes, on the device.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor
    labels: torch.Tensor
    next_sentence_label: torch.Tensor
    masked_index: torch.Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to ``device`` without waiting for it; all integers int64 there."""
        tensors = (getattr(self, field.name) for field in dataclasses.fields(self))
        if device.type != "cpu":
            tensors = (tensor.contiguous().pin_memory().to(device, non_blocking=True) for tensor in tensors)
        return MicroBatch(*(tensor if tensor.dtype is torch.bool else tensor.long() for tensor in tensors))


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """What one rank feeds into one optimizer step.

    ``first_sample``: stream number of the global batch's first sample; ``sequences``, ``tokens`` (real ones, without padding) and
    ``masked`` count this rank's share, ``squares`` adds up its squared lengths; ``checksum``: CRC-32 of the share's token ids in stream
    order, ``bytes`` of them, for :func:`combined_crc`.
    """

    first_sample: int
    micro_batches: tuple[MicroBatch, ...]
    sequences: int
    tokens: int
    squares: int
    masked: int
    checksum: int
    bytes: int


def combined_crc(crcs: Sequence[int], bytes_each: int) -> int:
    """CRC-32 of the global batch's token ids in stream order, from those of the ranks' shares in the order of ranks; the same for every
    number of ranks."""
    whole = 0
    for crc in crcs:
        whole = isal_zlib.crc32_combine(whole, crc, bytes_each)
    return whole


def to_micro_batch(rows: Rows, lengths: NDArray[np.int64] | None = None) -> MicroBatch:
    """Turn rows into tensors: labels scattered to their positions, trailing padding common to all rows cut off.

    ``lengths`` are the rows' real tokens, if the caller has counted them. Tensors share memory with ``rows`` where they can.
    Raises :class:`DataError` for a masked position in the padding, whose label would go to the next row.
    """
    lengths = rows.lengths() if lengths is None else lengths
    width = int(lengths.max()) if len(rows) else 1
    width = min(-(-width // PAD_MULTIPLE) * PAD_MULTIPLE, rows.input_ids.shape[1])
    valid = masked_places(rows)
    if rows.masked_lm_positions.max(initial=0) >= width and (valid & (rows.masked_lm_positions >= width)).any():
        raise DataError(
            "a masked position lies behind the last token of its row; check the records with data/verify.py and make them again"
        )
    index = flat_places(rows, valid, width)
    labels = np.full(len(rows) * width, IGNORED, dtype=np.int32)
    labels[index] = rows.masked_lm_ids[valid]
    if (index[1:] <= index[:-1]).any():  # positions that are not ascending, which only other programs write
        index = np.flatnonzero(labels != IGNORED)
    return MicroBatch(
        input_ids=torch.from_numpy(rows.input_ids[:, :width]),
        attention_mask=torch.from_numpy(rows.input_mask[:, :width] != 0),
        token_type_ids=torch.from_numpy(rows.segment_ids[:, :width]),
        labels=torch.from_numpy(labels.reshape(len(rows), width)),
        next_sentence_label=torch.from_numpy(rows.next_sentence_labels),
        masked_index=torch.from_numpy(index),
    )


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: the batch algebra of one rank."""

    global_batch: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int
    group_by_length: bool = True

    def __post_init__(self) -> None:
        assert self.micro_batch * self.accumulation * self.world_size == self.global_batch

    def build(self, stream: SampleStream, first_sample: int) -> StepBatch:
        """The micro-batches of the step that starts at ``first_sample``, for this rank."""
        share = self.micro_batch * self.accumulation
        rows = stream.rows(first_sample + self.rank * share, share)
        ids = _full_width(rows.input_ids, stream.index.seq_length)
        checksum = isal_zlib.crc32(ids)
        lengths = rows.lengths()
        if self.group_by_length and self.accumulation > 1:
            order = np.argsort(lengths, kind="stable")
            rows, lengths = rows.take(order), lengths[order]
        cuts = [slice(at, at + self.micro_batch) for at in range(0, share, self.micro_batch)]
        micro = tuple(to_micro_batch(rows.take(cut), lengths[cut]) for cut in cuts)
        masked = sum(len(batch.masked_index) for batch in micro)
        return StepBatch(first_sample, micro, share, int(lengths.sum()), int((lengths**2).sum()), masked, checksum, ids.nbytes)


def _full_width(ids: NDArray, width: int) -> NDArray:
    """int32 [N, width]: as they are, or padded. Binned records come as wide as the widest row asked for, so that the checksum of a rank's
    share would depend on what other ranks read."""
    if ids.shape[1] == width:
        return np.ascontiguousarray(ids, np.int32)
    padded = np.zeros((len(ids), width), np.int32)
    padded[:, : ids.shape[1]] = ids
    return padded


def step_batches(stream: SampleStream, plan: BatchPlan, first_sample: int, prefetch: int) -> Iterator[StepBatch]:
    """Endless iterator over the steps' batches from ``first_sample`` on.

    ``prefetch`` steps are prepared ahead by one thread (numpy and hdf5 release the interpreter lock for the heavy parts); 0
    prepares them in the caller. An error in the thread is raised in the caller. Closing the iterator ends the thread.
    """
    if prefetch == 0:
        while True:
            yield plan.build(stream, first_sample)
            first_sample += plan.global_batch
    ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=prefetch)
    stopped = threading.Event()

    def produce() -> None:
        at = first_sample
        try:
            while not stopped.is_set():
                item = plan.build(stream, at)
                at += plan.global_batch
                _put(ready, item, stopped)
        except BaseException as error:  # handed to the caller, which raises it
            _put(ready, error, stopped)

    thread = threading.Thread(target=produce, name="berth-batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(timeout=10)


def _put(ready: queue.Queue[StepBatch | BaseException], item: StepBatch | BaseException, stopped: threading.Event) -> None:
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
            return
        except queue.Full:
            continue
