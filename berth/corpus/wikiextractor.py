"""The output of WikiExtractor (``AA/wiki_00``, ...) to articles.

In: a folder (or one file) of ``<doc id="12" url="..." title="..."> ... </doc>`` blocks, or of JSON lines (``--json``). Out: one article a block:
id, title, lines. The first line of a block is the title again and is dropped, as the classic formatting scripts do.

Every file is read whole by one worker, line by line: WikiExtractor cuts its files at 1 MB unless told otherwise, and articles never cross
files. A block without its end is an error: the file was cut off.
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from berth.corpus.documents import check_characters, paragraphs_of_text
from berth.corpus.parts import PART_BYTES, Span, cut_parts, span_lines
from berth.corpus.sources import Item, parent_of
from berth.errors import DataError

_NAME = re.compile(r"wiki_\d+(?:\.(?:txt|jsonl?))?")
_DOC = re.compile(r"\s*<doc\s([^>]*)>\s*$")
_ATTRIBUTE = re.compile(r"(\w+)=\"([^\"]*)\"")


def wikiextractor_files(root: Path) -> list[Path]:
    """``root`` if it is a file, else every ``wiki_<number>`` below it, sorted by relative path; [] if there is none."""
    if root.is_file():
        return [root]
    found = (Path(folder) / name for folder, _, names in os.walk(root) for name in names if _NAME.fullmatch(name))
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _json_article(line: str, where: str, label: str) -> Item:
    try:
        row = json.loads(line)
        text = row["text"]
        paragraphs = paragraphs_of_text(text)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DataError(f"{where} is neither a <doc ...> line nor a JSON object with a text; give WikiExtractor's output") from None
    check_characters(line, row, where)
    title = str(row.get("title") or "")
    return Item(str(row.get("id") or label), title or None, _without_title(paragraphs, title))


def _without_title(paragraphs: list[str], title: str) -> list[str]:
    """JSON output begins with the title in some versions only."""
    return paragraphs[1:] if paragraphs and paragraphs[0] == " ".join(title.split()) else paragraphs


def articles(span: Span, name: str) -> Iterator[Item]:
    """The articles of a file; one without a number is ``<name>#<line>``.

    Raises :class:`DataError` with file and line for text outside blocks or a missing ``</doc>``.
    """
    item: tuple[str, str | None] | None = None
    lines: list[str] = []
    first = True
    number = 0
    for number, line in enumerate(span_lines(span), start=1):
        where = f"{span.file}: line {number}"
        if item is None:
            if not line or line.isspace():
                continue
            if line.startswith("{"):
                yield _json_article(line, where, f"{name}#{number}")
                continue
            found = _DOC.match(line)
            if found is None:
                raise DataError(f"{where} is neither a <doc ...> line nor a JSON object with a text; give WikiExtractor's output")
            attributes = {key: html.unescape(value) for key, value in _ATTRIBUTE.findall(found[1])}
            item = (attributes.get("id") or f"{name}#{number}", attributes.get("title") or None)
            lines, first = [], True
        elif line.strip() == "</doc>":
            yield Item(item[0], item[1], lines)
            item = None
        elif first:
            first = False  # the title
        else:
            lines += paragraphs_of_text(line)
    if item is not None:
        raise DataError(f"{span.file}: line {number}: the file ends inside an article, without </doc>: it is cut off; extract it again")


@dataclasses.dataclass(frozen=True)
class WikiExtractorReader:
    """Articles of a folder or file of WikiExtractor's output."""

    root: Path

    def payloads(self) -> Iterator[tuple[Span, ...]]:
        """Whole files, small ones together."""
        files = wikiextractor_files(self.root)
        if not files:
            raise DataError(f"{self.root}: no wiki_<number> file in this folder or below; give the folder that WikiExtractor wrote")
        return (task.payload for task in cut_parts(files, "file", "x", part_bytes=PART_BYTES))

    def items(self, payload: Iterable[Span]) -> Iterator[Item]:
        """The articles of files; a file without any is one empty document."""
        for span in payload:
            empty = True
            name = span.file.relative_to(parent_of(self.root)).as_posix()
            for item in articles(span, name):
                empty = False
                yield item
            if empty:
                yield Item(name, None, [])
