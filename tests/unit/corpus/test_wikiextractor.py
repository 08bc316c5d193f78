"""WikiExtractor's output, both forms."""

import json
from pathlib import Path

import pytest

from berth.corpus.sources import Item
from berth.corpus.wikiextractor import WikiExtractorReader
from berth.errors import DataError

DOC = '<doc id="{0}" url="https://hu.wikipedia.org/wiki?curid={0}" title="{1}">\n{1}\n\n{2}\n</doc>\n'


def read(root: Path) -> list[Item]:
    reader = WikiExtractorReader(root)
    return [item for payload in reader.payloads() for item in reader.items(payload)]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_folders_of_blocks(tmp_path):
    write(tmp_path / "AB" / "wiki_00", DOC.format(3, "C", "Third."))
    write(tmp_path / "AA" / "wiki_01", DOC.format(2, "Tom &amp; &quot;B&quot;", ""))
    write(tmp_path / "AA" / "wiki_00", DOC.format(1, "Árvíz", "First  line.\n\nSecond <b>line</b>.") + "\n")
    write(tmp_path / "AA" / "notes.md", "no")
    assert read(tmp_path) == [
        Item("1", "Árvíz", ["First line.", "Second <b>line</b>."]),
        Item("2", 'Tom & "B"', []),
        Item("3", "C", ["Third."]),
    ]


def test_json_lines_with_and_without_the_title_in_the_text(tmp_path):
    rows = [{"id": "1", "title": "A", "text": "A\n\nText of A."}, {"id": "2", "title": "B", "text": "Text of B.\nMore."}]
    write(tmp_path / "AA" / "wiki_00", "".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path) == [Item("1", "A", ["Text of A."]), Item("2", "B", ["Text of B.", "More."])]


def test_articles_without_a_number_have_names_of_their_own(tmp_path):
    for folder in ("AA", "AB"):
        write(tmp_path / folder / "wiki_00", '<doc title="A">\nA\nText.\n</doc>\n{"title": "B", "text": "More."}\n')
    assert [item.name for item in read(tmp_path)] == ["AA/wiki_00#1", "AA/wiki_00#5", "AB/wiki_00#1", "AB/wiki_00#5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DOC.format(1, "A", "a").replace("</doc>\n", ""), r"wiki_00: line 4: the file ends inside an article"),
        ("stray\n" + DOC.format(1, "A", "a"), r"wiki_00: line 1 is neither"),
        ('{"id": "1", "te\n', r"wiki_00: line 1 is neither"),
    ],
)
def test_damaged_files(tmp_path, text, message):
    write(tmp_path / "AA" / "wiki_00", text)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="no wiki_<number> file"):
        read(tmp_path)
    write(tmp_path / "wiki_00", "\n")
    assert read(tmp_path) == [Item("wiki_00", None, [])], "counted as empty"
