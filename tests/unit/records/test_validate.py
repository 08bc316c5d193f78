"""Every rule of the schema is noticed when broken."""

import shutil

import h5py
import numpy as np
import pytest

from berth.errors import DataError
from berth.records.create import plan_file, run_job
from berth.records.options import RecordOptions
from berth.records.validate import validate_records


@pytest.fixture(scope="module")
def good(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("good") / "a.hdf5"
    options = RecordOptions(max_seq_length=32, max_predictions_per_seq=6, dupe_factor=1)
    run_job(plan_file(data / "text.txt", output, data / "vocab.txt", options))
    return output


def set_value(name, place, value):
    def change(file):
        file[name][place] = value

    return change


CHANGES = [
    (set_value("input_ids", (3, 1), 10**6), "row 3: an input id"),
    (set_value("input_ids", (4, 0), 7), r"row 4: position 0 is not \[CLS\]"),
    (set_value("input_mask", (2, 1), 0), "row 2: input_mask"),
    (set_value("segment_ids", (5, 0), 1), "row 5: segment_ids"),
    (set_value("masked_lm_positions", (1, 0), 31), "row 1: masked positions are not ascending"),
    (set_value("masked_lm_positions", (1, 0), 40), "row 1: a masked position is out of range"),
    (set_value("masked_lm_positions", (1, 0), 0), "row 1: masked positions are not followed"),
    (set_value("masked_lm_ids", (6, 0), 3), "row 6: a masked id is a special"),
    (set_value("masked_lm_ids", (6, 5), 9), "row 6: padding of masked_lm_ids"),
    (set_value("next_sentence_labels", 0, 2), "row 0: next_sentence_labels"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_broken_rows(good, tmp_path, vocabulary, change, message):
    path = tmp_path / "bad.hdf5"
    shutil.copy(good, path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=message):
        validate_records(path, vocabulary)


def test_broken_layout(good, tmp_path):
    path = tmp_path / "bad.hdf5"
    shutil.copy(good, path)
    with h5py.File(path, "r+") as file:
        labels = file["next_sentence_labels"][:]
        del file["next_sentence_labels"]
        file["next_sentence_labels"] = labels.astype(np.int64)
    with pytest.raises(DataError, match="next_sentence_labels has type int64"):
        validate_records(path)
    assert validate_records(path, strict=False).rows == len(labels), "any integer type is read"
    with h5py.File(path, "r+") as file:
        del file["segment_ids"]
    with pytest.raises(DataError, match="segment_ids are missing"):
        validate_records(path)
    path.write_bytes(good.read_bytes()[:-500])
    with pytest.raises(DataError, match="not a readable hdf5"):
        validate_records(path)
