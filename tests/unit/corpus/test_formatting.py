"""Stage format: one article a line."""

import json
from pathlib import Path

import pytest

from berth.corpus.documents import read_documents
from berth.corpus.formatting import format_articles
from berth.errors import ConfigError, DataError


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


WANTED = "First line. Második sor.\n\nOther article.\n\n"


def test_the_same_from_every_form(tmp_path):
    write(
        tmp_path / "wiki" / "AA" / "wiki_00",
        '<doc id="1" title="T">\nT\n\nFirst  line.\n\nMásodik sor.\n</doc>\n<doc id="2" title="U">\nU\n</doc>\n',
    )
    write(tmp_path / "wiki" / "AA" / "wiki_01", '<doc id="3" title="V">\nV\nOther article.\n</doc>\n')
    rows = [{"id": "1", "title": "T", "text": "First line.\nMásodik sor."}, {"id": "2", "text": ""}, {"id": "3", "text": "Other article."}]
    write(tmp_path / "json" / "x_00000.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "text" / "a.txt", "First line.\r\n\r\nMásodik\nsor.")
    write(tmp_path / "text" / "b.txt", "")
    write(tmp_path / "text" / "c.txt", "Other article.")
    for name in ("wiki", "json", "text"):
        output = tmp_path / "out" / f"{name}.txt"
        result = format_articles(tmp_path / name, output, processes=2 if name == "wiki" else 1)
        assert output.read_text(encoding="utf-8") == WANTED, name
        assert (result.counts["documents_in"], result.counts["documents_out"], result.counts["rejected_empty"]) == (3, 2, 1)
    assert [found.paragraphs for found in read_documents(tmp_path / "out" / "text.txt", "line")] == [
        [line] for line in WANTED.split("\n\n")[:2]
    ]


def test_errors(tmp_path):
    write(tmp_path / "in" / "AA" / "wiki_00", b'<doc id="1" title="T">\nT\n\xe1rv\xedz\n</doc>\n')
    with pytest.raises(DataError, match=r"wiki_00: byte 0xe1 at offset 25 is not UTF-8"):
        format_articles(tmp_path / "in", tmp_path / "x.txt")
    assert not (tmp_path / "x.txt").exists()
    write(tmp_path / "in" / "AA" / "wiki_00", '<doc id="1" title="T">\nT\n</doc>\n')
    with pytest.raises(DataError, match="no article with text"):
        format_articles(tmp_path / "in", tmp_path / "x.txt")
    with pytest.raises(ConfigError, match="must name a file with a suffix"):
        format_articles(tmp_path / "in", tmp_path / "x")
    with pytest.raises(DataError, match="no such file or folder"):
        format_articles(tmp_path / "missing", tmp_path / "x.txt")
    write(tmp_path / "dump" / "d.xml", "<mediawiki>")
    with pytest.raises(ConfigError, match="extract it first"):
        format_articles(tmp_path / "dump", tmp_path / "x.txt")
    write(tmp_path / "text" / "a.txt", "x")
    with pytest.raises(ConfigError, match="lies in the input folder"):
        format_articles(tmp_path / "text", tmp_path / "text" / "out.txt")
