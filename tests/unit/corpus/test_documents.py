"""Documents from text files: rules, encodings, line ends, counts."""

from pathlib import Path

import pytest

from berth.corpus.documents import read_documents
from berth.errors import ConfigError, DataError


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_single_file_is_split_at_blank_lines(tmp_path):
    path = write(tmp_path / "all.txt", "\n\nOne.\nTwo  words.\n\n \t\n\nThree.")
    documents = read_documents(path)
    assert [found.paragraphs for found in documents] == [["One.", "Two words."], ["Three."]]
    counts = documents.counts
    assert (counts.files, counts.documents, counts.paragraphs, counts.characters) == (1, 2, 3, 4 + 9 + 6)


def test_folder_is_one_document_a_file_in_sorted_order(tmp_path):
    write(tmp_path / "b.txt", "wrapped\nline\n\nnext paragraph\n")
    write(tmp_path / "a" / "z.txt", "first")
    write(tmp_path / "c.txt", " \n\n")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / "notes.md", "no")
    documents = read_documents(tmp_path)
    assert list(documents) == [("a/z.txt", ["first"]), ("b.txt", ["wrapped line", "next paragraph"])]
    assert documents.counts.empty_documents == 1
    assert list(documents) == list(documents), "the second walk must give the same"


def test_rules_can_be_forced(tmp_path):
    path = write(tmp_path / "one.txt", "a\n\nb\n")
    assert [found.paragraphs for found in read_documents(path, "file")] == [["a", "b"]]
    assert [found.paragraphs for found in read_documents(tmp_path, "blank_line")] == [["a"], ["b"]]
    with pytest.raises(ConfigError, match="auto, file, blank_line"):
        read_documents(path, "page")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_mark(tmp_path, end):
    path = write(tmp_path / "x.txt", b"\xef\xbb\xbf" + f"a{end}{end}b{end}c{end}".encode())
    assert [found.paragraphs for found in read_documents(path)] == [["a"], ["b", "c"]]


@pytest.mark.parametrize("before", [0, 10, (1 << 20) - 1, (1 << 20) + 3])
def test_invalid_utf8_names_file_and_offset(tmp_path, before):
    path = write(tmp_path / "bad.txt", b"x" * before + "árvíz".encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=rf"bad\.txt: byte 0xe1 at offset {before} is not UTF-8.*iconv"):
        list(read_documents(path))


def test_truncated_character_at_the_end(tmp_path):
    path = write(tmp_path / "cut.txt", "abcő".encode()[:-1])
    with pytest.raises(DataError, match="offset 3"):
        list(read_documents(path))


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_documents(tmp_path / "missing")
    with pytest.raises(DataError, match=r"no \.txt file"):
        read_documents(tmp_path)
    write(tmp_path / "blank.txt", "\n \n")
    with pytest.raises(DataError, match="no text"):
        list(read_documents(tmp_path))
