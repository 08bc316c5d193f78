"""berth.records.reader: the endless stream is a permutation per epoch, the same for every way of asking."""

import h5py
import numpy as np
import pytest

from berth.errors import DataError
from berth.records.reader import SampleStream, open_index
from tests.support import PREDICTIONS, SEQ_LENGTH, VOCAB_SIZE, write_records


def numbered(path, first, rows):
    """Records whose input ids say which sample they are: ids[0] * 1000 + ids[1] is the number."""
    write_records(path, rows, seed=0)
    with h5py.File(path, "r+") as handle:
        numbers = np.arange(first, first + rows)
        ids = handle["input_ids"][:]
        ids[:, 0], ids[:, 1] = numbers // 90, numbers % 90
        handle["input_ids"][:] = ids


def numbers_of(rows):
    return rows.input_ids[:, 0] * 90 + rows.input_ids[:, 1]


@pytest.fixture
def folder(tmp_path):
    numbered(tmp_path / "b_training_1.hdf5", 0, 53)
    numbered(tmp_path / "b_training_2.hdf5", 53, 30)
    numbered(tmp_path / "b_training_10.hdf5", 83, 40)
    numbered(tmp_path / "b_test_0.hdf5", 500, 10)
    return tmp_path


@pytest.mark.parametrize("window_rows", [16, 50, 1 << 16])
def test_every_epoch_holds_every_sample_once(folder, window_rows):
    stream = SampleStream(open_index(folder, "training"), 7, VOCAB_SIZE, block_rows=8, window_rows=window_rows)
    epochs = [numbers_of(stream.rows(epoch * 123, 123)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(123))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], np.arange(123))


@pytest.mark.parametrize("window_rows", [16, 1 << 16])
def test_order_does_not_depend_on_how_it_is_read(folder, window_rows):
    index = open_index(folder, "training")
    whole = SampleStream(index, 7, VOCAB_SIZE, block_rows=8, window_rows=window_rows).rows(0, 400)
    again = SampleStream(index, 7, VOCAB_SIZE, block_rows=8, window_rows=window_rows)
    rng = np.random.default_rng(0)
    for _ in range(60):  # jumping about, across windows and epochs
        first = int(rng.integers(0, 380))
        count = int(rng.integers(1, 20))
        part = again.rows(first, count)
        for field in ("input_ids", "masked_lm_ids", "next_sentence_labels"):
            assert np.array_equal(getattr(part, field), getattr(whole, field)[first : first + count])
    other = SampleStream(index, 8, VOCAB_SIZE, block_rows=8, window_rows=window_rows).rows(0, 123)
    assert not np.array_equal(numbers_of(other), numbers_of(whole)[:123])


def test_rows_are_those_of_the_file(folder):
    index = open_index(folder, "training")
    stream = SampleStream(index, 1, VOCAB_SIZE, shuffle=False)
    rows = stream.rows(0, 123)
    files = sorted(path for path in folder.iterdir() if "training" in path.name)
    for field in ("input_ids", "input_mask", "segment_ids", "masked_lm_positions", "masked_lm_ids", "next_sentence_labels"):
        expected = np.concatenate([h5py.File(path)[field][:] for path in files])
        assert np.array_equal(getattr(rows, field), expected)


def test_kinds_and_single_files(folder):
    assert open_index(folder, "test").rows == 10
    assert open_index(folder / "b_training_2.hdf5", "training").rows == 30
    index = open_index(folder, "training")
    assert (index.rows, index.seq_length, index.max_predictions) == (123, SEQ_LENGTH, PREDICTIONS)
    assert index.fingerprint == open_index(folder, "training").fingerprint != open_index(folder, "test").fingerprint


def test_names_that_only_look_like_the_other_kind(tmp_path):
    for name in ("latest_training_0", "training_text_test_0", "training_text_training_0", "contest"):
        write_records(tmp_path / f"{name}.hdf5", 5, 0)
    assert [file.path.stem for file in open_index(tmp_path, "training").files] == ["latest_training_0", "training_text_training_0"]
    assert [file.path.stem for file in open_index(tmp_path, "test").files] == ["training_text_test_0"]
    write_records(tmp_path / "my_training_and_test.hdf5", 5, 0)
    with pytest.raises(DataError, match="may be training or held-out"):
        open_index(tmp_path, "training")


def test_the_fingerprint_tells_other_content(tmp_path):
    prints = set()
    for seed in ("1", "2"):
        write_records(tmp_path / "a_training_0.hdf5", 5, 0, input_sha256="a", random_seed=seed, count_masked=seed)
        prints.add(open_index(tmp_path, "training").fingerprint)
    write_records(tmp_path / "a_training_0.hdf5", 5, 0, input_sha256="a", random_seed="2", count_masked="7")
    prints.add(open_index(tmp_path, "training").fingerprint)
    assert len(prints) == 2


def test_records_of_other_programs_are_told_apart_by_content(tmp_path):
    """Files of the public script say nothing about their input, and uncompressed ones of as many rows have one size."""
    paths = [tmp_path / name / "a_training_0.hdf5" for name in ("one", "copy", "other")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        write_records(path, 300, seed)
        with h5py.File(path, "r+") as handle:
            data = {name: handle[name][:] for name in handle}
        path.unlink()
        with h5py.File(path, "w") as handle:
            for name, values in data.items():
                handle.create_dataset(name, data=values)
    assert len({path.stat().st_size for path in paths}) == 1
    one, copy, other = (open_index(path.parent, "training").fingerprint for path in paths)
    assert one == copy != other


def test_attributes_of_other_programs_do_not_name_the_content(tmp_path):
    prints = set()
    for level in (0, 9):
        write_records(tmp_path / "a_training_0.hdf5", 500, level, made_by="another program")
        with h5py.File(tmp_path / "a_training_0.hdf5", "r+") as handle:
            handle["more"] = np.zeros(1000 * level + 1)
        prints.add(open_index(tmp_path, "training").fingerprint)
    assert len(prints) == 2


def test_any_integer_type_is_read(folder):
    path = folder / "b_training_2.hdf5"
    with h5py.File(path) as handle:
        data = {name: handle[name][:] for name in handle}
    with h5py.File(path, "w") as handle:
        for name, values in data.items():
            handle.create_dataset(name, data=values.astype(np.int16))
    rows = SampleStream(open_index(path, "training"), 1, VOCAB_SIZE, shuffle=False).rows(0, 30)
    assert np.array_equal(rows.input_ids, data["input_ids"]) and rows.input_ids.dtype == np.int32


def test_bad_data_is_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"but --max_seq_length is 128"):
        open_index(folder, "training", 128)
    with pytest.raises(DataError, match="does not exist"):
        open_index(tmp_path / "none", "training")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no .hdf5 file"):
        open_index(tmp_path / "empty", "training")
    small = SampleStream(open_index(folder, "training"), 1, vocab_size=20)
    with pytest.raises(DataError, match=r"b_training_.*row \d+: .*vocabulary has 20 entries"):
        small.rows(0, 1)
    path = folder / "b_training_1.hdf5"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"b_training_1.hdf5 cannot be read as hdf5.*truncated"):
        open_index(folder, "training")


def test_missing_fields_and_mixed_shapes(folder):
    with h5py.File(folder / "b_training_1.hdf5", "r+") as handle:
        del handle["masked_lm_ids"]
    with pytest.raises(DataError, match="lacks the data sets masked_lm_ids"):
        open_index(folder, "training")
    write_records(folder / "b_training_1.hdf5", 5, 0, length=SEQ_LENGTH * 2)
    with pytest.raises(DataError, match="must have one shape"):
        open_index(folder, "training")


def test_no_rows_at_all(tmp_path):
    write_records(tmp_path / "a_training_0.hdf5", 0, 0)
    with pytest.raises(DataError, match="no instance at all"):
        open_index(tmp_path, "training")
