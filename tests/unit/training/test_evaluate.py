"""Held-out records are streamed: the scores do not depend on how many rows are in memory, nor on the number of processes."""

import dataclasses

import numpy as np
import pytest
import torch

import modeling
from berth.errors import DataError
from berth.records.reader import SampleStream, open_index
from berth.records.rows import NO_LABEL
from berth.training import evaluate
from berth.training.precision import make_precision
from tests.support import TINY, VOCAB_SIZE, make_project

PRECISION = make_precision("fp32", "cpu", 0.0, 1.0, 1.0)


class OneOf:
    """A process among several; what it would send to the others is kept."""

    device = torch.device("cpu")

    def __init__(self, rank, world_size):
        self.rank, self.world_size, self.sent = rank, world_size, []

    def sum(self, values):
        self.sent = values
        return values


@pytest.fixture
def index(tmp_path):
    return open_index(make_project(tmp_path) / "records", "test")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return modeling.BertForPreTraining(modeling.BertConfig.from_dict(TINY))


def scores(index, model, **options):
    return evaluate.HeldOut(index, VOCAB_SIZE, **options).evaluate(model, PRECISION, OneOf(0, 1), 8)


def test_scores_do_not_depend_on_what_is_in_memory(index, model, monkeypatch):
    whole = scores(index, model)
    base = evaluate.HeldOut(index, VOCAB_SIZE).baselines
    assert base == evaluate.baselines(SampleStream(index, 0, VOCAB_SIZE, shuffle=False).rows(0, index.rows))
    monkeypatch.setattr(evaluate, "ROWS_AT_ONCE", 7)
    parts = scores(index, model)
    assert (parts.sequences, parts.masked_tokens) == (whole.sequences, whole.masked_tokens) == (40, whole.masked_tokens)
    assert parts.mlm_loss == pytest.approx(whole.mlm_loss, abs=1e-6) and parts.nsp_loss == pytest.approx(whole.nsp_loss, abs=1e-6)
    assert evaluate.HeldOut(index, VOCAB_SIZE).baselines == base
    assert scores(index, model, limit=9).sequences == 9


def test_processes_share_the_rows(index, model, monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS_AT_ONCE", 16)
    held_out = evaluate.HeldOut(index, VOCAB_SIZE)
    sums = []
    for world_size in (1, 3):
        places = [OneOf(rank, world_size) for rank in range(world_size)]
        for place in places:
            held_out.evaluate(model, PRECISION, place, 8)
        sums.append(np.sum([place.sent for place in places], axis=0))
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


@pytest.mark.parametrize(("world_size", "in_memory", "batch", "passes"), [(3, 16, 8, 3), (4, 40, 3, 4), (8, 9, 2, 5), (2, 40, 64, 1)])
def test_every_process_makes_as_many_passes(index, model, monkeypatch, world_size, in_memory, batch, passes):
    """40 rows, ``in_memory`` at once: the last part may leave a process without a row of its own."""
    monkeypatch.setattr(evaluate, "ROWS_AT_ONCE", in_memory)
    held_out = evaluate.HeldOut(index, VOCAB_SIZE)
    alone = OneOf(0, 1)
    held_out.evaluate(model, PRECISION, alone, batch)
    places, calls, rows = [OneOf(rank, world_size) for rank in range(world_size)], [], []
    hook = model.register_forward_hook(lambda module, args, kwargs, output: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    for place in places:
        seen = []
        held_out.evaluate(model, PRECISION, place, batch)
        calls.append(len(seen))
        rows.append(sum(seen))
    hook.remove()
    assert calls == [passes] * world_size
    assert sum(rows) >= 40 and np.sum([place.sent for place in places], axis=0) == pytest.approx(alone.sent, rel=1e-5)


def test_rows_without_sentence_labels(index):
    rows = SampleStream(index, 0, VOCAB_SIZE, shuffle=False).rows(0, 40)
    bare = dataclasses.replace(rows, next_sentence_labels=np.full(40, NO_LABEL, np.int8))
    assert evaluate.baselines(bare).unigram_entropy == evaluate.baselines(rows).unigram_entropy
    nothing = dataclasses.replace(rows, masked_lm_positions=np.zeros_like(rows.masked_lm_positions))
    with pytest.raises(DataError, match="no masked token"):
        evaluate.baselines(nothing)
