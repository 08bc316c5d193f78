"""Sources of documents for ``data/extract.py`` beside dumps: text, JSON lines, Parquet, Hugging Face ``datasets``.

In: a file or a folder. Out of a reader: :class:`Item`, one a document, in the order of the source. A source says how it is cut into
payloads (``payloads()``, in the main process) and reads one of them (``items()``, in a worker). A payload is a tuple of byte
ranges (:class:`berth.corpus.parts.Span`) wherever the format allows it, so that workers read the files themselves and the stage
engine notices changed bytes; data that only a library can stream travels as :class:`Rows`.

Optional libraries are imported where they are needed. Nothing here uses the network: ``datasets`` is told so before it is imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from berth.corpus.documents import document_tasks, documents_of_spans, json_objects, paragraphs_of_text
from berth.corpus.parts import PART_BYTES, Span
from berth.errors import ConfigError, DataError
from berth.files import read_json
from berth.text.lines import text_files

ROWS_CHARACTERS = 4 << 20  # of text in a batch of rows sent to a worker; part of the output's identity
_ROWS_AT_ONCE = 512


class Item(NamedTuple):
    """A document as its source gives it: name within the source, title, paragraphs; ``reason`` says why it is left out ("": it is not)."""

    name: str
    title: str | None
    paragraphs: list[str]
    reason: str = ""


class Rows(NamedTuple):
    """Rows (name, title, text) of a source that only a library can stream, and the file or folder they are from."""

    file: Path
    rows: tuple[tuple[str, str | None, str], ...]

    def digest(self) -> str:
        """SHA-256 of the rows."""
        return hashlib.sha256(repr(self.rows).encode("utf-8", "surrogatepass")).hexdigest()


def parent_of(root: Path) -> Path:
    """The folder that the names of documents are relative to."""
    return root if root.is_dir() else root.parent


def _title(row: Mapping[str, Any]) -> str | None:
    title = row.get("title")
    return title if isinstance(title, str) and title.strip() else None


def _name(row: Mapping[str, Any], label: str) -> str:
    name = row.get("id")
    return str(name) if isinstance(name, (str, int)) and str(name) else label


# ------------------------------------------------------------------------------------------------- text and JSON lines


@dataclasses.dataclass(frozen=True)
class TextReader:
    """``.txt`` files by one of the rules of :mod:`berth.corpus.documents` (resolved, not ``auto``)."""

    root: Path
    rule: str

    def payloads(self) -> Iterator[tuple[Span, ...]]:
        """Byte ranges that do not split a document."""
        return (task.payload for task in document_tasks(self.root, self.rule, "x"))

    def items(self, payload: Iterable[Span]) -> Iterator[Item]:
        """The documents of byte ranges."""
        for document in documents_of_spans(payload, self.rule, parent_of(self.root)):
            yield Item(document.name, None, document.paragraphs)


@dataclasses.dataclass(frozen=True)
class JsonReader:
    """JSON lines; the text is under ``text_column``, and ``id`` and ``title`` are taken over."""

    root: Path
    text_column: str = "text"

    def payloads(self) -> Iterator[tuple[Span, ...]]:
        """Byte ranges that do not split a line."""
        return (task.payload for task in document_tasks(self.root, "jsonl", "x"))

    def items(self, payload: Iterable[Span]) -> Iterator[Item]:
        """The objects of byte ranges; a file without any is one empty document."""
        for span in payload:
            name = span.file.relative_to(parent_of(self.root)).as_posix()
            label = f"{name}@{span.start}" if span.start else name
            number = -1
            for number, row in enumerate(json_objects(span, self.text_column)):
                yield Item(_name(row, f"{label}#{number}"), _title(row), paragraphs_of_text(row[self.text_column]))
            if number < 0 and not span.start:
                yield Item(name, None, [])


# --------------------------------------------------------------------------------------------------------------- Parquet


def _row_group_starts(metadata: Any) -> list[int]:
    """Where the bytes of every row group begin; the first from the start of the file."""
    starts = []
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(number) for number in range(metadata.num_columns)]
        offsets = [offset for column in columns for offset in (column.dictionary_page_offset, column.data_page_offset) if offset]
        starts.append(min(offsets, default=0))
    return [0, *starts[1:]]


@dataclasses.dataclass(frozen=True)
class ParquetReader:
    """Parquet files, row group by row group; needs pyarrow (``berth[parquet]``)."""

    root: Path
    text_column: str = "text"

    def _open(self, file: Path) -> Any:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ConfigError(f'--input {self.root}: Parquet files need pyarrow; pip install "berth[parquet]"') from None
        try:
            opened = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a complete Parquet file ({str(error).splitlines()[0]}); fetch it again") from None
        names = opened.schema_arrow.names
        if self.text_column not in names:
            raise DataError(
                f"{file} has no column {self.text_column!r} (its columns: {', '.join(names)}); name the right one with --text_column"
            )
        kind = opened.schema_arrow.field(self.text_column).type
        if str(kind) not in ("string", "large_string", "string_view"):
            raise DataError(f"{file}: column {self.text_column!r} holds {kind}, not strings; name the right one with --text_column")
        return opened

    def payloads(self) -> Iterator[tuple[Span, ...]]:
        """Runs of row groups of at least :data:`PART_BYTES`, as the bytes of the file they lie in (the last with the footer)."""
        for file in text_files(self.root, (".parquet",)):
            size = file.stat().st_size
            with self._open(file) as opened:
                starts = _row_group_starts(opened.metadata)
            edges = [0]
            for start in starts:
                if start - edges[-1] >= PART_BYTES:
                    edges.append(start)
            for start, stop in itertools.pairwise([*edges, size]):
                yield (Span(file, start, stop),)

    def items(self, payload: Iterable[Span]) -> Iterator[Item]:
        """The rows of the row groups that begin in a byte range."""
        for span in payload:
            with self._open(span.file) as opened:
                groups = [number for number, start in enumerate(_row_group_starts(opened.metadata)) if span.start <= start < span.stop]
                label = span.file.relative_to(parent_of(self.root)).as_posix() + (f"@{span.start}" if span.start else "")
                columns = [name for name in opened.schema_arrow.names if name in (self.text_column, "id", "title")]
                for number, row in enumerate(self._rows(opened, span.file, groups, columns)):
                    yield Item(_name(row, f"{label}#{number}"), _title(row), paragraphs_of_text(row[self.text_column] or ""))

    @staticmethod
    def _rows(opened: Any, file: Path, groups: Sequence[int], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        if not groups or not opened.metadata.num_rows:
            return
        try:
            for batch in opened.iter_batches(_ROWS_AT_ONCE, row_groups=list(groups), columns=list(columns), use_threads=False):
                yield from batch.to_pylist()
        except UnicodeDecodeError:
            raise DataError(f"{file}: a string of row group {groups[0]} or later is not UTF-8; write the file again") from None
        except OSError as error:
            raise DataError(
                f"{file}: row group {groups[0]} or later is damaged ({str(error).splitlines()[0]}); fetch the file again"
            ) from None


# -------------------------------------------------------------------------------------------------- Hugging Face datasets


def saved_dataset(root: Path) -> bool:
    """Whether a folder was written by ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    return (root / "state.json").is_file() or (root / "dataset_dict.json").is_file()


@dataclasses.dataclass(frozen=True)
class DatasetReader:
    """A Hugging Face dataset on the local disk; needs ``datasets`` (``berth[datasets]``).

    A folder of ``save_to_disk`` is read file by file in the workers (memory-mapped). Whatever else ``load_dataset`` understands (a
    folder or file of Parquet, JSON, CSV or text) is streamed by the library here.
    """

    root: Path
    text_column: str = "text"
    split: str = "train"

    def _library(self) -> Any:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        try:
            import datasets
        except ImportError:
            raise ConfigError(f'--format datasets ({self.root}): needs the library datasets; pip install "berth[datasets]"') from None
        return datasets

    def _check(self, names: Sequence[str]) -> list[str]:
        if self.text_column not in names:
            raise DataError(
                f"{self.root} has no column {self.text_column!r} (its columns: {', '.join(names)}); name the right one with --text_column"
            )
        return [name for name in names if name in (self.text_column, "id", "title")]

    def _saved(self) -> list[Path]:
        folder = self.root
        try:
            if (folder / "dataset_dict.json").is_file():
                splits = list(read_json(folder / "dataset_dict.json")["splits"])
                if self.split not in splits:
                    raise DataError(f"{self.root} has no split {self.split!r}; --split is one of {', '.join(splits)}")
                folder = folder / self.split
            files = [folder / entry["filename"] for entry in read_json(folder / "state.json")["_data_files"]]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{folder}: its state.json or dataset_dict.json is damaged ({error!r}); save the dataset again") from None
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise DataError(f"{folder}: {', '.join(missing)} is missing; copy the whole folder that save_to_disk wrote")
        return files

    def payloads(self) -> Iterator[tuple[Span, ...] | Rows]:
        """A saved dataset: its files. Otherwise batches of rows."""
        library = self._library()
        if saved_dataset(self.root):
            for file in self._saved():
                yield (Span(file, 0, file.stat().st_size),)
            return
        yield from _row_batches(self.root, self._streamed(library))

    def _streamed(self, library: Any) -> Iterator[tuple[str, str | None, str]]:
        kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
        try:
            if self.root.is_file():
                kind = kinds.get(self.root.suffix.lower())
                if kind is None:
                    raise DataError(f"{self.root}: load_dataset reads files that end in {', '.join(kinds)}")
                stream = library.load_dataset(kind, data_files=str(self.root), split="train", streaming=True)
            else:
                stream = library.load_dataset(str(self.root), split=self.split, streaming=True)
            columns: list[str] | None = None
            for number, row in enumerate(stream):
                columns = columns or self._check(list(row))
                text = row[self.text_column]
                yield _name(row, f"{self.split}#{number}"), _title(row), text if isinstance(text, str) else ""
        except DataError:
            raise
        except Exception as error:  # the library wraps whatever a builder raises in classes of its own
            raise DataError(f"{self.root}: datasets cannot read it: {str(error).splitlines()[0] if str(error) else error!r}") from error

    def items(self, payload: tuple[Span, ...] | Rows) -> Iterator[Item]:
        """The rows of files of a saved dataset, or of a batch."""
        if isinstance(payload, Rows):
            for name, title, text in payload.rows:
                yield Item(name, title, paragraphs_of_text(text))
            return
        for span in payload:
            table = self._library().Dataset.from_file(str(span.file))
            table = table.select_columns(self._check(table.column_names))
            label, number = span.file.relative_to(self.root).as_posix(), 0
            for batch in table.iter(_ROWS_AT_ONCE):
                for values in zip(*batch.values(), strict=True):
                    row = dict(zip(batch, values, strict=True))
                    yield Item(_name(row, f"{label}#{number}"), _title(row), paragraphs_of_text(row[self.text_column] or ""))
                    number += 1


def _row_batches(file: Path, rows: Iterable[tuple[str, str | None, str]]) -> Iterator[Rows]:
    batch, size = list[tuple[str, str | None, str]](), 0
    for row in rows:
        batch.append(row)
        size += len(row[2]) + 100
        if size >= ROWS_CHARACTERS:
            yield Rows(file, tuple(batch))
            batch, size = [], 0
    if batch:
        yield Rows(file, tuple(batch))
