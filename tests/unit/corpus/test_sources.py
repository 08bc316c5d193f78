"""Text, JSON lines, Parquet and saved datasets as sources."""

import json

import pytest

from berth.corpus import sources
from berth.corpus.parts import Span
from berth.corpus.sources import DatasetReader, Item, JsonReader, ParquetReader, Rows, TextReader
from berth.errors import DataError


def read(reader) -> list[Item]:
    return [item for payload in reader.payloads() for item in reader.items(payload)]


def test_text_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    assert read(TextReader(tmp_path, "file")) == [Item("a.txt", None, []), Item("b/z.txt", None, ["one", "two"])]


def test_json_lines_keep_id_and_title(tmp_path):
    rows = [{"id": 5, "body": "a\r\nb", "title": "T"}, {"body": "c", "title": 3}, {"body": ""}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "y.jsonl").write_text("", encoding="utf-8")
    assert read(JsonReader(tmp_path, "body")) == [
        Item("5", "T", ["a", "b"]), Item("x.jsonl#1", None, ["c"]), Item("x.jsonl#2", None, []), Item("y.jsonl", None, []),
    ]  # fmt: skip


@pytest.fixture
def parquet():
    return pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


def test_parquet_by_row_groups(tmp_path, parquet, monkeypatch):
    import pyarrow

    monkeypatch.setattr(sources, "PART_BYTES", 400)
    texts = [f"Text {number} árvíz {number * 977}" for number in range(95)] + [None]
    table = pyarrow.table({"n": range(96), "text": texts, "title": [f"T{number}" for number in range(96)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10, compression="none")
    reader = ParquetReader(tmp_path)
    payloads = list(reader.payloads())
    assert len(payloads) > 3
    assert [payloads[0][0].start, payloads[-1][0].stop] == [0, (tmp_path / "a.parquet").stat().st_size], "every byte is in the digest"
    found = read(reader)
    assert [item.paragraphs for item in found] == [[text] if text else [] for text in texts]
    assert [item.title for item in found] == [f"T{number}" for number in range(96)]
    assert len({item.name for item in found}) == 96


def test_bad_parquet(tmp_path, parquet):
    import pyarrow

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), path)
    with pytest.raises(DataError, match=r"no column 'text' .its columns: body, n.*--text_column"):
        read(ParquetReader(path))
    with pytest.raises(DataError, match="'n' holds int64, not strings"):
        read(ParquetReader(path, "n"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="a.parquet: not a complete Parquet file"):
        read(ParquetReader(path, "body"))


def test_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = {"text": [f"Text {number}." for number in range(30)] + [None], "id": [str(number) for number in range(31)]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "plain", num_shards=3)
    reader = DatasetReader(tmp_path / "plain")
    payloads = list(reader.payloads())
    assert [[type(span) for span in payload] for payload in payloads] == [[Span]] * 3
    assert read(reader) == [Item(str(number), None, [f"Text {number}."]) for number in range(30)] + [Item("30", None, [])]
    datasets.DatasetDict({"validation": datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "splits")
    assert len(read(DatasetReader(tmp_path / "splits", split="validation"))) == 31
    with pytest.raises(DataError, match="no split 'train'; --split is one of validation"):
        read(DatasetReader(tmp_path / "splits"))
    with pytest.raises(DataError, match="no column 'body'"):
        read(DatasetReader(tmp_path / "plain", "body"))
    next((tmp_path / "plain").glob("*1-of-*.arrow")).unlink()
    with pytest.raises(DataError, match="is missing; copy the whole folder"):
        read(reader)


def test_what_load_dataset_reads_is_streamed_in_batches(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(sources, "ROWS_CHARACTERS", 1000)
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps({"text": f"Text {number}.", "title": f"T{number}"}) + "\n" for number in range(40))
    (tmp_path / "in" / "train.jsonl").write_text(lines, encoding="utf-8")
    expected = [([f"Text {number}."], f"T{number}") for number in range(40)]
    for path in (tmp_path / "in", tmp_path / "in" / "train.jsonl"):
        reader = DatasetReader(path)
        payloads = list(reader.payloads())
        assert len(payloads) > 2
        assert all(isinstance(payload, Rows) for payload in payloads)
        assert len({payload.digest() for payload in payloads}) == len(payloads)
        assert [(item.paragraphs, item.title) for item in read(reader)] == expected
    with pytest.raises(DataError, match="no column 'body'"):
        read(DatasetReader(tmp_path / "in", "body"))
