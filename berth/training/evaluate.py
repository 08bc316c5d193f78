"""Held-out evaluation: MLM loss and accuracy, NSP accuracy, beside what knowing nothing would score.

The baselines come from the same shard, all of it: the entropy of its unigram distribution (the least loss of a model that ignores
the context), the share of its most frequent token among the masked ones, and the share of the more frequent NSP label. Rejected:
the entropy of the masked tokens alone; with a few thousand of them over a vocabulary of as many entries it is 0.1 to 0.3 nat low.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from berth.errors import DataError
from berth.records.dynamic import restored
from berth.records.reader import RecordsIndex, SampleStream, Transform
from berth.records.rows import Rows, masked_places
from berth.training.batches import IGNORED, to_micro_batch
from berth.training.distributed import Communicator
from berth.training.precision import Precision

BASELINE_ROWS = 1 << 16  # rows the baselines are taken from when the evaluation is limited
ROWS_AT_ONCE = 1 << 14


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
    """Held-out records and their baselines. They are streamed: memory is that of some ten thousand rows, whatever the shard.

    Args:
        index: the test records.
        vocab_size: of the model; ids are checked against it.
        limit: score this many sequences from the front (0 = all).
        transform: draws the masks of records that have none.

    Raises :class:`DataError` when it has no masked token.
    """

    def __init__(self, index: RecordsIndex, vocab_size: int, limit: int = 0, transform: Transform | None = None) -> None:
        self.count = min(index.rows, limit) if limit else index.rows
        seen = index.rows if not limit else min(index.rows, max(limit, BASELINE_ROWS))
        self.stream = SampleStream(index, seed=0, vocab_size=vocab_size, shuffle=False, transform=transform)
        counts = _Counts(vocab_size)
        for at in range(0, seen, ROWS_AT_ONCE):
            counts.add(self.stream.rows(at, min(ROWS_AT_ONCE, seen - at)))
        self.baselines = counts.baselines()

    @property
    def fingerprint(self) -> str:
        """What is scored: the records and how many of them."""
        return f"{self.stream.index.fingerprint} {self.count}"

    def evaluate(
        self,
        model: nn.Module,
        precision: Precision,
        communicator: Communicator,
        batch_size: int,
        progress: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """Run all of it through ``model`` (the module, not its data-parallel wrapper), split over ranks; every rank gets the same result.

        All ranks make the same number of passes, because a sharded model communicates in them: a rank that is short of rows repeats
        one whose scores do not count. ``progress`` is called before each.
        """
        model.eval()
        totals = torch.zeros(6, dtype=torch.float64, device=communicator.device)
        with torch.no_grad():
            for start in range(0, self.count, ROWS_AT_ONCE):
                rows = self.stream.rows(start, min(ROWS_AT_ONCE, self.count - start))
                # longest last: batches of similar length waste little padding
                order = np.argsort(rows.lengths(), kind="stable")
                own = order[communicator.rank :: communicator.world_size]
                most = math.ceil(len(order) / communicator.world_size)  # rows of rank 0, which never has fewer than another
                for at in range(0, most, batch_size):
                    progress()
                    chosen = own[at : at + batch_size]
                    scores = _score(model, rows.take(chosen if len(chosen) else order[:1]), precision, communicator.device)
                    if len(chosen):
                        totals += scores
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
    counts = _Counts(int(max(rows.input_ids.max(initial=0), rows.masked_lm_ids.max(initial=0))) + 1)
    counts.add(rows)
    return counts.baselines()


class _Counts:
    """What the baselines are made from, added up part by part."""

    def __init__(self, vocab_size: int) -> None:
        self.tokens, self.labels = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
        self.frame = np.zeros(vocab_size, bool)  # [CLS] and [SEP]
        self.pairs = self.positive = 0

    def add(self, rows: Rows) -> None:
        valid = masked_places(rows)
        original = restored(rows)
        self.frame[original[:, 0]] = True
        self.frame[original[np.arange(len(rows)), rows.lengths() - 1]] = True
        self.tokens += np.bincount(original[rows.input_mask.astype(bool)], minlength=len(self.tokens))
        self.labels += np.bincount(rows.masked_lm_ids[valid], minlength=len(self.labels))
        self.pairs += int(np.count_nonzero(rows.next_sentence_labels != IGNORED))
        self.positive += int(np.count_nonzero(rows.next_sentence_labels == 1))

    def baselines(self) -> Baselines:
        if not self.labels.sum():
            raise DataError("the held-out records hold no masked token; nothing can be evaluated")
        counts = np.where(self.frame, 0, self.tokens)
        share = counts[counts > 0] / counts.sum()
        positive = self.positive / max(self.pairs, 1)
        guessed = float(self.labels[counts.argmax()] / self.labels.sum())
        return Baselines(float(-(share * np.log(share)).sum()), guessed, max(positive, 1 - positive))
