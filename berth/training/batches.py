"""Samples -> the micro-batches of one optimizer step, as torch tensors.

Step ``s`` of a run takes the next ``global_batch`` numbers of the stream. Rank ``r`` of ``W`` takes the ``r``-th of ``W`` equal
contiguous slices and cuts it into ``accumulation`` micro-batches of ``B`` sequences. The loss is normalised over the global batch, so the
step is the same however it is cut. Two forms:

*Packed* (``unpad``): tokens end to end, no padding but a few filler tokens that round their number up. Sequences are dealt to the
micro-batches in snake order of length, so that all have nearly the same number of tokens, and lie in falling order of length.

*Padded*: micro-batches are trimmed to their longest sequence; sorting the slice by length first (``group_by_length``) makes them
homogeneous and saves padding.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from isal import isal_zlib
from numpy.typing import NDArray

from berth.errors import DataError
from berth.records.reader import SampleStream
from berth.records.rows import NO_LABEL, Rows, flat_places, masked_places

PAD_MULTIPLE = 8
IGNORED = NO_LABEL
PACK_MULTIPLE = 16
"""Packed tokens, and rows picked out of them, are rounded up to a multiple of this: fp8 matrix products need 16 rows."""
GRANULES = 64
"""Into how many parts a full micro-batch is cut where shapes should be few (:attr:`BatchPlan.few_shapes`)."""


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One forward pass: ``B`` sequences padded to ``S`` tokens, or packed end to end as ``T`` tokens.

    ``input_ids``, ``token_type_ids``, ``labels`` [B, S] or [T] (labels -100 where not masked); ``masked_index`` int64 [M], flat positions of
    the labels; ``next_sentence_label`` [B] (-100: no sentence pair). ``masked`` counts the labels.

    Padded only: ``attention_mask`` bool [B, S]. Packed only: ``position_ids`` [T], ``cu_seqlens`` int32 [C + 1] with the sequences' bounds,
    fillers included, ``max_seqlen``; ``next_sentence_label`` is [C], -100 at fillers, and ``masked_index`` may be longer than ``masked``:
    surplus entries point at a position without a label.

    Integers are int32 and int8 as they are read: half to an eighth of the bytes to fill and to copy. :meth:`to` makes them int64, which
    the model takes, on the device; ``cu_seqlens`` stays int32, which attention takes.
    """

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    labels: torch.Tensor
    next_sentence_label: torch.Tensor
    masked_index: torch.Tensor
    masked: int
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int | None = None

    @property
    def packed(self) -> bool:
        """Whether it holds tokens end to end."""
        return self.cu_seqlens is not None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name of the field; fields without one are left out."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if isinstance(value, torch.Tensor)}

    def arguments(self) -> dict[str, Any]:
        """What the model takes, by name; the denominators are the caller's."""
        values: dict[str, Any] = self.tensors()
        return values | {"max_seqlen": self.max_seqlen} if self.packed else values

    def to(self, device: torch.device) -> MicroBatch:
        """On ``device``; all integers but ``cu_seqlens`` int64 there. (For a GPU see :mod:`berth.training.transfer`, which does not wait.)"""
        values: dict[str, Any] = {name: as_model_takes(name, value.to(device)) for name, value in self.tensors().items()}
        return dataclasses.replace(self, **values)


def as_model_takes(name: str, value: torch.Tensor) -> torch.Tensor:
    """A field of a micro-batch in the type the model takes: int64, but ``attention_mask`` bool and ``cu_seqlens`` int32."""
    return value if name in ("attention_mask", "cu_seqlens") else value.long()


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
    """Turn rows into padded tensors: labels scattered to their positions, trailing padding common to all rows cut off.

    ``lengths`` are the rows' real tokens, if the caller has counted them. Tensors share memory with ``rows`` where they can.
    Raises :class:`DataError` for a masked position in the padding, whose label would go to the next row.
    """
    lengths = rows.lengths() if lengths is None else lengths
    width = int(lengths.max()) if len(rows) else 1
    width = min(_rounded(width, PAD_MULTIPLE), rows.input_ids.shape[1])
    valid = masked_places(rows)
    if rows.masked_lm_positions.max(initial=0) >= width and (valid & (rows.masked_lm_positions >= width)).any():
        raise DataError(_BEHIND)
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
        masked=len(index),
    )


def to_packed(rows: Rows, lengths: NDArray[np.int64] | None = None, *, max_seqlen: int, few_shapes: bool = False) -> MicroBatch:
    """Turn rows into packed tensors, in their order.

    ``lengths`` as in :func:`to_micro_batch`; ``max_seqlen``: the longest a row can be. ``few_shapes`` rounds the number of tokens and of
    masked tokens up to a :data:`GRANULES`-th of a full micro-batch, otherwise to :data:`PACK_MULTIPLE`.
    Raises :class:`DataError` for a masked position behind the last token of its row.
    """
    lengths = rows.lengths() if lengths is None else lengths
    valid = masked_places(rows)
    if (valid & (rows.masked_lm_positions >= lengths[:, None])).any():
        raise DataError(_BEHIND)
    full, most = len(rows) * max_seqlen, rows.masked_lm_positions.shape[1] * len(rows)
    granule, masked_granule = (_rounded(-(-size // GRANULES), PACK_MULTIPLE) if few_shapes else PACK_MULTIPLE for size in (full, most))
    ends = np.cumsum(lengths)
    starts, real = ends - lengths, int(ends[-1])
    total = _rounded(real, granule)
    fillers = -(-(granule - 1) // max_seqlen)  # slots, so that their number is the same in every micro-batch
    bounds = np.empty(len(rows) + fillers + 1, np.int32)
    bounds[0], bounds[1 : len(rows) + 1] = 0, ends
    bounds[len(rows) + 1 :] = np.minimum(real + max_seqlen * np.arange(1, fillers + 1), total)

    where = _token_places(rows, lengths)  # places in the rows laid flat, in the order of the packed tokens
    index = (rows.masked_lm_positions + starts[:, None])[valid]
    labels = np.full(total, IGNORED, np.int32)
    labels[index] = rows.masked_lm_ids[valid]
    masked = np.flatnonzero(labels[:real] != IGNORED)
    surplus = _rounded(max(len(masked), 1), masked_granule) - len(masked)
    pairs = np.full(len(bounds) - 1, IGNORED, np.int32)
    pairs[: len(rows)] = rows.next_sentence_labels
    return MicroBatch(
        input_ids=torch.from_numpy(_padded_take(rows.input_ids, where, total)),
        token_type_ids=torch.from_numpy(_padded_take(rows.segment_ids, where, total)),
        position_ids=torch.from_numpy(_fitted(where - np.repeat(np.arange(len(rows)) * rows.input_ids.shape[1], lengths), total)),
        labels=torch.from_numpy(labels),
        next_sentence_label=torch.from_numpy(pairs),
        masked_index=torch.from_numpy(np.append(masked, np.zeros(surplus, np.int64))),  # [CLS] has no label
        masked=len(masked),
        cu_seqlens=torch.from_numpy(bounds),
        max_seqlen=max_seqlen,
    )


_BEHIND = "a masked position lies behind the last token of its row; check the records with data/verify.py and make them again"


def _token_places(rows: Rows, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [sum of lengths]: places of the real tokens in an array [N, L] laid flat."""
    width = rows.input_ids.shape[1]
    skipped = np.arange(len(rows)) * width - (np.cumsum(lengths) - lengths)
    return np.arange(int(lengths.sum())) + np.repeat(skipped, lengths)


def _padded_take(values: NDArray, where: NDArray[np.int64], total: int) -> NDArray[np.int32]:
    """int32 [total]: the entries ``where`` of ``values`` laid flat, then zeros."""
    return _fitted(values.reshape(-1).take(where, mode="clip"), total)


def _fitted(values: NDArray, total: int) -> NDArray[np.int32]:
    fitted = np.zeros(total, np.int32)
    fitted[: len(values)] = values
    return fitted


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: the batch algebra of one rank.

    ``group_by_length``: deal sequences to the micro-batches by their length, else in the order of the stream. ``unpad``: packed
    micro-batches. ``few_shapes``: of few different sizes (:func:`to_packed`), for CUDA graphs.
    """

    global_batch: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int
    group_by_length: bool = True
    unpad: bool = False
    few_shapes: bool = False

    def __post_init__(self) -> None:
        assert self.micro_batch * self.accumulation * self.world_size == self.global_batch

    def build(self, stream: SampleStream, first_sample: int) -> StepBatch:
        """The micro-batches of the step that starts at ``first_sample``, for this rank."""
        share = self.micro_batch * self.accumulation
        rows = stream.rows(first_sample + self.rank * share, share)
        ids = _full_width(rows.input_ids, stream.index.seq_length)
        checksum = isal_zlib.crc32(ids)
        lengths = rows.lengths()
        if self.group_by_length and (self.unpad or self.accumulation > 1):
            order = self._dealt(lengths) if self.unpad else np.argsort(lengths, kind="stable")
            rows, lengths = rows.take(order), lengths[order]
        cuts = [slice(at, at + self.micro_batch) for at in range(0, share, self.micro_batch)]
        micro = tuple(self._micro_batch(rows.take(cut), lengths[cut], stream.index.seq_length) for cut in cuts)
        masked = sum(batch.masked for batch in micro)
        return StepBatch(first_sample, micro, share, int(lengths.sum()), int((lengths**2).sum()), masked, checksum, ids.nbytes)

    def _dealt(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Order of the share in which every micro-batch gets its sequences in falling order of length, and about as many tokens as others:
        forth and back like a snake over the micro-batches."""
        rounds = np.argsort(-lengths, kind="stable").reshape(self.micro_batch, self.accumulation)
        rounds[1::2] = rounds[1::2, ::-1].copy()
        return rounds.T.reshape(-1)

    def _micro_batch(self, rows: Rows, lengths: NDArray[np.int64], longest: int) -> MicroBatch:
        if self.unpad:
            return to_packed(rows, lengths, max_seqlen=longest, few_shapes=self.few_shapes)
        return to_micro_batch(rows, lengths)


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
