"""Layouts hold the same rows; full disks, missing bins, changed layouts; memory does not grow with the text."""

from __future__ import annotations

import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from berth.errors import ConfigError
from berth.records import writer
from berth.records.create import plan_file, plan_folder, read_attributes, run_job, run_jobs
from berth.records.options import RecordOptions
from berth.records.schema import DATASETS, PACKED_DATASETS, RecordCounts
from berth.text import lines
from berth.text.vocabulary import SPECIAL_TOKENS
from tests.support import ROOT, environment

OPTIONS = RecordOptions(max_seq_length=64, max_predictions_per_seq=9, dupe_factor=4, short_seq_prob=0.6)
Table = dict[str, np.ndarray]


def make(data: Path, output: Path, overwrite: bool = False, **changes):
    job = plan_file(data / "text.txt", output, data / "vocab.txt", dataclasses.replace(OPTIONS, **changes))
    return next(iter(run_jobs([job], 1, overwrite)))


def columns(path: Path) -> Table:
    with h5py.File(path) as file:
        return {name: values[:] for name, values in file.items()}


def widened(table: Table, length: int) -> Table:
    return {name: np.pad(table[name], ((0, 0), (0, length - table[name].shape[1]))) if letter == "L" else table[name]
            for name, (_, letter) in DATASETS.items()}  # fmt: skip


def unpacked(table: Table, length: int, predictions: int) -> Table:
    """The packed layout as its documentation says, row by row."""
    rows = len(table["next_sentence_labels"])
    found = {name: np.zeros((rows, {"L": length, "P": predictions}[letter]) if letter else rows, dtype)
             for name, (dtype, letter) in DATASETS.items()}  # fmt: skip
    for row in range(rows):
        start, stop = table["row_offsets"][row : row + 2]
        found["input_ids"][row, : stop - start] = table["input_ids"][start:stop]
        found["input_mask"][row, : stop - start] = 1
        found["segment_ids"][row, table["first_lengths"][row] : stop - start] = 1
        first, last = table["masked_offsets"][row : row + 2]
        for name in ("masked_lm_positions", "masked_lm_ids"):
            found[name][row, : last - first] = table[name][first:last]
    found["next_sentence_labels"] = table["next_sentence_labels"]
    return found


def row_bytes(table: Table) -> list[bytes]:
    return [b"".join(np.ascontiguousarray(table[name][row]).tobytes() for name in DATASETS) for row in range(len(table["input_ids"]))]


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
@pytest.mark.parametrize("masking", ["static", "none"])
def test_packed_and_binned_files_hold_the_padded_rows(tmp_path, data, monkeypatch, objective, masking):
    monkeypatch.setattr(writer, "ROWS_PER_CHUNK", 100)
    monkeypatch.setattr(writer, "ITEMS_PER_CHUNK", 1000)
    changes = {"objective": objective, "masking": masking}
    padded = make(data, tmp_path / "p.hdf5", **changes)
    packed = make(data, tmp_path / "q.hdf5", layout="packed", **changes)
    binned = make(data, tmp_path / "b.hdf5", layout="binned", bin_size=24, **changes)
    wanted = columns(tmp_path / "p.hdf5")
    assert {name: values.dtype for name, values in wanted.items()} == {name: dtype for name, (dtype, _) in DATASETS.items()}
    found = columns(tmp_path / "q.hdf5")
    assert {name: values.dtype for name, values in found.items()} == {name: dtype for name, (dtype, _) in PACKED_DATASETS.items()}
    decoded = unpacked(found, 64, 9)
    for name in DATASETS:
        assert (decoded[name] == wanted[name]).all(), name
    assert packed.counts == padded.counts == binned.counts
    assert (wanted["masked_lm_positions"] > 0).any() == (masking == "static")
    rows, names, sums = [], [path.name for path in binned.files], None
    assert set(names) <= {"b_bin_24.hdf5", "b_bin_48.hdf5", "b_bin_64.hdf5"} and len(names) > 1
    for path in binned.files:
        table, attributes = columns(path), read_attributes(path)
        lengths, width = table["input_mask"].sum(axis=1), table["input_ids"].shape[1]
        low, high = attributes["bin_low"], attributes["bin_high"]
        assert path.name == f"b_bin_{high}.hdf5" and width == high and low == {24: 0, 48: 24, 64: 48}[high]
        assert (lengths > low).all() and (lengths <= high).all()
        assert (attributes["files"], attributes["layout"], attributes["bin_size"]) == (str(len(names)), "binned", 24)
        assert (attributes["objective"], attributes["masking"]) == (objective, masking)
        counts = RecordCounts(*(int(attributes[f"count_{field.name}"]) for field in dataclasses.fields(RecordCounts)))
        assert (counts.instances, counts.used_tokens) == (len(lengths), lengths.sum())
        sums = counts if sums is None else sums + counts
        rows += row_bytes(widened(table, 64))
    assert sums == padded.counts and sorted(rows) == sorted(row_bytes(wanted))
    for path, layout in ((tmp_path / "p.hdf5", "padded"), (tmp_path / "q.hdf5", "packed")):
        attributes = read_attributes(path)
        assert (attributes["layout"], attributes["files"]) == (layout, "1") and "bin_low" not in attributes


def test_a_missing_bin_is_made_again(tmp_path, data):
    first = make(data, tmp_path / "b.hdf5", layout="binned", bin_size=16)
    before = {path: path.read_bytes() for path in first.files}
    assert make(data, tmp_path / "b.hdf5", layout="binned", bin_size=16).skipped
    for path in first.files:
        path.unlink()
        assert not make(data, tmp_path / "b.hdf5", layout="binned", bin_size=16).skipped
        assert {path: path.read_bytes() for path in first.files} == before
    assert make(data, tmp_path / "b.hdf5", layout="binned", bin_size=16).skipped


def test_bins_that_have_no_rows_any_more_are_removed(tmp_path, data):
    source = tmp_path / "t.txt"
    options = dataclasses.replace(OPTIONS, layout="binned", bin_size=16, short_seq_prob=0.0)
    source.write_text((data / "text.txt").read_text())
    job = plan_file(source, tmp_path / "t.hdf5", data / "vocab.txt", options)
    assert len(run_job(job).files) > 1
    source.write_text("w1 w2\nw3 w4\n\nw5 w6\nw7 w8\n")
    result = run_job(job)
    assert sorted(path.name for path in tmp_path.glob("*.hdf5")) == [path.name for path in result.files] == ["t_bin_16.hdf5"]
    assert run_job(job).skipped


CHANGES = [({}, {"layout": "packed"}), ({}, {"layout": "binned"}), ({"layout": "binned"}, {}), ({"layout": "packed"}, {"layout": "binned"}),
           ({"layout": "binned", "bin_size": 16}, {"layout": "binned", "bin_size": 24})]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), CHANGES)
def test_another_layout_is_refused_without_overwrite(tmp_path, data, one, other):
    make(data, tmp_path / "out" / "a.hdf5", **one)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="--overwrite"):
        make(data, tmp_path / "out" / "a.hdf5", **other)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    result = make(data, tmp_path / "out" / "a.hdf5", overwrite=True, **other)
    assert sorted((tmp_path / "out").iterdir()) == sorted(result.files), "training would read the same text twice"


def test_files_of_other_texts_are_not_taken_for_another_layout(tmp_path, data):
    for name in ("a", "a_bin_64"):
        (tmp_path / f"{name}.txt").write_text((data / "text.txt").read_text())
        list(run_jobs(plan_folder(tmp_path / f"{name}.txt", tmp_path / "out", data / "vocab.txt", OPTIONS), 1))
    assert next(iter(run_jobs(plan_folder(tmp_path / "a.txt", tmp_path / "out", data / "vocab.txt", OPTIONS), 1))).skipped
    next(iter(run_jobs(plan_folder(tmp_path / "a.txt", tmp_path / "out", data / "vocab.txt", OPTIONS), 1, True)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.hdf5", "a_bin_64.hdf5"]


@pytest.mark.parametrize("layout", ["padded", "packed", "binned"])
def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path, data, monkeypatch, layout):
    make(data, tmp_path / "out" / "a.hdf5", layout=layout, random_seed=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    class Full:
        def __init__(self, file, room: int) -> None:
            self.file, self.room = file, room

        def write(self, data) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name: str):
            return getattr(self.file, name)

    real = writer._DiskFile.__init__
    for room in (0, 3000):

        def limited(self, path, name, room=room):
            real(self, path, name)
            self.raw = Full(self.raw, room)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
            patch.setattr(writer._DiskFile, "__init__", limited)
            make(data, tmp_path / "out" / "a.hdf5", overwrite=True, layout=layout, random_seed=2)
        assert Path(caught.value.filename).name in before
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_vocabulary_above_65536(tmp_path, layout):
    words = [f"v{number}" for number in range(70_000)]
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *words]) + "\n")
    text = [" ".join(words[start : start + 7]) for start in range(65_000, 69_900, 7)]
    (tmp_path / "text.txt").write_text("\n".join(line + "\n" * (number % 9 == 8) for number, line in enumerate(text)) + "\n")
    options = RecordOptions(max_seq_length=32, max_predictions_per_seq=5, dupe_factor=1, objective="mlm", layout=layout)
    run_job(plan_file(tmp_path / "text.txt", tmp_path / "a.hdf5", tmp_path / "vocab.txt", options))
    table = columns(tmp_path / "a.hdf5")
    assert table["input_ids"].dtype == np.dtype("<i4")
    whole = table if layout == "padded" else unpacked(table, 32, 5)
    rows, places = np.nonzero(whole["masked_lm_positions"])
    whole["input_ids"][rows, whole["masked_lm_positions"][rows, places]] = whole["masked_lm_ids"][rows, places]
    found = np.sort(whole["input_ids"][whole["input_ids"] >= len(SPECIAL_TOKENS)]) - len(SPECIAL_TOKENS)
    assert found.tolist() == list(range(65_000, 65_000 + len(text) * 7))


def test_one_line_of_5_mb_is_one_sentence(tmp_path, data, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 1 << 12)
    line = (data / "text.txt").read_text().replace("\n", " ")
    line = " ".join([line] * (5_000_000 // len(line)))
    (tmp_path / "text.txt").write_text(line + "\n\nw1 w2\nw3\n")
    options = RecordOptions(max_seq_length=64, max_predictions_per_seq=9, dupe_factor=1)
    counts = run_job(plan_file(tmp_path / "text.txt", tmp_path / "a.hdf5", data / "vocab.txt", options)).counts
    assert (counts.documents, counts.sentences, counts.unknown_tokens) == (2, 3, 0)
    assert counts.tokens == len(line.split()) + 3


MEASURE = """
import json, resource, subprocess, sys
child = subprocess.run(sys.argv[1:], capture_output=True, text=True)
print(json.dumps([child.returncode, child.stderr, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]))
"""


def test_memory_is_flat(tmp_path, data):
    """30 MB of text, 5 million tokens, in less than 250 MB (a tenth of it would need about the same)."""
    text = (data / "text.txt").read_text() + "\n"
    (tmp_path / "text.txt").write_text(text * (30_000_000 // len(text)))
    command = [sys.executable, ROOT / "create_pretraining_data.py", "--vocab_file", data / "vocab.txt", "--input_file", tmp_path / "text.txt",
               "--output_file", tmp_path / "a.hdf5", "--dupe_factor", "2", "--layout", "packed"]  # fmt: skip
    measured = subprocess.run([sys.executable, "-c", MEASURE, *map(str, command)], capture_output=True, text=True, env=environment())
    code, error, megabytes = json.loads(measured.stdout)
    assert code == 0, error
    assert megabytes < 250, megabytes
    assert read_attributes(tmp_path / "a.hdf5")["count_documents"] > 10_000
