"""Held-out evaluation: MLM loss and accuracy, NSP accuracy, beside what knowing nothing would score.

The baselines come from the same shard, all of it: the entropy of its unigram distribution (the least loss of a model that ignores
the context), the share of its most frequent token among the masked ones, and the share of the more frequent NSP label. Rejected:
the entropy of the masked tokens alone; with a few thousand of them over a vocabulary of as many entries it is 0.1 to 0.3 nat low.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from berth.errors import DataError
from berth.records.reader import RecordsIndex, Rows, SampleStream
from berth.training.batches import IGNORED, to_micro_batch
from berth.training.distributed import Communicator
from berth.training.precision import Precision

BASELINE_ROWS = 1 << 16  # rows the baselines are taken from when the evaluation is limited


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Scores of ignorance on one shard: nats, and shares in [0, 1]."""

    unigram_entropy: float
    most_frequent_token_accuracy: float
    most_frequent_nsp_accuracy: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over a whole shard: losses in nats (MLM a masked token, NSP a sequence), accuracies in [0, 1]."""

    mlm_loss: float
    mlm_accuracy: float
    nsp_loss: float
    nsp_accuracy: float
    sequences: int
    masked_tokens: int


class HeldOut:
    """A held-out shard in memory and its baselines.

    Args:
        index: the test records.
        vocab_size: of the model; ids are checked against it.
        limit: score this many sequences from the front (0 = all, which are then all in memory).

    Raises :class:`DataError` when it has no masked token.
    """

    def __init__(self, index: RecordsIndex, vocab_size: int, limit: int = 0) -> None:
        count = min(index.rows, limit) if limit else index.rows
        seen = index.rows if not limit else min(index.rows, max(limit, BASELINE_ROWS))
        whole = SampleStream(index, seed=0, vocab_size=vocab_size, shuffle=False).rows(0, seen)
        self.baselines = baselines(whole)
        self.rows = whole.take(slice(0, count))
        # longest last: batches of similar length waste little padding
        self.rows = self.rows.take(np.argsort(self.rows.input_mask.sum(axis=1, dtype=np.int64), kind="stable"))

    def evaluate(self, model: nn.Module, precision: Precision, communicator: Communicator, batch_size: int) -> Evaluation:
        """Run the whole shard through ``model`` (the bare module), split over ranks; every rank gets the same result."""
        model.eval()
        totals = torch.zeros(6, dtype=torch.float64, device=communicator.device)
        share = self.rows.take(slice(communicator.rank, None, communicator.world_size))
        with torch.no_grad():
            for at in range(0, len(share), batch_size):
                totals += _score(model, share.take(slice(at, at + batch_size)), precision, communicator.device)
        mlm, correct, masked, nsp, nsp_correct, sequences = communicator.sum(totals.tolist())
        return Evaluation(
            mlm / max(masked, 1), correct / max(masked, 1), nsp / sequences, nsp_correct / sequences, int(sequences), int(masked)
        )


def _score(model: nn.Module, rows: Rows, precision: Precision, device: torch.device) -> torch.Tensor:
    """[summed MLM loss, correct tokens, masked tokens, summed NSP loss, correct NSP, sequences] of one batch."""
    batch = to_micro_batch(rows).to(device)
    arguments: dict[str, Any] = {}
    has_nsp = hasattr(model, "cls") and hasattr(model.cls, "seq_relationship")
    if has_nsp:
        arguments = {"next_sentence_label": batch.next_sentence_label, "nsp_denominator": 1}
    with precision.autocast():
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            token_type_ids=batch.token_type_ids,
            labels=batch.labels,
            masked_index=batch.masked_index,
            mlm_denominator=1,
            **arguments,
        )
    logits = output.prediction_logits if has_nsp else output.logits
    if logits.dim() == 3:  # a model that projects every position
        logits = logits.flatten(0, 1)[batch.masked_index]
    labels = batch.labels[batch.labels != IGNORED]
    values = [output.mlm_loss if has_nsp else output.loss, (logits.argmax(-1) == labels).sum(), labels.numel()]
    if has_nsp:
        values += [output.nsp_loss, (output.seq_relationship_logits.argmax(-1) == batch.next_sentence_label).sum()]
    else:
        values += [0, 0]
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in (*values, len(rows))])


def baselines(rows: Rows) -> Baselines:
    """Baselines of a shard.

    Unigram entropy: ``-sum p ln p`` in nats over the ordinary tokens of the shard: masks undone, [CLS] and [SEP] (first and last
    token of a row), which are never masked, left out. Raises :class:`DataError` when no token is masked.
    """
    valid = np.cumprod(rows.masked_lm_positions != 0, axis=1).astype(bool)
    labels = rows.masked_lm_ids[valid]
    if not labels.size:
        raise DataError("the held-out records hold no masked token; nothing can be evaluated")
    row, column = np.nonzero(valid)
    original = rows.input_ids.copy()
    original[row, rows.masked_lm_positions[row, column]] = labels
    lengths = rows.input_mask.sum(axis=1, dtype=np.int64)
    frame = np.union1d(original[:, 0], original[np.arange(len(rows)), lengths - 1])
    tokens = original[rows.input_mask.astype(bool)]
    counts = np.bincount(tokens[~np.isin(tokens, frame)])
    share = counts[counts > 0] / counts.sum()
    positive = float(rows.next_sentence_labels.mean())
    return Baselines(float(-(share * np.log(share)).sum()), float((labels == counts.argmax()).mean()), max(positive, 1 - positive))
