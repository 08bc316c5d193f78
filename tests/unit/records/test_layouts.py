"""berth.records.layouts and direct: every layout and every writer's files give the same rows; bins are drawn group by group."""

import dataclasses

import h5py
import numpy as np
import pytest

from berth.errors import DataError
from berth.records.direct import FileReader, TableCache
from berth.records.reader import FIELDS, NO_LABEL, SampleStream, open_index
from tests.support import PREDICTIONS, SEQ_LENGTH, VOCAB_SIZE, write_records


def arrays(path):
    with h5py.File(path) as handle:
        return {name: handle[name][:] for name in handle}


def rewrite(path, data, attributes=None, **options):
    with h5py.File(path, "w") as handle:
        for name, values in data.items():
            handle.create_dataset(name, data=values, **options)
        handle.attrs.update(attributes or {})


def in_file_order(folder, count, vocab_size=VOCAB_SIZE, **options):
    return SampleStream(open_index(folder, "training"), 0, vocab_size, shuffle=False, **options).rows(0, count)


def assert_rows(rows, data, length=SEQ_LENGTH):
    for field in FIELDS:
        expected = data[field] if data[field].ndim == 1 or field.startswith("masked") else data[field][:, :length]
        assert np.array_equal(getattr(rows, field), expected), field


def pack(path, data, start, stop, **attributes):
    """What the packed layout stores of rows ``start .. stop - 1``."""
    mask, chosen = data["input_mask"][start:stop] == 1, data["masked_lm_positions"][start:stop] > 0
    part = {name: values[start:stop] for name, values in data.items()}
    packed = {
        "input_ids": part["input_ids"][mask].astype(np.uint16),
        "row_offsets": np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int64),
        "first_lengths": (mask & (part["segment_ids"] == 0)).sum(1).astype(np.int32),
        "masked_lm_positions": part["masked_lm_positions"][chosen].astype(np.int32),
        "masked_lm_ids": part["masked_lm_ids"][chosen].astype(np.int32),
        "masked_offsets": np.concatenate([[0], np.cumsum(chosen.sum(1))]).astype(np.int64),
        "next_sentence_labels": part["next_sentence_labels"],
    }
    described = {"layout": "packed", "max_seq_length": SEQ_LENGTH, "max_predictions_per_seq": PREDICTIONS, **attributes}
    with h5py.File(path, "w") as handle:
        for name, values in packed.items():
            handle.create_dataset(
                name, data=values, chunks=(min(700, len(values)),), compression="gzip", compression_opts=1, shuffle=values.itemsize > 1
            )
        handle.attrs.update(described)
    return packed


def bins(folder, data, edges=(20, 26, 32), prefix="a_training_0"):
    """The same rows in one file for each range of lengths."""
    folder.mkdir()
    lengths = data["input_mask"].sum(1)
    low = 0
    for high in edges:
        chosen = (lengths > low) & (lengths <= high)
        part = {n: v[chosen] if v.ndim == 1 or n.startswith("masked") else v[chosen][:, :high] for n, v in data.items()}
        described = {"layout": "binned", "bin_low": low, "bin_high": high, "max_seq_length": SEQ_LENGTH}
        rewrite(folder / f"{prefix}_bin_{high}.hdf5", part, described, compression="gzip", shuffle=True)
        low = high
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.hdf5"
    write_records(path, 2600, 0)
    return arrays(path)


WRITERS = {
    "berth": {"chunks": 1024, "compression": "gzip", "compression_opts": 1, "shuffle": True},
    "nvidia": {"compression": "gzip"},  # chunks left to h5py: a few columns by hundreds of rows
    "narrow": {"chunks": (300, 5), "compression": "gzip", "shuffle": True},
    "plain chunks": {"chunks": (100, 32)},
    "contiguous": {},
    "lzf": {"compression": "lzf"},
    "checksummed": {"compression": "gzip", "fletcher32": True},
}


@pytest.mark.parametrize("kind", ["int32", "int16", "int64", ">i4"])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_gives_the_same_rows(tmp_path, data, writer, kind):
    with h5py.File(tmp_path / "a_training_0.hdf5", "w") as handle:
        for name, values in data.items():
            options = dict(WRITERS[writer])
            chunks = options.pop("chunks", None)
            if isinstance(chunks, int):
                chunks = (chunks, *values.shape[1:])
            elif chunks is not None:
                chunks = chunks[: values.ndim] if values.ndim == 1 else (chunks[0], min(chunks[1], values.shape[1]))
            wide = name in ("input_ids", "masked_lm_ids", "masked_lm_positions")
            handle.create_dataset(name, data=values, dtype=kind if wide else "i1", chunks=chunks, **options)
    rows = in_file_order(tmp_path, len(data["input_ids"]))
    assert_rows(rows, data)
    assert rows.input_ids.dtype == np.int32 and rows.input_mask.dtype == np.int8
    large = in_file_order(tmp_path, 100, vocab_size=1 << 17)  # ids then do not fit 16 bits
    assert np.array_equal(large.input_ids, data["input_ids"][:100])
    shuffled = SampleStream(open_index(tmp_path, "training"), 1, VOCAB_SIZE, window_rows=1200).rows(0, len(rows))
    key = ["".join(map(chr, row)) for row in data["input_ids"]]
    assert sorted("".join(map(chr, row)) for row in shuffled.input_ids) == sorted(key)


def test_blocks_are_whole_chunks(tmp_path, data):
    for chunk, rows, wanted in ((1024, 2600, 1024), (256, 2600, 1024), (625, 2600, 1250), (2600, 2600, 2600), (500, 900, 1024)):
        some = {name: values[:rows] for name, values in data.items()}
        with h5py.File(tmp_path / "a.hdf5", "w") as handle:
            for name, values in some.items():
                handle.create_dataset(name, data=values, chunks=(min(chunk, rows), *values.shape[1:]), compression="gzip")
        assert open_index(tmp_path, "training").files[0].blocks == wanted


def test_a_chunk_is_inflated_once(tmp_path, data, monkeypatch):
    """Also where blocks and chunks of the data sets do not agree, as long as they are asked for in order."""
    rewrite(tmp_path / "a.hdf5", data, compression="gzip", chunks=None)
    decoded = []
    plain = FileReader._decode
    monkeypatch.setattr(FileReader, "_decode", lambda self, *a: decoded.append((a[0], a[2], a[3])) or plain(self, *a))
    SampleStream(open_index(tmp_path, "training"), 1, VOCAB_SIZE).rows(0, 2600)
    assert len(decoded) == len(set(decoded)) > 10


def test_the_order_of_our_files_is_the_one_checkpoints_know(tmp_path, data):
    """Golden: CRC-32 of the token ids of an epoch and a half, as version 1 handed them out."""
    import zlib

    for number, (low, high) in enumerate(((0, 1500), (1500, 2600))):
        part = {name: values[low:high] for name, values in data.items()}
        with h5py.File(tmp_path / f"a_training_{number}.hdf5", "w") as handle:
            for name, values in part.items():
                handle.create_dataset(
                    name, data=values, chunks=(1024, *values.shape[1:]), compression="gzip", compression_opts=1, shuffle=values.itemsize > 1
                )
    one_window = SampleStream(open_index(tmp_path, "training"), 42, VOCAB_SIZE).rows(0, 3900)
    several = SampleStream(open_index(tmp_path, "training"), 42, VOCAB_SIZE, window_rows=600).rows(0, 3900)
    assert (zlib.crc32(one_window.input_ids.tobytes()), zlib.crc32(several.input_ids.tobytes())) == GOLDEN


GOLDEN = (1516480812, 4026874243)


def test_packed_rows_are_the_padded_ones(tmp_path, data):
    pack(tmp_path / "a_training_0.hdf5", data, 0, 1700)
    pack(tmp_path / "a_training_1.hdf5", data, 1700, 2600)
    index = open_index(tmp_path, "training", SEQ_LENGTH)
    assert (index.rows, index.seq_length, index.max_predictions) == (2600, SEQ_LENGTH, PREDICTIONS)
    assert_rows(in_file_order(tmp_path, 2600), data)
    with pytest.raises(DataError, match="--max_seq_length is 128"):
        open_index(tmp_path, "training", 128)


def test_packed_damage_is_named(tmp_path, data):
    path = tmp_path / "a_training_0.hdf5"
    packed = pack(path, data, 0, 300)
    attributes = {"layout": "packed", "max_seq_length": SEQ_LENGTH, "max_predictions_per_seq": PREDICTIONS}
    for name, change, message in (
        ("row_offsets", lambda v: np.where(np.arange(len(v)) == 7, v + 40, v), r"row 6: row_offsets does not fit"),
        ("first_lengths", lambda v: np.where(np.arange(len(v)) == 9, 33, v), r"row 9: first_lengths does not fit"),
        ("masked_offsets", lambda v: np.where(np.arange(len(v)) == 4, v + 9, v), r"row 3: masked_offsets does not fit"),
        ("row_offsets", lambda v: v + 10**6, r"items 1000000 to \d+ of input_ids are wanted, which has"),
        ("row_offsets", lambda v: v - 4000, r"items -4000 to \d+ of input_ids are wanted, which has"),
        ("input_ids", lambda v: np.where(np.arange(len(v)) == 4, 500, v), r"row 0: input_ids holds id 500"),
    ):
        rewrite(path, {**packed, name: change(packed[name])}, attributes)
        with pytest.raises(DataError, match=message):
            in_file_order(tmp_path, 300)
    rewrite(path, {name: values for name, values in packed.items() if name != "first_lengths"}, attributes)
    with pytest.raises(DataError, match="lacks first_lengths"):
        open_index(tmp_path, "training")


def test_masked_language_modelling_has_no_sentence_labels(tmp_path, data):
    rewrite(tmp_path / "a.hdf5", data, {"objective": "mlm"})
    index = open_index(tmp_path, "training")
    assert index.objective == "mlm" and (in_file_order(tmp_path, 50).next_sentence_labels == NO_LABEL).all()
    rewrite(tmp_path / "b.hdf5", data)
    with pytest.raises(DataError, match="must have one objective"):
        open_index(tmp_path, "training")
    rewrite(tmp_path / "b.hdf5", data, {"objective": "mlm", "layout": "ragged"})
    with pytest.raises(DataError, match="layout is 'ragged'"):
        open_index(tmp_path, "training")


@pytest.mark.parametrize(("group", "window_rows"), [(16, 1 << 16), (64, 1 << 16), (100, 3000), (1000, 1 << 16), (5000, 1 << 16)])
def test_groups_come_from_one_bin_and_epochs_are_complete(tmp_path, data, group, window_rows):
    folder = bins(tmp_path / "bins", data)
    index = open_index(folder, "training", SEQ_LENGTH)
    assert index.rows == 2600 and index.seq_length == SEQ_LENGTH and index.binned
    stream = SampleStream(index, 5, VOCAB_SIZE, group=group, window_rows=window_rows)
    steps = [stream.rows(at, group) for at in range(0, 3 * 2600 + group, group)]
    ids = np.concatenate([step.fitted(SEQ_LENGTH, PREDICTIONS).input_ids for step in steps])
    order = {"".join(map(chr, row)): at for at, row in enumerate(data["input_ids"])}
    numbers = np.array([order["".join(map(chr, row))] for row in ids])
    for epoch in range(3):
        assert sorted(numbers[epoch * 2600 : (epoch + 1) * 2600]) == sorted(order.values()), "every row once an epoch"
    edges = np.array([20, 26, 32])
    kinds = [set(np.searchsorted(edges, step.input_mask.sum(1)).tolist()) for step in steps]
    mixed = sum(len(kind) > 1 for kind in kinds)
    assert mixed <= 4 * 3 + 1  # at most the ends of three epochs: one group for each edge between bins, one across epochs
    if group <= 100:
        assert len({frozenset(kind) for kind in kinds}) >= 3 and mixed < len(kinds) / 4
        assert not np.array_equal(numbers[:2600], numbers[2600:5200])


def test_binned_order_does_not_depend_on_how_it_is_read(tmp_path, data):
    index = open_index(bins(tmp_path / "bins", data), "training")
    whole = SampleStream(index, 5, VOCAB_SIZE, group=48).rows(0, 6000)
    again = SampleStream(index, 5, VOCAB_SIZE, group=48)
    rng = np.random.default_rng(0)
    for _ in range(40):
        first, count = int(rng.integers(0, 5900)), int(rng.integers(1, 100))
        part = again.rows(first, count).fitted(SEQ_LENGTH, PREDICTIONS)
        for field in FIELDS:
            assert np.array_equal(getattr(part, field), getattr(whole, field)[first : first + count])
    other = SampleStream(index, 5, VOCAB_SIZE, group=24).rows(0, 2600)
    assert not np.array_equal(other.input_ids, whole.input_ids[:2600])


def test_bins_save_padding(tmp_path, data):
    from berth.training.batches import BatchPlan

    rewrite(tmp_path / "a_training_0.hdf5", data)
    cells = []
    for folder in (bins(tmp_path / "bins", data), tmp_path):
        stream = SampleStream(open_index(folder, "training"), 5, VOCAB_SIZE, group=32)
        steps = [BatchPlan(32, 32, 1, 0, 1).build(stream, at) for at in range(0, 2560, 32)]
        cells.append(sum(step.micro_batches[0].input_ids.numel() for step in steps))
    assert cells[0] < 0.9 * cells[1]


def test_bins_of_one_folder_agree(tmp_path, data):
    folder = bins(tmp_path / "bins", data)
    with pytest.raises(DataError, match="but --max_seq_length is 64"):
        open_index(folder, "training", 64)
    rewrite(folder / "a_training_0_bin_64.hdf5", data)
    with pytest.raises(DataError, match="must have one layout"):
        open_index(folder, "training")
    assert open_index(bins(tmp_path / "named", data, prefix="training_text_test_0"), "test").rows == 2600


def test_damage_inside_a_chunk_is_named(tmp_path, data):
    path = tmp_path / "a_training_0.hdf5"
    rewrite(path, data, compression="gzip")
    with h5py.File(path) as handle:
        info = handle["input_ids"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[info.byte_offset + 40 : info.byte_offset + 80] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a_training_0.hdf5: chunk 0 of input_ids is damaged"):
        in_file_order(tmp_path, 10)


@pytest.mark.parametrize("writer", ["berth", "contiguous"])
@pytest.mark.parametrize(("value", "message"), [(-3, "input_ids holds"), (70_000, "input_ids holds"), (96, "input_ids holds id 96")])
def test_impossible_ids_are_named(tmp_path, data, writer, value, message):
    ids = data["input_ids"].copy()
    ids[17, 3] = value
    options = {} if writer == "contiguous" else {"compression": "gzip", "shuffle": True}
    rewrite(tmp_path / "a.hdf5", {**data, "input_ids": ids}, **options)
    for vocab_size in (VOCAB_SIZE, 66_000):
        if value < vocab_size and value > 0:
            continue
        with pytest.raises(DataError, match=rf"a.hdf5, row 17: {message.split(' id')[0]}"):
            in_file_order(tmp_path, 10, vocab_size=vocab_size)


def test_a_file_made_again_under_a_running_reader_is_refused(tmp_path, data):
    path = tmp_path / "a.hdf5"
    rewrite(path, data, compression="gzip")
    stream = SampleStream(open_index(tmp_path, "training"), 1, VOCAB_SIZE, block_rows=64, window_rows=256)
    stream.rows(0, 10)
    path.unlink()
    rewrite(path, {name: values[::-1] for name, values in data.items()}, compression="gzip")
    with pytest.raises(DataError, match="was changed while it is read"):
        stream.rows(1500, 10)


def test_chunk_tables_are_bounded(tmp_path, data):
    for number in range(6):
        rewrite(tmp_path / f"a{number}.hdf5", data, compression="gzip")
    cache = TableCache(limit=400)
    for number in (0, 1, 2, 3, 4, 5, 0):
        assert cache.get(tmp_path / f"a{number}.hdf5", FIELDS).tables["input_ids"] is not None
    assert sum(tables.chunks for tables in cache._files.values()) <= 400 and len(cache._files) >= 1


def test_other_dimensions_are_refused(tmp_path, data):
    for name, values in (
        ("next_sentence_labels", data["next_sentence_labels"][:, None]),
        ("input_mask", data["input_mask"][:, :8]),
        ("segment_ids", data["segment_ids"].astype(np.float32)),
        ("masked_lm_ids", data["masked_lm_ids"][:100]),
    ):
        rewrite(tmp_path / "a.hdf5", {**data, name: values})
        with pytest.raises(DataError, match=f"data set {name} has"):
            open_index(tmp_path, "training")


def test_rows_pad_to_the_widest():
    from berth.records.rows import Rows

    narrow, wide = Rows.zeros(2, 8, 2), Rows.zeros(3, 16, 4)
    narrow = dataclasses.replace(narrow, input_ids=narrow.input_ids + 1)
    joined = Rows.concatenate([narrow, wide])
    assert joined.input_ids.shape == (5, 16) and joined.masked_lm_ids.shape == (5, 4)
    assert joined.input_ids[:2].sum() == 16


def test_rows_of_the_longest_length_are_counted():
    from berth.records.options import MAX_SEQ_LENGTH
    from berth.records.rows import Rows

    rows = Rows.zeros(2, MAX_SEQ_LENGTH, 1)
    rows.input_mask[0] = 1
    assert rows.lengths().tolist() == [MAX_SEQ_LENGTH, 0]
