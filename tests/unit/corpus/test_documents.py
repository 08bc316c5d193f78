"""Documents from text files: rules, encodings, line ends, counts."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from berth.corpus import documents
from berth.corpus.documents import document_rule, document_tasks, documents_of_spans, read_documents
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
    with pytest.raises(DataError, match=r"no \.txt or \.jsonl file"):
        read_documents(tmp_path)
    write(tmp_path / "blank.txt", "\n \n")
    with pytest.raises(DataError, match="no text"):
        list(read_documents(tmp_path))


# --------------------------------------------------------------------------------------- rules line and jsonl, tasks, spans


def lines_of(*rows: dict) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_line_rule_is_one_document_a_line(tmp_path):
    path = write(tmp_path / "articles.txt", "First  article.\n\nSecond.\r\n\n\n \nThird.")
    documents = read_documents(path, "line")
    assert [found.paragraphs for found in documents] == [["First article."], ["Second."], ["Third."]]
    assert documents.counts.empty_documents == 0


def test_json_lines(tmp_path):
    rows = ({"id": "a/1", "text": "One.\nTwo  words.\n\n"}, {"text": "Three\u2028four."}, {"id": 7, "text": " "})
    path = write(tmp_path / "x.jsonl", lines_of(*rows) + "\n")
    documents = read_documents(path)
    assert list(documents) == [("a/1", ["One.", "Two words."]), ("x.jsonl#1", ["Three four."])]
    assert documents.counts.empty_documents == 1


def test_what_auto_means(tmp_path):
    write(tmp_path / "json" / "a_00000.jsonl", lines_of({"text": "x"}))
    write(tmp_path / "json" / "extract.json", "{}")
    write(tmp_path / "text" / "a.txt", "x")
    write(tmp_path / "both" / "a.txt", "x")
    write(tmp_path / "both" / "b.jsonl", lines_of({"text": "x"}))
    assert [document_rule(tmp_path / name) for name in ("json", "text", "json/a_00000.jsonl", "text/a.txt")] == [
        "jsonl", "file", "jsonl", "blank_line",
    ]  # fmt: skip
    assert document_rule(tmp_path / "text", "line") == "line"
    with pytest.raises(ConfigError, match="holds .txt and .jsonl files"):
        document_rule(tmp_path / "both")
    assert len(list(read_documents(tmp_path / "both", "file"))) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut o', "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"content": "x", "n": 1}', "line 2 has no text under 'text' .its keys: 'content', 'n'.; name the right one with --text_column"),
        ('{"text": null}', "line 2 has no text"),
        ('{"text": "a \\ud800 b"}', "line 2: its text has half a surrogate pair"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_bad_json_lines_name_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "x.jsonl", lines_of({"text": "good"}) + line + "\n")
    with pytest.raises(DataError, match=rf"x\.jsonl: {message}"):
        list(read_documents(path))


@pytest.mark.parametrize("rule", ["blank_line", "line", "jsonl", "file"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tasks_split_no_document(tmp_path, rule, end):
    texts = [f"Document {number}, árvíz {'x' * (number * 7 % 40)}." for number in range(50)]
    if rule == "file":
        for number, text in enumerate(texts):
            write(tmp_path / "in" / f"{number:03d}.txt", text + end)
        path = tmp_path / "in"
    elif rule == "jsonl":
        path = write(tmp_path / "x.jsonl", "".join(json.dumps({"text": text}) + end for text in texts))
    else:
        path = write(tmp_path / "x.txt", (end * 3 if rule == "blank_line" else end).join(texts) + end)
    tasks = document_tasks(path, rule, "part", part_bytes=300)
    assert len(tasks) > 3
    assert [task.name for task in tasks[:2]] == ["part_00000.txt", "part_00001.txt"]
    found = [document for task in tasks for document in documents_of_spans(task.payload, rule, path)]
    assert [document.paragraphs for document in found] == [[text] for text in texts]
    assert len({document.name for document in found}) == 50, "names must differ"


def test_documents_without_text_are_yielded_for_the_caller_to_count(tmp_path):
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", " \n\n")
    write(tmp_path / "c.txt", "text")
    for rule in ("file", "blank_line", "line"):
        (task,) = document_tasks(tmp_path, rule, "x")
        assert [document.paragraphs for document in documents_of_spans(task.payload, rule, tmp_path)] == [[], [], ["text"]]
    blank = write(tmp_path / "many.txt", "\n" * 500 + "text\n\n")
    tasks = document_tasks(blank, "blank_line", "x", part_bytes=100)
    assert [d.paragraphs for task in tasks for d in documents_of_spans(task.payload, "blank_line")] == [["text"]], (
        "a cut makes no empty document"
    )
    tail = write(tmp_path / "tail.txt", "text\n" + "\n" * 500)
    tasks = document_tasks(tail, "line", "x", part_bytes=100)
    assert len(tasks) > 2
    assert [d.paragraphs for task in tasks for d in documents_of_spans(task.payload, "line")] == [["text"]]


@given(st.text(alphabet="ab \t\n\u00a0\u3000\x1c\x85é", max_size=30))
def test_long_lines_are_cleaned_as_short_ones(text):
    assert documents._RUN.sub(" ", text.strip()) == documents.single_spaces(text) == " ".join(text.split())


def test_a_long_single_line(tmp_path):
    path = write(tmp_path / "long.txt", "word " * 1_000_000)
    (task,) = document_tasks(path, "line", "x", part_bytes=1000)
    (document,) = documents_of_spans(task.payload, "line")
    assert document.paragraphs == ["word " * 999_999 + "word"]
