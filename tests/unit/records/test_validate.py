"""Every rule of the schema is noticed when broken, in every layout."""

import shutil

import h5py
import numpy as np
import pytest

from berth.errors import DataError
from berth.records.create import plan_file, run_job
from berth.records.options import RecordOptions
from berth.records.validate import scan_records, thin, validate_records
from tests.support import write_records


def make(data, folder, **options):
    output = folder / "a.hdf5"
    options = RecordOptions(**{"max_seq_length": 32, "max_predictions_per_seq": 6, "dupe_factor": 1, **options})
    return run_job(plan_file(data / "text.txt", output, data / "vocab.txt", options)).files


@pytest.fixture(scope="module")
def good(data, tmp_path_factory):
    return make(data, tmp_path_factory.mktemp("good"))[0]


@pytest.fixture(scope="module")
def packed(data, tmp_path_factory):
    return make(data, tmp_path_factory.mktemp("packed"), layout="packed")[0]


def set_value(name, place, value):
    def change(file):
        file[name][place] = value

    return change


def set_attribute(name, value):
    def change(file):
        file.attrs[name] = value

    return change


def unmask(file):
    """Put the words back: nothing is replaced any more."""
    ids, positions, labels = (file[name][:] for name in ("input_ids", "masked_lm_positions", "masked_lm_ids"))
    rows, places = np.nonzero(positions)
    ids[rows, positions[rows, places]] = labels[rows, places]
    file["input_ids"][:] = ids


def mask_everything(file):
    ids, positions = file["input_ids"][:], file["masked_lm_positions"][:]
    rows, places = np.nonzero(positions)
    ids[rows, positions[rows, places]] = 4
    file["input_ids"][:] = ids


def mask_elsewhere(file):
    free = next(place for place in range(2, 9) if place not in file["masked_lm_positions"][7] and file["input_ids"][7, place] > 4)
    file["input_ids"][7, free] = 4


def all_next(file):
    file["next_sentence_labels"][:] = 0


def fewer_masks(file):
    count = int(np.count_nonzero(file["masked_lm_positions"][2]))
    file["input_ids"][2, file["masked_lm_positions"][2, count - 1]] = file["masked_lm_ids"][2, count - 1]
    file["masked_lm_positions"][2, count - 1] = file["masked_lm_ids"][2, count - 1] = 0


CHANGES = [
    (set_value("input_ids", (3, 1), 10**6), "row 3: an input id"),
    (set_value("input_ids", (3, 1), -1), "row 3: an input id"),
    (set_value("input_ids", (4, 0), 7), r"row 4: position 0 is not \[CLS\]"),
    (set_value("input_mask", (2, 1), 0), "row 2: input_mask"),
    (set_value("segment_ids", (5, 0), 1), "row 5: segment_ids"),
    (set_value("masked_lm_positions", (1, 0), 31), "row 1: masked positions are not ascending"),
    (set_value("masked_lm_positions", (1, 0), 40), "row 1: a masked position is out of range"),
    (set_value("masked_lm_positions", (1, 0), 0), "row 1: masked positions are not followed"),
    (set_value("masked_lm_ids", (6, 0), 3), "row 6: a masked id is a special"),
    (set_value("masked_lm_ids", (6, 5), 9), "row 6: padding of masked_lm_ids"),
    (set_value("masked_lm_ids", (6, 0), 10**6), "row 6: a masked id is not in"),
    (set_value("next_sentence_labels", 0, 2), "row 0: next_sentence_labels"),
    (mask_elsewhere, r"row 7: \[MASK\] stands at a position that is not masked"),
    (fewer_masks, "row 2: not as many positions are masked"),
    (unmask, r"0.00 % of the \d+ masked positions are \[MASK\]"),
    (mask_everything, r"100.00 % of the \d+ masked positions are \[MASK\]"),
    (all_next, "0 of .* rows have label 1"),
    (set_attribute("count_instances", 3), "count_instances is 3, but there are"),
    (set_attribute("count_masked", 1), "count_masked is 1, but there are"),
    (set_attribute("max_predictions_per_seq", 9), "attribute max_predictions_per_seq is 9, but the rows have 6"),
    (set_attribute("vocab_sha256", "00"), "made with another vocabulary"),
    (set_attribute("layout", "woven"), "attribute layout is 'woven'"),
    (set_attribute("masking", "none"), "masking none, but a position is masked"),
    (set_attribute("objective", "mlm"), "objective mlm, but a row has a second segment"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_broken_rows(good, tmp_path, vocabulary, change, message):
    path = tmp_path / "bad.hdf5"
    shutil.copy(good, path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=message):
        validate_records(path, vocabulary)


PACKED_CHANGES = [
    (set_value("row_offsets", 0, 1), "row_offsets does not go from 0"),
    (set_value("row_offsets", 3, 10**6), "row 2: row_offsets does not rise"),
    (set_value("row_offsets", -1, 5), "row_offsets does not go from 0"),
    (set_value("masked_offsets", 2, 10**6), "row 1: masked_offsets does not rise"),
    (set_value("first_lengths", 4, 99), "row 4: first_lengths"),
    (set_value("first_lengths", 4, 2), "row 4: a segment is empty"),
    (set_value("input_ids", 0, 9), r"row 0: position 0 is not \[CLS\]"),
    (set_value("masked_lm_positions", 0, 0), "row 0: masked positions are not followed"),
    (set_value("masked_lm_ids", 0, 2), "row 0: a masked id is a special token"),
    (set_attribute("max_seq_length", 16), r"row \d+: row_offsets does not rise by 0 to max_seq_length \(16\)"),
]


@pytest.mark.parametrize(("change", "message"), PACKED_CHANGES)
def test_broken_packed_rows(packed, tmp_path, vocabulary, change, message):
    path = tmp_path / "bad.hdf5"
    shutil.copy(packed, path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=message):
        validate_records(path, vocabulary)


@pytest.mark.parametrize("layout", ["padded", "binned", "packed"])
@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
@pytest.mark.parametrize("masking", ["static", "none", "words"])
def test_everything_berth_writes_is_valid(data, tmp_path, vocabulary, layout, objective, masking):
    options = {"whole_word_mask": True} if masking == "words" else {"masking": masking}
    files = make(data, tmp_path, layout=layout, objective=objective, bin_size=16, **options)
    for path in files:
        for known in (vocabulary, None):
            found = validate_records(path, known)
            assert (found.layout, found.objective) == (layout, objective)
            assert found.seen_mask + found.seen_kept + found.seen_random == found.masked
            assert (found.masked > 0) == (masking != "none")


def test_the_layouts_hold_the_same_rows(data, tmp_path):
    rows = []
    for layout in ("padded", "binned", "packed"):
        scans = [scan_records(path, hashes=True) for path in make(data, tmp_path / layout, layout=layout, bin_size=16)]
        rows.append(np.sort(np.concatenate([scan.hashes for scan in scans])))
    assert len(rows[0]) > 100
    assert (rows[0] == rows[1]).all() and (rows[0] == rows[2]).all()


def test_hashes_do_not_depend_on_the_masks(data, tmp_path):
    one = scan_records(make(data, tmp_path / "one")[0], hashes=True)
    none = scan_records(make(data, tmp_path / "none", masking="none")[0], hashes=True)
    other = scan_records(make(data, tmp_path / "other", random_seed=1)[0], hashes=True)
    assert (one.hashes == none.hashes).all()
    assert len(np.intersect1d(one.hashes, other.hashes)) < len(one.hashes) / 4


def test_a_row_in_the_wrong_bin(data, tmp_path, vocabulary):
    files = make(data, tmp_path, layout="binned", bin_size=16)
    with h5py.File(files[-1], "r+") as file:
        file.attrs["bin_low"] = int(file["input_mask"][0].sum())
    with pytest.raises(DataError, match=r"row 0: the row is not longer than \d+ tokens"):
        validate_records(files[-1], vocabulary)


def test_whole_words(data, tmp_path, vocabulary):
    """The word behind a masked one becomes its continuation."""
    path = make(data, tmp_path, whole_word_mask=True)[0]
    with h5py.File(path, "r+") as file:
        ids, positions = file["input_ids"][:], file["masked_lm_positions"][:]
        row, at = next(
            (row, at) for row in range(len(ids)) for at in positions[row] if at and at + 1 not in positions[row] and ids[row, at + 1] > 4
        )
        file["input_ids"][row, at + 1] = vocabulary.ids["##x"]
    with pytest.raises(DataError, match=f"row {row}: a word is masked in part"):
        validate_records(path, vocabulary)


def test_files_of_other_programs_are_valid(tmp_path):
    """No attributes, no vocabulary, other integer types; nothing says which ids are special."""
    write_records(tmp_path / "a.hdf5", 300, seed=3, length=64)
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        for name in list(file):
            values = file[name][:]
            del file[name]
            file[name] = values.astype(np.int64)
        # this writer masks always: make it 80/10/10
        ids, positions, labels = (file[name][:] for name in ("input_ids", "masked_lm_positions", "masked_lm_ids"))
        rows, places = np.nonzero(positions)
        draw = np.random.default_rng(0).random(len(rows))
        seen = np.where(draw < 0.8, 4, np.where(draw < 0.9, labels[rows, places], 5 + (labels[rows, places] + 1) % 90))
        ids[rows, positions[rows, places]] = seen
        file["input_ids"][:] = ids
    found = validate_records(tmp_path / "a.hdf5", strict=False)
    assert found.rows == 300 and found.max_seq_length == 64
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        file["input_ids"][17, 0] = 9
    with pytest.raises(DataError, match=r"row 17: position 0 is not \[CLS\]"):
        validate_records(tmp_path / "a.hdf5", strict=False)


def test_all_problems_are_counted_and_the_first_kept(good, tmp_path, vocabulary):
    path = tmp_path / "bad.hdf5"
    shutil.copy(good, path)
    with h5py.File(path, "r+") as file:
        file["input_ids"][10:40, 0] = 9
        file["next_sentence_labels"][50] = 3
    scan = scan_records(path, vocabulary, max_problems=5)
    assert [(problem.row, "[CLS]" in problem.rule) for problem in scan.problems[1:]] == [(row, True) for row in range(10, 14)]
    assert str(scan.problems[0]) == "row 50: next_sentence_labels is not 0 or 1"
    assert scan.wrong >= 31 and scan.summary is not None


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


def test_damaged_compressed_data_is_a_problem_not_a_crash(good, tmp_path):
    with h5py.File(good, "r") as file:
        place = file["input_ids"].id.get_chunk_info(0)
    content = bytearray(good.read_bytes())
    content[place.byte_offset + place.size // 2 : place.byte_offset + place.size // 2 + 40] = bytes(40)
    (tmp_path / "bad.hdf5").write_bytes(content)
    scan = scan_records(tmp_path / "bad.hdf5")
    assert scan.wrong >= 1


def test_thinned_hashes_are_the_same_sample_everywhere():
    rng = np.random.default_rng(0)
    every = np.sort(rng.integers(0, 1 << 64, 40_000, dtype=np.uint64))
    few, shift = thin(every, 0, 3000)
    half, half_shift = thin(every[::2].copy(), 0, 3000)
    assert 0 < len(few) <= 3000 and shift == half_shift + 1
    assert np.isin(half[half <= np.uint64((1 << 64) - 1 >> shift)], few).all()
