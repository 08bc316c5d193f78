"""Documents from plain text and JSON lines: what is one document, and where its paragraphs end.

In: a file, or a folder of files (searched recursively, sorted by relative path). Out: a stream of :class:`Document`.
How a document is recognised (the *rule*):

``file``        one document a ``.txt`` file; blank lines part paragraphs, lines of one paragraph are joined (hard-wrapped text)
``blank_line``  a blank line ends a document; every line inside is a paragraph of its own
``line``        one document a line, blank lines between are ignored (the classic one-article-a-line files)
``jsonl``       one JSON object a line in ``.jsonl`` files, as ``data/extract.py`` writes them: lines of its text are paragraphs
``auto``        a folder: ``jsonl`` if there are ``.jsonl`` files, else ``file``; a single file: ``jsonl`` by its suffix, else ``blank_line``

Only one document is in memory at a time. :func:`read_documents` walks a corpus in one process; :func:`document_tasks` and
:func:`documents_of_spans` cut it into the parts of a stage (:mod:`berth.corpus.parts`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from berth.corpus.parts import PART_BYTES, Span, Task, cut_parts, span_lines
from berth.errors import ConfigError, DataError
from berth.text.lines import text_files

DOCUMENT_RULES = ("auto", "file", "blank_line", "line", "jsonl")
TEXT_SUFFIXES, JSON_SUFFIXES = (".txt",), (".jsonl",)
_BOUNDARY = {"file": "file", "blank_line": "blank_line", "line": "line", "jsonl": "line"}
_LONG_LINE = 1 << 20
_RUN = re.compile(r"[^\S ]\s*| \s+")  # white space that is not a single space
_SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """A document: where it comes from, and its paragraphs with single spaces between words (none of them empty)."""

    name: str
    paragraphs: list[str]


@dataclasses.dataclass(frozen=True)
class DocumentCounts:
    """What one full pass over a corpus saw. ``characters`` are those that are not white space."""

    files: int
    documents: int
    empty_documents: int
    paragraphs: int
    characters: int


# ------------------------------------------------------------------------------------------------- rules and their files


def document_rule(path: str | Path, rule: str = "auto") -> str:
    """The rule for ``path``: ``rule`` itself, or what ``auto`` means there (see the module).

    Raises :class:`ConfigError` for an unknown rule and for a folder with both ``.txt`` and ``.jsonl`` files under ``auto``.
    """
    if rule not in DOCUMENT_RULES:
        raise ConfigError(f"documents={rule!r} is not one of {', '.join(DOCUMENT_RULES)}")
    root = Path(path)
    if rule != "auto":
        return rule
    if not root.is_dir():
        return "jsonl" if root.suffix.lower() in JSON_SUFFIXES else "blank_line"
    suffixes = {file.suffix.lower() for file in text_files(root, TEXT_SUFFIXES + JSON_SUFFIXES)}
    if len(suffixes) > 1:
        raise ConfigError(f"{path}: holds .txt and .jsonl files; say which to read with documents=file or documents=jsonl")
    return "jsonl" if suffixes <= set(JSON_SUFFIXES) else "file"


def document_files(path: str | Path, rule: str) -> list[Path]:
    """The files a rule (not ``auto``) reads: ``path`` itself, or those of its suffix below the folder, sorted."""
    return text_files(Path(path), JSON_SUFFIXES if rule == "jsonl" else TEXT_SUFFIXES)


def document_tasks(path: str | Path, rule: str, stem: str, suffix: str = ".txt", part_bytes: int = PART_BYTES) -> list[Task]:
    """The corpus at ``path`` cut into the tasks of a stage, none of which splits a document.

    Args:
        path: a file or a folder.
        rule: how documents are recognised; ``auto`` is resolved with :func:`document_rule`.
        stem, suffix: names of the part files.
        part_bytes: input bytes of a part; part of the output's identity.

    The payload of a task is a tuple of :class:`Span` for :func:`documents_of_spans`, which must get the resolved rule.
    Raises :class:`ConfigError` and :class:`DataError` as :func:`document_rule` and :func:`berth.text.lines.text_files` do.
    """
    rule = document_rule(path, rule)
    return cut_parts(document_files(path, rule), _BOUNDARY[rule], stem, suffix, part_bytes)


# ------------------------------------------------------------------------------------------------------------- documents


def single_spaces(text: str) -> str:
    """``text`` without white space around it, and with one space for every run inside it.

    A line of 100 MB is not split into its words: they would take 1.5 GB.
    """
    if len(text) <= _LONG_LINE:
        return " ".join(text.split())
    return _RUN.sub(" ", text.strip())


def paragraphs_of_text(text: str) -> list[str]:
    """The lines of ``text`` that hold something, with single spaces between words."""
    return [found for line in text.split("\n") if (found := single_spaces(line))]


def _paragraphs_of_file(lines: Iterable[str]) -> list[str]:
    paragraphs: list[str] = []
    paragraph: list[str] = []
    for line in lines:
        found = single_spaces(line)
        if found:
            paragraph.append(found)
        elif paragraph:
            paragraphs.append(" ".join(paragraph))
            paragraph = []
    if paragraph:
        paragraphs.append(" ".join(paragraph))
    return paragraphs


def _at_blank_lines(lines: Iterable[str]) -> Iterator[list[str]]:
    document: list[str] = []
    for line in lines:
        paragraph = single_spaces(line)
        if paragraph:
            document.append(paragraph)
        elif document:
            yield document
            document = []
    if document:
        yield document


def check_characters(line: str, found: dict[str, Any], where: str, text_column: str = "text") -> None:
    """Raise :class:`DataError` when what is taken over from a JSON line cannot be written as UTF-8 again."""
    if "\\u" not in line:
        return
    for name in (text_column, "id", "title"):
        value = found.get(name)
        if isinstance(value, str) and _SURROGATE.search(value):
            raise DataError(f"{where}: its {name} has half a surrogate pair (\\ud800-\\udfff), which is no character; repair the file")


def json_objects(span: Span, text_column: str = "text") -> Iterator[dict[str, Any]]:
    """The objects of a span of JSON lines, each with a string under ``text_column``; blank lines are passed over.

    Raises :class:`DataError` with file, line and fix for a line that is no such object, or whose text cannot be UTF-8.
    """
    for number, line in enumerate(span_lines(span), start=1):
        if not line or line.isspace():
            continue
        where = f"{span.file}: line {number}" + (f" after byte {span.start}" if span.start else "")
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error if isinstance(error, ValueError) else "nested too deeply"
            raise DataError(f'{where} is not JSON ({reason}); every line must be one object like {{"text": "..."}}') from None
        if not isinstance(found, dict):
            raise DataError(f'{where} is not a JSON object; every line must be one object like {{"text": "..."}}')
        text = found.get(text_column)
        if not isinstance(text, str):
            keys = ", ".join(map(repr, list(found)[:8])) or "none"
            raise DataError(f"{where} has no text under {text_column!r} (its keys: {keys}); name the right one with --text_column")
        check_characters(line, found, where, text_column)
        yield found


def _from_json(span: Span, label: str, text_column: str) -> Iterator[Document]:
    for number, found in enumerate(json_objects(span, text_column)):
        name = found.get("id")
        label_of_line = str(name) if isinstance(name, (str, int)) else f"{label}#{number}"
        yield Document(label_of_line, paragraphs_of_text(found[text_column]))


def _documents_of_span(span: Span, rule: str, root: Path | None, text_column: str) -> Iterator[Document]:
    inside = root is not None and root in span.file.parents
    name = span.file.relative_to(root).as_posix() if root is not None and inside else span.file.name
    label = f"{name}@{span.start}" if span.start else name
    if rule == "file":
        yield Document(name, _paragraphs_of_file(span_lines(span)))
        return
    found: Iterator[Document]
    if rule == "jsonl":
        found = _from_json(span, label, text_column)
    elif rule == "line":
        lines = (text for line in span_lines(span) if (text := single_spaces(line)))
        found = (Document(f"{label}#{number}", [text]) for number, text in enumerate(lines))
    else:
        found = (Document(f"{label}#{number}", document) for number, document in enumerate(_at_blank_lines(span_lines(span))))
    empty = True
    for document in found:
        empty = False
        yield document
    if empty and span.start == 0 and span.stop >= span.file.stat().st_size:  # a whole file without text
        yield Document(name, [])


def documents_of_spans(spans: Iterable[Span], rule: str, root: str | Path | None = None, text_column: str = "text") -> Iterator[Document]:
    """The documents of spans cut by :func:`document_tasks`, in order.

    A document without text is yielded with no paragraphs, and so is a file without any: the caller counts it.

    Args:
        rule: resolved (not ``auto``).
        root: names become relative to this folder; otherwise they are file names. In a part that does not begin its file a
            name has the byte where the part begins: ``name@16777230#0``. JSON lines keep their ``id``.
        text_column: key of the text in JSON lines.

    Raises :class:`DataError` for invalid UTF-8 (file, byte) and bad JSON lines (file, line).
    """
    assert rule in _BOUNDARY, rule
    base = None if root is None else Path(root)
    for span in spans:
        yield from _documents_of_span(span, rule, base, text_column)


class Documents:
    """An iterable over the documents of a corpus that can be walked more than once, always in the same order.

    ``counts`` holds the :class:`DocumentCounts` of the last complete walk. A document without text is counted and
    skipped; a corpus without any raises :class:`DataError` at the end of the walk.
    """

    def __init__(self, path: Path, rule: str, files: list[Path]) -> None:
        self.path, self.rule, self.files = path, rule, files
        self.counts: DocumentCounts | None = None

    def __iter__(self) -> Iterator[Document]:
        documents = empty = paragraphs = characters = 0
        spans = (Span(file, 0, file.stat().st_size) for file in self.files)
        for document in documents_of_spans(spans, self.rule, self.path):
            found = document.paragraphs
            if not found:
                empty += 1
                continue
            documents += 1
            paragraphs += len(found)
            characters += sum(len(text) - text.count(" ") for text in found)
            yield document
        if not documents:
            raise DataError(f"{self.path}: no text in {len(self.files)} file(s): every line is blank")
        self.counts = DocumentCounts(len(self.files), documents, empty, paragraphs, characters)


def read_documents(path: str | Path, documents: str = "auto") -> Documents:
    """Open a corpus for reading (streaming; no text is read yet).

    Args:
        path: a UTF-8 text or JSON lines file, or a folder searched recursively for ``*.txt`` (rule ``jsonl``: ``*.jsonl``).
        documents: one of :data:`DOCUMENT_RULES` (see the module).

    Raises:
        ConfigError: ``documents`` is not one of them, or ``auto`` cannot choose.
        DataError: the path is missing or holds no text file; while iterating: invalid UTF-8, bad JSON, no text at all.
    """
    rule = document_rule(path, documents)
    return Documents(Path(path), rule, document_files(path, rule))
