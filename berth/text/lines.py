"""Strict UTF-8 text input: the one place where berth decodes text.

In: files of any size and any line ending (LF, CRLF, CR), with or without a byte order mark. Out: lines without their end.
Bytes that are not UTF-8 stop the run with the file and the byte offset: replacing or skipping them would silently delete
letters (a Latin-1 round trip turns "árvíztűrő" into "árvíztr"). Only LF, CRLF and CR end a line; form feeds, U+0085 or
U+2028 do not (``str.splitlines`` would split there).
"""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from berth.errors import ConfigError, DataError

BLOCK_BYTES = 1 << 20
TEXT_SUFFIX = ".txt"
JOURNALS = ".*.journal"  # what a stage (:mod:`berth.corpus.parts`) leaves in its folder until every part is there
_ASCII_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def invalid_utf8(path: Path, offset: int, byte: int) -> DataError:
    """The error for a byte that is not UTF-8: names file, offset, and the command that repairs it."""
    return DataError(
        f"{path}: byte 0x{byte:02x} at offset {offset} is not UTF-8; convert the file first, for example "
        f"'iconv -f ISO-8859-2 -t UTF-8 {path.name} > fixed.txt' with the encoding it really has"
    )


def _decoded(path: Path, start: int, stop: int | None) -> Iterator[str]:
    """The text of ``path`` between two byte offsets, about 1 MiB at a time, line ends as ``\\n``."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset, first = start, start == 0
    if not path.is_file():
        raise DataError(f"{path}: no such text file")
    with open(path, "rb") as handle:
        handle.seek(start)
        while True:
            block = handle.read(BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - offset))
            begin = offset - len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise invalid_utf8(path, begin + error.start, error.object[error.start]) from None
            offset += len(block)
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            text = newlines.decode(text, final=not block)
            if text:
                yield text
            if not block:
                return


def read_blocks(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Yield the decoded text of ``path`` in pieces of about 1 MiB that end at a line end (the last one may not).

    ``start`` and ``stop`` (bytes, where lines begin; ``None``: the end) read a part of it. Line ends are normalised to
    ``\\n`` and a leading byte order mark is removed. Raises :class:`DataError` at the first invalid byte and for a path that
    cannot be read as a file.
    """
    pending: list[str] = []
    for text in _decoded(path, start, stop):
        head, end, tail = text.rpartition("\n")
        if end:
            yield "".join(pending) + head + end
            pending = []
        if tail:
            pending.append(tail)
    if pending:
        yield "".join(pending)


def _word_edge(text: str) -> int:
    """Where a long piece of a line may be cut without cutting a word: behind white space, else behind a character that BERT
    sets apart (punctuation, CJK), else at its end: what has neither for so long is no word but becomes ``[UNK]`` anyway."""
    edge = max(text.rfind(" "), text.rfind("\t"), text.rfind("\u3000")) + 1
    if edge:
        return edge
    for at in range(len(text) - 1, max(0, len(text) - (1 << 16)), -1):
        if "\u3400" <= text[at] <= "\u9fff" or text[at] in _ASCII_PUNCTUATION:
            return at + 1
    return len(text)


def read_pieces(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """As :func:`read_blocks`, but a line longer than 1 MiB comes in several pieces that end between two words.

    Memory stays the same however long a line is. Lines are ended by ``\\n``; a piece without one at its end is continued.
    """
    pending = ""
    for text in _decoded(path, start, stop):
        pending += text
        cut = pending.rfind("\n") + 1
        if not cut and len(pending) >= BLOCK_BYTES:
            cut = _word_edge(pending)
        if cut:
            yield pending[:cut]
            pending = pending[cut:]
    if pending:
        yield pending


def read_lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Yield the lines of ``path`` (or of a part of it) without their ends; arguments and errors as :func:`read_blocks`."""
    for block in read_blocks(path, start, stop):
        lines = block.split("\n")
        if not lines[-1]:
            lines.pop()
        yield from lines


def _walk(root: Path) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """Every folder at or below ``root`` with its entries, each folder once: links to folders are followed, after the rest.

    Names that start with a dot are left out. Raises :class:`DataError` for a folder that cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
            for entry in entries:
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(folder / entry.name)
        except OSError as error:
            raise DataError(f"{folder}: this folder cannot be read: {error.strerror or error}") from error
        yield folder, entries


def text_files(path: Path, suffixes: tuple[str, ...] = (".txt",)) -> list[Path]:
    """The text files of ``path``: itself, or every file with one of ``suffixes`` below a folder, sorted by relative path.

    Links to folders are followed, each folder is read once. Names that start with a dot are left out (temporary files,
    macOS resource forks). Raises :class:`DataError` when the path is missing, a folder below it cannot be read or is the
    unfinished output of a stage (part of the text would be taken for all of it), such a file is a link to nothing, or there
    is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    relative = []
    for folder, entries in _walk(path):
        for journal in sorted(folder.glob(JOURNALS)):
            stage = journal.name.split(".")[1]
            raise DataError(
                f"{folder}: the stage {stage} has not finished here, files may be missing: run it again (or wait for it), "
                f"or delete {journal.name} to use what is there"
            )
        for entry in entries:
            if Path(entry.name).suffix.lower() not in suffixes or entry.is_dir():
                continue
            if not entry.is_file():
                raise DataError(f"{folder / entry.name}: not a file, or a link to a file that does not exist; remove it")
            relative.append((folder / entry.name).relative_to(path))
    files = [path / name for name in sorted(relative, key=lambda name: name.as_posix())]
    if not files:
        kinds = " or ".join(suffixes)
        raise DataError(f"{path}: no {kinds} file in this folder or below; put the text there as UTF-8 {kinds} files")
    return files


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


def check_output(option: str, output: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raise :class:`ConfigError` when ``output`` (of ``option``) is one of ``inputs``, or a ``.txt`` in an input folder.

    The first would replace the input, the second would be read as text by the next run.
    """
    target = Path(output)
    for source in map(Path, inputs):
        if not source.is_dir():
            if _same(target, source):
                raise ConfigError(f"{option} {output} is also an input and would be overwritten; choose another name")
        elif target.suffix.lower() == TEXT_SUFFIX and not target.name.startswith("."):
            parents = {parent.resolve() for parent in target.resolve().parents}
            if any(folder.resolve() in parents for folder, _ in _walk(source)):
                raise ConfigError(
                    f"{option} {output} lies in the input folder {source}: the next run would read it as text; put it elsewhere"
                )
