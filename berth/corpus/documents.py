"""Documents from plain text: what is one document, and where its paragraphs end.

In: a ``.txt`` file or a folder of them (searched recursively, sorted by relative path). Out: a stream of
:class:`Document`. How a document is recognised:

``file``        one document a file; blank lines part paragraphs, lines of one paragraph are joined (hard-wrapped text)
``blank_line``  a blank line ends a document; every line inside is a paragraph of its own
``auto``        ``file`` for a folder, ``blank_line`` for a single file

Only one document is in memory at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from berth.errors import ConfigError, DataError
from berth.text.lines import read_lines, text_files

DOCUMENT_RULES = ("auto", "file", "blank_line")


class Document(NamedTuple):
    """A document: where it comes from, and its paragraphs with single spaces between words (never empty)."""

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


def _paragraphs_of_file(lines: Iterable[str]) -> list[str]:
    paragraphs: list[str] = []
    words: list[str] = []
    for line in lines:
        found = line.split()
        if found:
            words.extend(found)
        elif words:
            paragraphs.append(" ".join(words))
            words = []
    if words:
        paragraphs.append(" ".join(words))
    return paragraphs


def _documents_of_file(lines: Iterable[str]) -> Iterator[list[str]]:
    document: list[str] = []
    for line in lines:
        paragraph = " ".join(line.split())
        if paragraph:
            document.append(paragraph)
        elif document:
            yield document
            document = []
    if document:
        yield document


class Documents:
    """An iterable over the documents of a corpus that can be walked more than once, always in the same order.

    ``counts`` holds the :class:`DocumentCounts` of the last complete walk. A document without text is counted and
    skipped; a corpus without any raises :class:`DataError` at the end of the walk.
    """

    def __init__(self, path: Path, rule: str, files: list[Path]) -> None:
        self.path, self.rule, self.files = path, rule, files
        self.counts: DocumentCounts | None = None

    def _file_documents(self, file: Path) -> Iterator[list[str]]:
        if self.rule == "file":
            yield _paragraphs_of_file(read_lines(file))
        else:
            empty = True
            for document in _documents_of_file(read_lines(file)):
                empty = False
                yield document
            if empty:
                yield []

    def __iter__(self) -> Iterator[Document]:
        documents = empty = paragraphs = characters = 0
        for file in self.files:
            name = file.relative_to(self.path).as_posix() if file != self.path else file.name
            for number, found in enumerate(self._file_documents(file)):
                if not found:
                    empty += 1
                    continue
                documents += 1
                paragraphs += len(found)
                characters += sum(len(text) - text.count(" ") for text in found)
                yield Document(name if self.rule == "file" else f"{name}#{number}", found)
        if not documents:
            raise DataError(f"{self.path}: no text in {len(self.files)} file(s): every line is blank")
        self.counts = DocumentCounts(len(self.files), documents, empty, paragraphs, characters)


def read_documents(path: str | Path, documents: str = "auto") -> Documents:
    """Open a corpus for reading (streaming; nothing is read yet).

    Args:
        path: a UTF-8 text file, or a folder searched recursively for ``*.txt``.
        documents: ``auto``, ``file`` or ``blank_line`` (see the module).

    Raises:
        ConfigError: ``documents`` is not one of the three.
        DataError: the path is missing or holds no text file; while iterating: invalid UTF-8, no text at all.
    """
    if documents not in DOCUMENT_RULES:
        raise ConfigError(f"documents={documents!r} is not one of {', '.join(DOCUMENT_RULES)}")
    root = Path(path)
    files = text_files(root)
    rule = documents
    if rule == "auto":
        rule = "file" if root.is_dir() else "blank_line"
    return Documents(root, rule, files)
