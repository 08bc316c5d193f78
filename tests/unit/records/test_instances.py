"""Instances sorted on disk are those sorted in memory, and no size of a block or bucket shows in a records file."""

import dataclasses

import numpy as np
import pytest

from berth.records import chunks, instances, pairs
from berth.records.create import plan_file, run_job
from berth.records.instances import InstanceSpool
from berth.records.options import RecordOptions
from berth.records.pairs import Instances, instance_blocks, make_instances
from berth.records.tokens import TokenText

OPTIONS = RecordOptions(max_seq_length=24, max_predictions_per_seq=4, dupe_factor=3)


def text_of(documents: int, sentences: int, words: int) -> TokenText:
    count = documents * sentences
    return TokenText(np.arange(count * words, dtype=np.uint32), np.arange(count + 1) * words, np.arange(documents + 1) * sentences, 0, 0)


def equal(one: Instances, other: Instances) -> bool:
    return all(np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Instances))


@pytest.mark.parametrize(("bucket", "rows", "lanes"), [(1, 1, 1), (7, 10, 4), (1 << 15, 13, 3), (50, 1 << 16, 1 << 14)])
def test_the_order_is_that_of_sorting_in_memory(tmp_path, monkeypatch, bucket, rows, lanes):
    text = text_of(40, 12, 5)
    wanted = make_instances(text, OPTIONS, "s.txt")
    monkeypatch.setattr(instances, "BUCKET_ROWS", bucket)
    monkeypatch.setattr(pairs, "INSTANCES_PER_BLOCK", rows)
    monkeypatch.setattr(pairs, "LANES_PER_BLOCK", lanes)
    spool = InstanceSpool(tmp_path / "x", OPTIONS.max_seq_length)
    for block in instance_blocks(text, OPTIONS, "s.txt"):
        spool.append(block)
    stored = spool.finish()
    found = list(stored.buckets())
    assert equal(Instances.concatenate(found), wanted) and len(stored) == len(wanted) > 300
    assert stored.lengths.tolist() == np.bincount(wanted.lengths, minlength=25).tolist()
    assert (len(found) > 5) == (bucket < 100)


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
def test_the_file_does_not_depend_on_blocks_and_buckets(tmp_path, data, monkeypatch, objective):
    options = RecordOptions(max_seq_length=32, max_predictions_per_seq=4, dupe_factor=4, objective=objective)

    def make(name: str) -> bytes:
        run_job(plan_file(data / "text.txt", tmp_path / name, data / "vocab.txt", options))
        return (tmp_path / name).read_bytes()

    wanted = make("a")
    for bucket, rows, lanes in ((1, 5, 1), (30, 64, 9)):
        with monkeypatch.context() as patch:
            patch.setattr(instances, "BUCKET_ROWS", bucket)
            patch.setattr(pairs, "INSTANCES_PER_BLOCK", rows)
            patch.setattr(chunks, "INSTANCES_PER_BLOCK", rows)
            patch.setattr(pairs, "LANES_PER_BLOCK", lanes)
            assert make(f"b{bucket}") == wanted
